"""Questions that a test makes up: targets, blocks, neighbours, and which cells are learnt from."""

from __future__ import annotations

import numpy as np

from scfm_jax.downstream.folds import Fold
from scfm_jax.downstream.question import Question


def question(kind, target, block, *, train=None, near=None, margin=None, n_classes=0):
    """Without `train` every third block is tested; without `near` no cell has a neighbour."""
    everyone = np.arange(len(target))
    train = everyone[block % 3 != 0] if train is None else train
    fold = Fold("0", train, np.setdiff1d(everyone, train))
    near = np.full((len(target), 1), -1) if near is None else near
    return Question(kind, target, tuple(map(str, range(n_classes))), fold, block, near, margin)
