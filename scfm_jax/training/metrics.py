"""One line a step in ``metrics.jsonl``, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from scfm_jax.models.flops import Load, training_flops
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.models.tissue import TissueConfig

# Fields of a row that a clock gave; all others are a function of the config and the corpus.
CLOCKED = frozenset(
    (
        "seconds",
        "shares",
        "goodput",
        "tokens_per_second",
        "real_tokens_per_second",
        "flops_per_second",
        "padded_flops_per_second",
        "mfu",
        "padded_mfu",
    )
)


def summary(sums: dict[str, Any]) -> dict[str, float]:
    """Means of the sums that an objective returns: each ``X_error`` or ``X_share`` over its ``X_count``."""
    means = {"loss": float(sums["loss"]) / max(float(sums["weight"]), 1e-9)}
    for name in sums:
        what, _, kind = name.rpartition("_")
        if kind in ("error", "share"):
            means[name] = float(sums[name]) / max(float(sums[f"{what}_count"]), 1e-9)
    if "gradient_norm" in sums:
        means["gradient_norm"] = float(sums["gradient_norm"])
    return means


@dataclass(frozen=True)
class Meter:
    """How fast a step was, and how much of that was not padding.

    Attributes
    ----------
    model, n_genes
        What is trained, over a vocabulary of so many genes.
    peak_flops
        Dense bf16 operations a second of all devices together; None where it is not known.
    """

    model: TissueConfig | NicheformerConfig
    n_genes: int
    peak_flops: float | None

    def read(
        self, sums: dict[str, Any], rows: int, lengths: tuple[int, int], seconds: dict[str, float]
    ) -> dict[str, float | None]:
        """Real tokens and model FLOPs of a step, shares and speeds.

        Parameters
        ----------
        sums
            What the objective returned, with `Load`'s sums over real tokens.
        rows, lengths
            Of the whole batch: samples, and the lengths that they are padded to.
        seconds
            As `Clock.take` splits them. Speeds leave out compilation, evaluation, checkpoints and the start.
        """
        names = ("tokens", "pairs", "second_tokens", "second_pairs")
        real, padded = Load(rows, *(float(sums[name]) for name in names)), Load.padded(rows, *lengths)
        took = max(sum(seconds[purpose] for purpose in ("compute", "data", "other")), 1e-9)
        flops, padded_flops = (training_flops(self.model, self.n_genes, load) for load in (real, padded))
        return {
            "tokens": real.tokens,
            "flops": flops,
            "real_tokens": real.tokens / padded.tokens,
            "real_pairs": real.pairs / padded.pairs,
            "tokens_per_second": padded.tokens / took,
            "real_tokens_per_second": real.tokens / took,
            "flops_per_second": flops / took,
            "padded_flops_per_second": padded_flops / took,
            "mfu": flops / took / self.peak_flops if self.peak_flops else None,
            "padded_mfu": padded_flops / took / self.peak_flops if self.peak_flops else None,
        }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Appends rows; on a resume, rows after the restored step are cut first.

    Parameters
    ----------
    folder
        The run directory; None writes nothing, as on all hosts of a run but one.
    step
        Step that training goes on from.

    Attributes
    ----------
    cut
        The rows that were cut.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self.cut: list[dict[str, Any]] = []
        self._file = self._board = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        rows = read_metrics(path)
        self.cut = [row for row in rows if row["step"] > step]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        self._file = path.open("a")
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, which has a ``step``."""
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._board:
            for name, value in _numbers(row):
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])


def _numbers(row: dict[str, Any], group: str = "") -> Iterator[tuple[str, float]]:
    """Names and numbers of a row; those of a part of it as ``part/name``."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{group}{name}/")
        elif isinstance(value, int | float):
            yield f"{group}{name}", value
