"""A head over a cell and the set of its neighbours, each embedded alone: what it costs does not grow with k.

A Deep Set (Zaheer et al. 2017): the embedding of every neighbour goes through one small network, what comes
out is averaged, and a second network reads the mean beside the cell's own embedding. The encoder stays as it
is, so that every cell is embedded once, whatever the number of neighbours.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int

from scfm_jax.downstream.question import Question
from scfm_jax.downstream.scores import Kind
from scfm_jax.downstream.targets import cell_losses, loss_targets
from scfm_jax.errors import InputError, check_least
from scfm_jax.models.functional import Parameters, count_parameters

_CLIP = 1.0


@dataclass(frozen=True)
class NeighbourhoodConfig:
    """The head and how it is trained.

    Attributes
    ----------
    neighbours
        k, those that are averaged.
    width
        Of both networks' hidden layers.
    dropout
        Share of the hidden features that training drops.
    epochs, batch_size, peak_rate, weight_decay
        AdamW, the rate in one cycle; the number of epochs is fixed, nothing is chosen on the way.
    label_smoothing, balanced
        Of classes, as in `FinetuneConfig`.
    members
        Heads that differ in first weights, order and dropout, and whose answers are averaged
        (Lakshminarayanan et al. 2017).
    """

    neighbours: int = 16
    width: int = 64
    dropout: float = 0.3
    epochs: int = 6
    batch_size: int = 128
    peak_rate: float = 3e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.1
    balanced: bool = False
    members: int = 1

    def __post_init__(self) -> None:
        check_least(self, 0, "neighbours", "dropout", "weight_decay", "label_smoothing")
        check_least(self, 1, "width", "epochs", "batch_size", "members")
        for name in ("dropout", "label_smoothing"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not below 1")


def neighbourhood_answer(
    features: Float[np.ndarray, "n d"], question: Question, config: NeighbourhoodConfig, *, seed: int = 0
) -> tuple[Float32[np.ndarray, "m ..."], list[dict[str, float]], int]:
    """Train the head on the training cells, and answer for the test cells.

    Parameters
    ----------
    features
        An embedding of every cell of the cohort, made of the cell alone; standardised here by training cells.
    question
        The task in a fold; it must hold the neighbours that `config` wants.
    config
        The head.
    seed
        Of weights, order and dropout.

    Returns
    -------
    The answers, the loss of every epoch (the members' mean), and the number of weights of all members.

    Raises
    ------
    InputError
        Features that are not finite, fewer neighbours than asked for, or a loss that is not finite.
    """
    if question.near.shape[1] < config.neighbours:
        problem = f"holds {question.near.shape[1]} neighbours of the {config.neighbours} asked for"
        raise InputError("neighbourhood head", problem, "lower neighbours")
    if not np.isfinite(features).all():
        raise InputError("features", "some are not finite", "use a model that knows genes of every cell")
    train, test = question.fold.train, question.fold.test
    mean, spread = features[train].mean(0), np.maximum(features[train].std(0), 1e-6)
    x = jnp.asarray((features - mean) / spread, jnp.float32)
    near = jnp.asarray(question.near[:, : config.neighbours], jnp.int32)
    outputs = len(question.classes) or 1
    goals, weights, (middle, scale) = loss_targets(
        question.to_learn,
        question.kind,
        outputs,
        label_smoothing=config.label_smoothing,
        balanced=config.balanced,
    )

    rows, answers, losses, n_weights = train.astype(np.int32), [], [], 0
    for member in range(seed * config.members, (seed + 1) * config.members):
        head, of_epochs = _trained(x, near, rows, goals, weights, config, question.kind, member)
        said = np.asarray(_apply(head, x, near, jnp.asarray(test, jnp.int32)))
        if question.kind == "value":
            answers.append(said[:, 0] * scale + middle)
        else:
            answers.append(np.asarray(jax.nn.softmax(said, axis=1)))
        losses.append(of_epochs)
        n_weights += count_parameters(head)
    history = [
        {"epoch": number, "train_loss": loss} for number, loss in enumerate(np.mean(losses, 0).tolist(), 1)
    ]
    return np.mean(answers, axis=0).astype(np.float32), history, n_weights


def _trained(
    x: Float[Array, "n d"],
    near: Int[Array, "n k"],
    train: Int[np.ndarray, " t"],
    goals: Float[np.ndarray, "t o"],
    weights: Float[np.ndarray, " t"],
    config: NeighbourhoodConfig,
    kind: Kind,
    seed: int,
) -> tuple[Parameters, list[float]]:
    """One head, and its loss in every epoch."""
    size = min(config.batch_size, len(train))
    steps = len(train) // size
    rates = np.asarray(
        jax.vmap(optax.cosine_onecycle_schedule(config.epochs * steps, config.peak_rate))(
            jnp.arange(config.epochs * steps)
        )
    )
    begin, step = _programs(config, kind)
    key = jax.random.key(seed)
    state, losses = begin(init_neighbourhood(x.shape[1], config.width, goals.shape[1], key)), []
    for number in range(config.epochs):
        order, values = np.random.default_rng([seed, number]).permutation(len(train)), []
        for at in range(steps):
            rows, done = order[at * size : (at + 1) * size], number * steps + at
            state, value = step(state, x, near, train[rows], goals[rows], weights[rows], rates[done], key)
            values.append(value)
        losses.append(float(np.mean(jax.device_get(values))))
    if not np.isfinite(losses[-1]):
        raise InputError("peak_rate", "the loss is not finite", "lower it")
    return state["head"], losses


@functools.lru_cache(maxsize=64)
def _programs(config: NeighbourhoodConfig, kind: Kind) -> tuple[Any, Any]:
    """A head to the state of step 0, and the jitted step, which folds and seeds share."""
    optimiser = optax.chain(
        optax.clip_by_global_norm(_CLIP), optax.adamw(1.0, weight_decay=config.weight_decay)
    )

    def begin(head: Parameters) -> dict[str, Any]:
        return {"head": head, "optimiser": optimiser.init(head), "step": jnp.zeros((), jnp.uint32)}

    def step(
        state: dict[str, Any],
        features: Float[Array, "n d"],
        near: Int[Array, "n k"],
        rows: Int[Array, " b"],
        goals: Float[Array, "b o"],
        weight: Float[Array, " b"],
        rate: Float[Array, ""],
        key: Array,
    ) -> tuple[dict[str, Any], jax.Array]:
        def loss(head: Parameters) -> jax.Array:
            drawn = jax.random.fold_in(key, state["step"])
            said = apply_neighbourhood(head, features, near, rows, dropout=config.dropout, key=drawn)
            return cell_losses(said, goals, kind).sum() / weight.sum()

        value, gradients = jax.value_and_grad(loss)(state["head"])
        updates, moments = optimiser.update(gradients, state["optimiser"], state["head"])
        new = {
            "head": optax.apply_updates(state["head"], optax.tree.scale(rate, updates)),
            "optimiser": moments,
            "step": state["step"] + 1,
        }
        return new, value

    return begin, jax.jit(step, donate_argnums=0)


def init_neighbourhood(inputs: int, width: int, outputs: int, key: Array) -> Parameters:
    """Parameters of the networks: normal kernels of variance 2 / in, zero biases."""
    sizes = {
        "own": (inputs, width),
        "each_1": (inputs, width),
        "each_2": (width, width),
        "both_1": (2 * (inputs + width), width),
        "both_2": (width, outputs),
    }
    return {
        name: {
            "kernel": jax.random.normal(part, size, jnp.float32) * (2 / size[0]) ** 0.5,
            "bias": jnp.zeros(size[1], jnp.float32),
        }
        for (name, size), part in zip(sizes.items(), jax.random.split(key, len(sizes)), strict=True)
    }


def apply_neighbourhood(
    head: Parameters,
    features: Float[Array, "n d"],
    near: Int[Array, "n k"],
    rows: Int[Array, " b"],
    *,
    dropout: float = 0.0,
    key: Array | None = None,
) -> Float[Array, "b o"]:
    """What the head says of some cells.

    Parameters
    ----------
    head
        From `init_neighbourhood`.
    features
        Of every cell.
    near
        Neighbours of every cell, -1 where there are fewer; the mean of none is zero.
    rows
        The cells.
    dropout, key
        Share of hidden features that is dropped, and what draws them; without a key none is.
    """

    def layer(name: str, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        return x @ head[name]["kernel"] + head[name]["bias"]

    def dropped(x: Float[Array, "... i"], number: int) -> Float[Array, "... i"]:
        if key is None:
            return x
        kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - dropout, x.shape)
        return jnp.where(kept, x / (1 - dropout), 0.0)

    around = near[rows]
    present = (around >= 0).astype(features.dtype)[..., None]
    neighbours = features[around] * present

    def mean(of_each: Float[Array, "b k i"]) -> Float[Array, "b i"]:
        return (of_each * present).sum(1) / jnp.maximum(present.sum(1), 1.0)

    each = jax.nn.gelu(layer("each_2", jax.nn.gelu(layer("each_1", neighbours))))
    own = features[rows]
    both = jnp.concatenate([jax.nn.gelu(layer("own", own)), mean(each), own, mean(neighbours)], axis=1)
    return layer("both_2", dropped(jax.nn.gelu(layer("both_1", dropped(both, 0))), 1))


_apply = jax.jit(apply_neighbourhood)
