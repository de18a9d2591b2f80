"""Where the time of a run goes, measured without holding up the devices."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax

from scfm_jax.errors import InputError

Item = TypeVar("Item")

# What the host does while the devices have nothing to do; `compute` is when they have. `start` is what came
# before the first step, `other` all else.
PURPOSES = ("compute", "data", "compile", "evaluation", "checkpoint", "start", "other")
# Steps that the host may be ahead of the devices: more would pile up batches in their memory.
_IN_FLIGHT = 4


class Clock:
    """Splits the time from each step's result to the next among purposes, so that nothing is left over.

    A thread waits for each step's results and notes when they are there. A step computes from when it was
    launched, or its forerunner done, whichever is later, until its results are there; the devices idle
    before that, for what the host did meanwhile.

    Parameters
    ----------
    now
        Seconds, from any zero.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._watcher = ThreadPoolExecutor(1, "scfm-clock")
        self._spans: deque[tuple[str, float, float]] = deque()
        self._launched: deque[tuple[float, Future[float]]] = deque()
        self._until, self._remainder = now(), "start"

    @contextmanager
    def spent(self, purpose: str) -> Iterator[None]:
        """The host does this in the block; blocks do not nest."""
        start = self._now()
        try:
            yield
        finally:
            self._spans.append((purpose, start, self._now()))

    def waits(self, items: Iterable[Item]) -> Iterator[Item]:
        """`items`; waiting for them is for `data`."""
        iterator = iter(items)
        while True:
            with self.spent("data"):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def launch(
        self, step: Callable[..., tuple[Any, Any]], *arguments: Any, compiles: bool
    ) -> tuple[Any, Any]:
        """Call `step`, which returns a new state and results, without waiting for them.

        Where it `compiles`, which the host does before it launches, it counts as launched once it returns.
        """
        if len(self._launched) >= _IN_FLIGHT:
            self._launched[-_IN_FLIGHT][1].result()
        before = self._now()
        state, results = step(*arguments)
        after = self._now()
        if compiles:
            self._spans.append(("compile", before, after))
        self._launched.append((after if compiles else before, self._watcher.submit(self._done, results)))
        return state, results

    def _done(self, results: Any) -> float:
        jax.block_until_ready(results)
        return self._now()

    def settle(self) -> None:
        """Wait for all steps launched so far."""
        if self._launched:
            self._launched[-1][1].result()

    def take(self) -> dict[str, float]:
        """Seconds by purpose from the last step taken to the next launched one's results; waits for them."""
        launched, done = self._launched.popleft()
        return self._split(launched, done.result())

    def rest(self) -> dict[str, float]:
        """The same from the last step taken until now, when no step is in flight."""
        now = self._now()
        return self._split(now, now)

    def _split(self, launched: float, done: float) -> dict[str, float]:
        start, self._until = self._until, done
        launched = max(launched, start)
        seconds = dict.fromkeys(PURPOSES, 0.0)
        for purpose, first, last in self._spans:
            seconds[purpose] += max(min(last, launched) - max(first, start), 0.0)
        while self._spans and self._spans[0][2] <= done:
            self._spans.popleft()
        seconds[self._remainder] = max(launched - start - sum(seconds.values()), 0.0)
        self._remainder = "other"
        seconds["compute"] = done - launched
        return seconds


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Each purpose's share of them all."""
    total = max(sum(seconds.values()), 1e-9)
    return {purpose: spent / total for purpose, spent in seconds.items()}


class Ledger:
    """What became of a run's time since its first start, over all its resumes: ``goodput.json``.

    Beside the purposes of a `Clock` there are ``lost``, the time of steps that were done again after a crash,
    and ``down``, when nothing ran, or nothing was written down of what did. All together they are the time
    from the first start until the last row.

    Parameters
    ----------
    folder
        The run directory; None keeps the ledger in memory.
    cut
        Rows of metrics that a resume cut off, since it does their steps again.
    now
        Seconds since the epoch at which this process began to work on the run.
    """

    def __init__(self, folder: Path | None, cut: list[dict[str, Any]], now: float) -> None:
        self._path = folder / "goodput.json" if folder else None
        self._started, self._seen, self._starts = now, now, 1
        self._seconds = dict.fromkeys((*PURPOSES, "lost", "down"), 0.0)
        if self._path and self._path.exists():
            before = json.loads(self._path.read_text())
            self._started, self._starts = before["started"], before["starts"] + 1
            self._seconds |= before["seconds"]
            for row in cut:
                for purpose, seconds in row.get("seconds", {}).items():
                    self._seconds[purpose] -= seconds
                    self._seconds["lost"] += seconds
            self._seconds["down"] += now - before["seen"]

    @property
    def goodput(self) -> float:
        """Share of the time since the first start in which steps were computed that stay."""
        return shares(self._seconds)["compute"]

    def add(self, seconds: dict[str, float]) -> None:
        """Count what a clock has split."""
        for purpose, spent in seconds.items():
            self._seconds[purpose] += spent
            self._seen += spent

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None:
            return
        content = {
            "started": self._started,
            "seen": self._seen,
            "starts": self._starts,
            "goodput": self.goodput,
            "seconds": self._seconds,
        }
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(self._path)


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of ``START:STOP``.

    Raises
    ------
    InputError
        It is no such pair.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError("--profile", f"cannot read {text!r}", "write START:STOP, two steps from 1, as 21:25")
    return int(first), int(last)


def _without_python() -> jax.profiler.ProfileOptions:
    """No trace of Python's calls, which would slow the steps down and fill the trace."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


def profiled(
    steps: Iterable[tuple[int, Item]], span: tuple[int, int] | None, folder: Path, settle: Callable[[], None]
) -> Iterator[tuple[int, Item]]:
    """`steps`, numbered, of which those from the first to the last of `span` are traced into `folder`.

    `settle` waits for what the devices have still to do, before and after.
    """
    first, last = span or (0, 0)
    tracing = False
    try:
        for step, item in steps:
            if span and not tracing and first <= step <= last:
                settle()
                jax.profiler.start_trace(str(folder), profiler_options=_without_python())
                tracing = True
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield step, item
            if tracing and step >= last:
                settle()
                jax.profiler.stop_trace()
                tracing = False
    finally:
        if tracing:
            settle()
            jax.profiler.stop_trace()
