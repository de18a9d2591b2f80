"""What a person sees while a command runs: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0
# What a family's objective says beside its loss.
_HELD_OUT_PARTS = {
    "held_out_nonzero_error": "non-zeros",
    "held_out_zero_error": "zeros",
    "held_out_top1_error": "genes not at first guess",
}


class Bar:
    """A progress bar with a note beside it; where standard error is no terminal, a line every ten seconds.

    Parameters
    ----------
    what
        What is being done.
    quiet
        Show nothing.
    """

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self._what, self._quiet = what, quiet
        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal and not quiet
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(what, total=None, note="")

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` is done."""
        if self._live:
            self._progress.update(self._task, completed=done, total=total, note=note)
        elif not self._quiet and (
            done == total or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES
        ):
            self._last_line = time.monotonic()
            print(f"{self._what}: {done:,}/{total:,} {note}".rstrip(), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._quiet:
            self._console.print(line, markup=False)


class TrainingBar(Bar):
    """Shows the rows that training reports: what was found, losses, held-out losses."""

    def __init__(self, steps: int, what: str = "training", *, quiet: bool = False) -> None:
        super().__init__(what, quiet=quiet)
        self._steps = steps
        self._held_out = ""

    def report(self, row: dict[str, Any]) -> None:
        """Take a row of `scfm_jax.training.train.train`."""
        if "parameters" in row:
            self.say(
                f"{row['training_cells']:,} training cells, {row['held_out_cells']:,} held out; "
                f"{row['parameters']:,} parameters; {row['devices']}"
                + (f" on {row['hosts']} hosts" if row["hosts"] > 1 else "")
                + f"; attention {row['attention']}"
                + (f"; resumed at step {row['step']:,}" if row["step"] else "")
            )
        elif "held_out_loss" in row:
            self._held_out = f" held-out {row['held_out_loss']:.4f}"
            parts = ", ".join(f"{name} {row[key]:.4f}" for key, name in _HELD_OUT_PARTS.items() if key in row)
            self.say(f"step {row['step']:,}: held-out loss {row['held_out_loss']:.4f} ({parts})")
        else:
            note = (
                f"loss {row['loss']:.4f}{self._held_out}  {row['real_tokens_per_second']:,.0f} real tokens/s"
            )
            if row["mfu"] is not None:
                note += f"  MFU {row['mfu']:.1%}"
            self.update(row["step"], self._steps, note)


def print_build(report: dict[str, Any]) -> None:
    """Say what became of each file of a build."""
    for file in report["files"]:
        genes, dropped = file["genes"], sum(file["dropped"].values())
        excluded = ", ".join(f"{n:,} {kind}" for kind, n in file["excluded"].items())
        outcomes = ", ".join(
            f"{genes[f'n_{outcome}']:,} {outcome}"
            for outcome in ("matched", "unmatched", "ambiguous", "merged", "displaced")
        )
        print(
            f"{Path(file['path']).name}: {file['n_kept']:,} of {file['n_cells']:,} cells kept"
            + (
                f" ({', '.join(f'{n:,} {why}' for why, n in file['dropped'].items() if n)})"
                if dropped
                else ""
            )
            + f"; genes: {outcomes}; {genes['share_lost']:.1%} of counts lost"
            + (f"; excluded features: {excluded}" if excluded else "")
        )


def print_json(value: Any, file: TextIO | None = None) -> None:
    """Print a report for machines."""
    print(json.dumps(value, indent=2, default=str), file=file)
