"""Fine-tuning on labelled cells: a head, and with it adapters or all weights that encode."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Float32, Int, Int64, Shaped

from scfm_jax.corpus import Corpus
from scfm_jax.downstream.choosing import held_out_blocks, neighbour_rows
from scfm_jax.downstream.embed import CellStates, EmbeddingConfig, embed_cells
from scfm_jax.downstream.finetuned import FinetuneConfig, FineTuned
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.downstream.scores import Kind
from scfm_jax.downstream.targets import cell_losses, check_targets, drawn, loss_targets, score
from scfm_jax.errors import InputError
from scfm_jax.models.functional import Parameters
from scfm_jax.models.heads import apply_head, init_head, pooled, unstandardised
from scfm_jax.models.lora import encoding, init_adapters

_CLIP = 1.0
_WINDOW = 16  # batches whose cells are sorted by length together
_MULTIPLE = 64  # of lengths, at least: a step takes seconds to compile, padding a short row milliseconds


def finetune(
    model: TrainedModel,
    corpus: Corpus,
    cells_train: Int64[np.ndarray, " n"],
    targets_train: Shaped[np.ndarray, " n *c"],
    blocks_train: Int[np.ndarray, " n"],
    config: FinetuneConfig,
    *,
    kind: Kind = "classes",
    n_classes: int | None = None,
    margin: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> FineTuned:
    """Train on most blocks of the training cells, and keep the epoch that is best on the others.

    Parameters
    ----------
    model
        The base; its parameters stay as they are.
    corpus
        With the model's vocabulary.
    cells_train
        Cell numbers.
    targets_train
        ``classes``: a code each; leave cells without a label out. ``composition``: a distribution over
        classes each. ``value``: a number each.
    blocks_train
        Spatial block of each cell.
    config
        What is trained, and how.
    kind
        Of the targets.
    n_classes
        Of codes: how many classes there are; as many as the training cells show if not given.
    margin
        Neighbours: a cell that has one of the validation blocks among so many does not train while the epoch
        is chosen. None: all that the corpus stores.
    seed
        Of cells drawn, blocks held out, first weights, order and dropout.
    progress
        Called with the steps done and planned, and the newest scores.

    Raises
    ------
    InputError
        Targets that are not what `kind` says, one block, one class or no cell outside the margin, a choice
        that the model does not have, or a loss that is not finite.
    """
    if config.neighbours is not None:
        model = model.with_neighbours(config.neighbours)
    outputs = check_targets(targets_train, kind, n_classes)
    kept = drawn(targets_train, kind, config.max_train_cells, seed)
    cells, targets = cells_train[kept], targets_train[kept]
    codes = targets if kind == "classes" else None
    near = neighbour_rows(cells, corpus.neighbours(cells, corpus.n_neighbours if margin is None else margin))
    fit, held_out = held_out_blocks(
        blocks_train[kept], near, seed, labels=codes, share=config.validation_share
    )
    goals, weights, scale = loss_targets(
        targets, kind, outputs, label_smoothing=config.label_smoothing, balanced=config.balanced
    )
    states = CellStates.of(model, EmbeddingConfig(pooling=config.head.pooling))
    training = _Training(model, corpus, cells, goals, weights, config, kind, states, seed)
    steps = -(-len(fit) // config.batch_size)
    planned = config.epochs * steps

    best = FineTuned(model, config, kind, {}, scale, optimiser_bytes=training.optimiser_bytes)
    history: list[dict[str, float]] = []
    started = time.monotonic()
    note = ""
    passes = training.epochs(fit, lambda done: progress(done, planned, note))
    for epoch, (trained, loss) in enumerate(passes, start=1):
        now = replace(best, trained=trained)
        said = training.answers(now, held_out)
        row = {"epoch": epoch, "train_loss": loss, "validation_score": score(kind, targets[held_out], said)}
        history.append({**row, "seconds": time.monotonic() - started})
        if not best.history or row["validation_score"] > best.chosen["validation_score"]:
            # The step takes the state's buffers, of which a CPU's arrays are views: what stays is copied.
            best = replace(best, trained=jax.tree.map(np.array, trained), history=tuple(history))
        note = f"epoch {epoch}: loss {loss:.4f}  validation {row['validation_score']:.3f}"
        progress(epoch * steps, planned, note)
        if epoch - best.chosen["epoch"] >= config.patience:
            break
    best = replace(best, history=tuple(history))
    if config.refit:
        stop = int(best.chosen["epoch"])
        everyone = training.epochs(np.arange(len(cells)), lambda done: progress(planned, planned, note))
        *_, (trained, _) = itertools.islice(everyone, stop)
        best = replace(best, trained=jax.tree.map(np.array, trained))
    progress(planned, planned, f"epoch {best.chosen['epoch']} of {len(history)} chosen")
    return best


@dataclass(frozen=True, eq=False)
class _Training:
    """What all passes over training cells share; rows count in `cells`."""

    model: TrainedModel
    corpus: Corpus
    cells: Int64[np.ndarray, " n"]
    goals: Float32[np.ndarray, "n o"]
    weights: Float32[np.ndarray, " n"]
    config: FinetuneConfig
    kind: Kind
    states: CellStates
    seed: int

    @functools.cached_property
    def features(self) -> Float32[np.ndarray, "n d"]:
        """Of all cells, by the base."""
        return embed_cells(self.model, self.corpus, self.cells, config=self.states.config)

    @functools.cached_property
    def standard(self) -> tuple[Float32[np.ndarray, " d"], Float32[np.ndarray, " d"]]:
        """Mean and spread of the features that the head learns on."""
        if not self.config.standardise:
            return np.zeros(self.model.width, np.float32), np.ones(self.model.width, np.float32)
        spread = self.features.std(0)
        return self.features.mean(0), np.where(spread > 0, spread, 1.0).astype(np.float32)

    def answers(self, tuned: FineTuned, rows: Int64[np.ndarray, " m"]) -> np.ndarray:
        """What `tuned` says of some of the cells."""
        if self.config.way == "head":
            return tuned.answer(self.features[rows])
        return tuned.predict(self.corpus, self.cells[rows])

    @property
    def optimiser_bytes(self) -> int:
        """What the optimiser holds."""
        begin, _ = _programs(self.states, self.config.of_step, self.kind)
        state = jax.eval_shape(lambda: begin(self._first(jax.random.key(0))))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state["optimiser"]))

    def epochs(
        self, rows: Int64[np.ndarray, " f"], report: Callable[[int], None]
    ) -> Iterator[tuple[Parameters, float]]:
        """What is trained, and the mean loss, after every epoch over `rows`.

        The trained arrays hold until the next epoch is asked for. `report` is told the steps done.
        """
        config, size = self.config, self.config.batch_size
        steps = config.epochs * -(-len(rows) // size)
        warmup = min(int(config.warmup_share * steps), steps - 1)
        rate = optax.warmup_cosine_decay_schedule(0.0 if warmup else 1.0, 1.0, warmup, steps + 1)
        factors = np.asarray(jax.jit(rate)(np.arange(1, steps + 1)), np.float32)
        begin, step = _programs(self.states, config.of_step, self.kind)
        key = jax.random.key(self.seed)
        # Where the step leaves them: were they to begin elsewhere, it would be compiled twice.
        place = jnp.asarray(jax.tree.leaves(self.model.parameters)[0]).sharding
        state = jax.device_put(begin(self._first(key)), place)
        frozen = {"model": {} if config.way == "head" else self.model.parameters, "features": self.standard}
        done = 0
        for epoch in range(config.epochs):
            sums = []
            for chosen, inputs in self._batches(rows, epoch):
                filled = np.resize(chosen, size)
                weight = np.where(np.arange(size) < len(chosen), self.weights[filled], 0.0)
                arguments = inputs, self.goals[filled], weight.astype(np.float32), factors[done]
                state, of_step = step(state, frozen, *arguments, key)
                sums.append(of_step)
                done += 1
                report(done)
            loss, weight = np.sum(jax.device_get(sums), axis=0)  # once an epoch: a look waits for the device
            if not np.isfinite(loss):
                raise InputError(
                    "base_rate, head_rate", f"the loss of epoch {epoch + 1} is not finite", "lower them"
                )
            trained = state["trained"]
            yield (
                {
                    "base": trained["base"],
                    "head": unstandardised(trained["head"], *map(jnp.asarray, self.standard)),
                },
                float(loss / weight),
            )

    def _first(self, key: jax.Array) -> Parameters:
        config, parameters = self.config, self.model.parameters
        of_base, of_head = jax.random.split(key)
        base: Parameters = {}
        if config.way == "lora":
            base = init_adapters(parameters, config.lora, of_base)
        elif config.way == "full":
            base = encoding(parameters)
        return {
            "base": base,
            "head": init_head(config.head, self.model.width, self.goals.shape[1], of_head),
        }

    def _batches(self, rows: Int64[np.ndarray, " f"], epoch: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Each of `rows` once, in an order drawn by (seed, epoch), with what the step reads of them."""
        config, random = self.config, np.random.default_rng([self.seed, epoch])
        order, size = random.permutation(rows), self.config.batch_size
        if config.way == "head":
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                yield chosen, self.features[np.resize(chosen, size)]
            return
        run = self.model.config
        multiple = max(run.data.length_multiple, _MULTIPLE)
        data = replace(run.data, batch_size=size, virtual_shards=1, window=_WINDOW, length_multiple=multiple)
        reading = replace(
            self.model, config=replace(run, data=data, optimiser=replace(run.optimiser, accumulation=1))
        )
        batches = reading.batches(self.corpus, self.cells[order], rates=None)
        while window := list(itertools.islice(batches, _WINDOW)):
            for place in random.permutation(len(window)):
                places, batch = window[place]
                yield order[places], batch


@functools.lru_cache(maxsize=16)
def _programs(states: CellStates, config: FinetuneConfig, kind: Kind) -> tuple[Any, Any]:
    """What is trained to the state of step 0; and the jitted step, which folds and seeds share."""

    def optimise(rate: float) -> optax.GradientTransformation:
        return optax.adamw(rate, weight_decay=config.weight_decay, mask=_decays)

    optimiser = optax.chain(
        optax.clip_by_global_norm(_CLIP),
        optax.multi_transform({name: optimise(rate) for name, rate in config.rates.items()}, _parts),
    )

    def begin(trained: Parameters) -> dict[str, Any]:
        return {
            # The step takes the state's buffers, and the base keeps its own.
            "trained": jax.tree.map(jnp.copy, trained),
            "optimiser": optimiser.init(trained),
            "step": jnp.zeros((), jnp.uint32),
        }

    def step(
        state: dict[str, Any],
        frozen: Parameters,
        inputs: Any,
        goals: Float[jax.Array, "b o"],
        weight: Float[jax.Array, " b"],
        factor: Float[jax.Array, ""],
        key: jax.Array,
    ) -> tuple[dict[str, Any], tuple[jax.Array, jax.Array]]:
        def loss(trained: Parameters) -> tuple[jax.Array, jax.Array]:
            features = inputs
            if config.way != "head":
                parameters = config.combined(frozen["model"], trained["base"])
                features = pooled(*states(parameters, inputs), config.head.pooling)
            mean, spread = frozen["features"]
            dropout = jax.random.fold_in(key, state["step"])
            said = apply_head(trained["head"], config.head, (features - mean) / spread, dropout)
            losses = cell_losses(said, goals, kind)
            # A cell's weight is in its probabilities; what fills a batch has none.
            total = jnp.sum(jnp.where(weight > 0, losses, 0.0))
            return total / jnp.sum(weight), total

        (_, total), gradients = jax.value_and_grad(loss, has_aux=True)(state["trained"])
        updates, moments = optimiser.update(gradients, state["optimiser"], state["trained"])
        new = {
            "trained": optax.apply_updates(state["trained"], optax.tree.scale(factor, updates)),
            "optimiser": moments,
            "step": state["step"] + 1,
        }
        return new, (total, jnp.sum(weight))

    return jax.jit(begin), jax.jit(step, donate_argnums=0)


def _parts(trained: Parameters) -> Parameters:
    """The name of the part, base or head, at every leaf."""
    return {name: jax.tree.map(lambda leaf, name=name: name, part) for name, part in trained.items()}


def _decays(parameters: Parameters) -> Parameters:
    return jax.tree.map_with_path(lambda path, leaf: path[-1].key in ("kernel", "a", "b"), parameters)
