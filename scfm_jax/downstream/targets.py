"""What fine-tuning aims at: targets as the loss takes them, the loss of a cell, and the score of an epoch."""

from __future__ import annotations

import jax
import numpy as np
import optax
from jaxtyping import Float, Float32, Int64, Shaped
from sklearn.metrics import r2_score
from sklearn.utils.class_weight import compute_class_weight

from scfm_jax.downstream.scores import Kind, macro_f1
from scfm_jax.errors import InputError


def check_targets(targets: Shaped[np.ndarray, " n *c"], kind: Kind, n_classes: int | None) -> int:
    """How many numbers the head says; an error where targets are not what `kind` says."""
    if kind == "value":
        if not np.isfinite(targets).all():
            raise InputError("targets_train", "some values are not finite", "leave these cells out")
        if targets.std() == 0:
            raise InputError("targets_train", "all values are equal", "choose another target")
        return 1
    if kind == "composition":
        if (targets < 0).any() or not np.allclose(targets.sum(1), 1.0, atol=1e-3):
            raise InputError("targets_train", "some rows are no distribution", "let them sum to 1")
        return targets.shape[1]
    outputs = int(targets.max()) + 1 if n_classes is None else n_classes
    if (targets < 0).any():
        raise InputError("targets_train", "negative codes mean no label", "leave these cells out")
    if targets.max() >= outputs:
        raise InputError(
            "targets_train", f"code {targets.max()} is beyond {outputs} classes", "count them again"
        )
    return outputs


def drawn(targets: Shaped[np.ndarray, " n *c"], kind: Kind, most: int, seed: int) -> Int64[np.ndarray, " m"]:
    """Rows of at most `most` cells (0: all): every so many along the classes or values in order."""
    if not most or len(targets) <= most:
        return np.arange(len(targets))
    random = np.random.default_rng(seed)
    along = targets.argmax(1) if kind == "composition" else targets
    order = np.lexsort((random.random(len(targets)), along))
    return np.sort(order[((np.arange(most) + random.random()) * len(targets) / most).astype(np.int64)])


def loss_targets(
    targets: Shaped[np.ndarray, " n *c"], kind: Kind, outputs: int, *, label_smoothing: float, balanced: bool
) -> tuple[Float32[np.ndarray, "n o"], Float32[np.ndarray, " n"], tuple[float, float]]:
    """What the loss compares a head's outputs with, the weight of each cell, and mean and spread of values.

    With classes, entry c is the smoothed probability of c times the weight of c, and a cell weighs as its
    class does: summed cross-entropy over summed weights is PyTorch's ``CrossEntropyLoss(weight,
    label_smoothing)``. A class without cells weighs nothing.
    """
    even = np.ones(len(targets), np.float32)
    if kind == "composition":
        return targets.astype(np.float32), even, (0.0, 1.0)
    if kind == "value":
        mean, spread = float(targets.mean()), float(targets.std())
        return ((targets - mean) / spread).astype(np.float32)[:, None], even, (mean, spread)
    present, of_class = np.unique(targets), np.zeros(outputs, np.float32)
    balance = "balanced" if balanced else None
    of_class[present] = compute_class_weight(balance, classes=present, y=targets)
    of_class /= of_class[present].mean()
    smooth = optax.smooth_labels(np.eye(outputs, dtype=np.float32), label_smoothing) * of_class
    return np.asarray(smooth)[targets], of_class[targets], (0.0, 1.0)


def cell_losses(
    said: Float[jax.Array, "b o"], goals: Float[jax.Array, "b o"], kind: Kind
) -> Float[jax.Array, " b"]:
    """Squared error of a value, or cross-entropy with (weighted) probabilities, cell by cell."""
    if kind == "value":
        return ((said - goals) ** 2)[:, 0]
    return optax.softmax_cross_entropy(said, goals)


def score(kind: Kind, truth: np.ndarray, said: np.ndarray) -> float:
    """Higher is better; see `FineTuned.history`."""
    if kind == "classes":
        return macro_f1(truth, said.argmax(1))
    if kind == "composition":
        return float(np.sum(truth * np.log(np.maximum(said, 1e-12)), axis=1).mean())
    return float(r2_score(truth, said))
