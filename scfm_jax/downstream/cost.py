"""What something takes: wall time, and how far the memory of this process grew."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

_STATM = Path("/proc/self/statm")
_PAGE_KIB, _LOOK_SECONDS = 4, 0.02


class Cost(NamedTuple):
    """Seconds of wall time, and MiB of resident memory beyond what was there before; None where not known."""

    seconds: float = 0.0
    peak_mib: float | None = None

    def then(self, later: Cost) -> Cost:
        """Of one thing after the other."""
        known = [mib for mib in (self.peak_mib, later.peak_mib) if mib is not None]
        return Cost(self.seconds + later.seconds, max(known, default=None))


class Meter:
    """Measures the block that it is the context of; `cost` is there when the block has ended."""

    cost = Cost()

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        if _STATM.exists():
            self._base = self._most = _resident_pages()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds, mib = time.perf_counter() - self._began, None
        if _STATM.exists():
            self._stop.set()
            self._thread.join()
            mib = (max(self._most, _resident_pages()) - self._base) * _PAGE_KIB / 1024
        self.cost = Cost(seconds, mib)

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self._most = max(self._most, _resident_pages())


def _resident_pages() -> int:
    return int(_STATM.read_text().split()[1])
