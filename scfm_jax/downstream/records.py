"""What results say of themselves in ``uns``: scores with intervals and settings, as plain data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from scfm_jax.downstream.metrics import FEW_BLOCKS
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.downstream.scores import Interval
from scfm_jax.errors import DataWarning, InputError


def plain(found: Interval) -> dict[str, float]:
    """``value``, ``low`` and ``high``."""
    return dict(found._asdict())


def model_record(model: TrainedModel) -> dict[str, Any]:
    """Which model it was."""
    return {"model": model.config.name, "model_hash": model.hash, "step": model.step}


def storable(value: Any) -> Any:
    """Plain data as ``uns`` of a file can hold it: lists of rows become tables, lists of names arrays."""
    if isinstance(value, Mapping):
        return {name: storable(part) for name, part in value.items() if part is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and isinstance(value[0], Mapping):
            return pd.DataFrame(list(value))
        return np.array(value, dtype=None if value else str)
    return value


def check_key(key: str, taken: Sequence[str], where: str = "adata") -> None:
    """Raise InputError for a key that no file can hold, or that is one of the names that are read."""
    if "/" in key or key in taken:
        raise InputError(where, f"cannot keep predictions as {key!r}", "give another key_added")


def check_blocks(block: Int[np.ndarray, " m"], where: str = "adata") -> None:
    """Raise InputError where all cells to be scored lie in one block: they are no sample of the tissue."""
    if len(np.unique(block)) < 2:
        raise InputError(where, "all cells to be scored lie in one block", "raise split.blocks")


def warn_of_few_blocks(block: Int[np.ndarray, " m"], where: str = "adata") -> None:
    """Warn (DataWarning) below 10 blocks, where intervals are too narrow."""
    if len(np.unique(block)) < FEW_BLOCKS:
        text = f"{where}: {len(np.unique(block))} blocks are scored, intervals are too narrow"
        warnings.warn(text, DataWarning, stacklevel=3)


def warn_of_leaking(leaking: bool, where: str = "adata") -> None:
    """Warn (DataWarning) of folds whose test cells lie among training cells."""
    if leaking:
        text = "neighbours of test cells are trained on (split.by random), so all scores are too good"
        warnings.warn(f"{where}: {text}", DataWarning, stacklevel=3)
