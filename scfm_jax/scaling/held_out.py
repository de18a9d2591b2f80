"""Held-out masked-expression loss that compares across k, sizes and seeds: same cells, same masked genes.

A run's own evaluation masks by the run's seed, and is not comparable between seeds. Here the mask is a
function of a seed of its own, of the cell and of the gene (`scfm_jax.data.masks`), whatever the model and
however many neighbours it reads. Losses are kept as sums by cell, which later give the pooled loss of any
group of cells, its error over blocks of tissue, and paired comparisons.
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.downstream.metrics import CellSums, Paired, block_draws, paired_bootstrap
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.downstream.outputs import written_whole
from scfm_jax.errors import InputError
from scfm_jax.models.functional import Parameters
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.objectives.column_masking import ColumnMaskingConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig
from scfm_jax.training.config import RunConfig
from scfm_jax.training.task import loss_of, make_task


class LossAndError(NamedTuple):
    """A pooled loss and its standard error; the error is NaN where one block cannot tell."""

    loss: float
    error: float


@dataclass(frozen=True, eq=False)
class HeldOutErrors:
    """What a model's errors on masked genes come to in each cell.

    Attributes
    ----------
    cells
        Cell numbers.
    parts
        Sums by cell and what they are divided by. ``loss`` is the objective's own; with AIDO.Tissue
        ``nonzero`` and ``zero`` are squared errors of log1p values over masked genes with and without counts;
        with Nicheformer ``top1`` counts the masked genes that are not the likeliest, ``cut`` and
        ``niche_cut`` the genes that a sentence had no room for.
    seed
        Of the mask.
    corpus
        Hash of the corpus: the mask knows cells by their numbers in it.
    measure
        What else decides which genes are masked and the unit of the loss; see `measure_of`.
    """

    cells: Int64[np.ndarray, " n"]
    parts: Mapping[str, CellSums]
    seed: int
    corpus: str
    measure: Mapping[str, Any]

    @property
    def loss(self) -> CellSums:
        return self.parts["loss"]

    def take(self, places: Int64[np.ndarray, " m"]) -> HeldOutErrors:
        """Those of the cells at some places of `cells`."""
        parts = {name: CellSums(*(values[places] for values in part)) for name, part in self.parts.items()}
        return replace(self, cells=self.cells[places], parts=parts)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        about = {"seed": self.seed, "corpus": self.corpus, "measure": self.measure, "parts": [*self.parts]}
        with written_whole(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file,
                cells=self.cells,
                sums=np.array([[*part] for part in self.parts.values()]),
                about=np.array(json.dumps(about)),
            )

    @classmethod
    def load(cls, path: Path) -> HeldOutErrors:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            No such file, or another kind of file.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                cells, sums, about = (stored[name] for name in ("cells", "sums", "about"))
            said = json.loads(str(about))
            parts = {name: CellSums(*part) for name, part in zip(said.pop("parts"), sums, strict=True)}
            return cls(cells=cells, parts=parts, **said)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise InputError(
                path, f"holds no held-out errors ({error})", "run the evaluation of this run again"
            ) from error


@dataclass(frozen=True)
class _SumsByRow:
    """(parameters, batch, key) to what `loss_of` sums over a batch, row by row, and to its sum of losses.

    Every sum is linear in the weights of the rows, so that a row's own share is the derivative by its weight.
    Nothing but the last products depends on the weights: the model runs once, forward, with the attention
    that trained it. Equal ones compute the same, so that what is compiled of one run serves all of its shape.

    Attributes
    ----------
    graph
        Made by `model`, `objective` and `n_genes`.
    """

    graph: nnx.GraphDef = field(compare=False)
    model: TissueConfig | NicheformerConfig
    objective: ColumnMaskingConfig | MaskedGenesConfig
    n_genes: int

    def __call__(
        self, parameters: Parameters, batch: Any, key: jax.Array
    ) -> tuple[dict[str, Float32[jax.Array, " b"]], Float32[jax.Array, ""]]:
        module, loss = nnx.merge(self.graph, parameters), loss_of(self.model, self.objective, self.n_genes)

        def summed(weight: jax.Array) -> dict[str, jax.Array]:
            return loss(module, batch.replace(weight=weight), key)

        sums, change = jax.linearize(summed, batch.weight)
        ends = ("loss", "weight", "error", "share", "count")
        by_row = {
            # Each on its own: 0 times an infinite loss, in one pass for all, would make the counts NaN.
            name: jax.linear_transpose(lambda weight, name=name: change(weight)[name], batch.weight)(
                jnp.ones_like(of)
            )[0]
            for name, of in sums.items()
            if name.split("_")[-1] in ends
        }
        return by_row, sums["loss"]


@functools.lru_cache(maxsize=16)
def _compiled(sums: _SumsByRow) -> Callable[..., tuple[dict[str, jax.Array], jax.Array]]:
    return jax.jit(sums)


def held_out_errors(
    model: TrainedModel,
    corpus: Corpus,
    cells: Int64[np.ndarray, " n"],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutErrors:
    """Errors of a trained model on the masked genes of cells, summed by cell.

    Which genes are masked depends on `seed`, the cell, its counts and the rates of the objective, and on no
    other part of the run: not on its seed, k, size, batches or order of cells, nor on ``data.sample.decoder``
    and ``panel_limit``, which decide what else AIDO.Tissue decodes beside them. Nicheformer masks the genes
    that its sentences have room for: ``data.sample.length`` and what ranks the genes count there.

    Parameters
    ----------
    model
        A trained run, with `TrainedModel.with_neighbours` at another k.
    corpus
        With the model's vocabulary.
    cells
        Cell numbers.
    seed
        Of the mask: the same for all runs that are compared.
    progress
        Called with the number of cells done and in all.

    Returns
    -------
    Sums in float64 of each cell's float32 sums. A model that diverged has NaN.

    Raises
    ------
    InputError
        No cells, another vocabulary, or what the corpus lacks for the model: units, neighbours, means.
    """
    cells = np.asarray(cells, np.int64)
    if not len(cells):
        raise InputError(corpus.path, "no held-out cells were given", "name at least one")
    config = model.config
    make_task(config, corpus)  # raises where the corpus lacks what the model reads
    run = _compiled(_SumsByRow(model.graph, config.model, config.objective, len(model.vocabulary)))
    key, found, done = jax.random.key(seed), dict[str, np.ndarray](), 0
    for rows, batch in model.batches(corpus, cells, rates=config.objective.rates, seed=seed):
        by_row, whole = jax.device_get(run(model.parameters, batch, key))
        if np.isnan(whole) and np.isfinite(by_row["loss"]).all() and by_row["weight"].any():
            raise RuntimeError("the loader and the loss masked other genes")
        for name, values in by_row.items():
            found.setdefault(name, np.empty(len(cells)))[rows] = values[: len(rows)]
        done += len(rows)
        progress(done, len(cells))
    parts = {"loss": CellSums(found["loss"], found["weight"])}
    for name, values in found.items():
        what, _, kind = name.rpartition("_")
        if kind in ("error", "share"):
            parts[what] = CellSums(values, found[f"{what}_count"])
    return HeldOutErrors(cells, parts, seed, corpus.hash, measure_of(config))


def measure_of(config: RunConfig) -> dict[str, Any]:
    """What of a run decides the unit of its held-out loss and, beside the cells, which genes are masked.

    The family and the whole objective. For Nicheformer also what decides which genes a sentence holds; of the
    technology means only which kind they are, not their values.
    """
    measure = {
        "model": type(config.model).__name__,
        **{f"objective.{name}": value for name, value in asdict(config.objective).items()},
    }
    if isinstance(config.model, NicheformerConfig):
        sample = asdict(config.nicheformer()[1])
        measure |= {f"data.sample.{name}": sample[name] for name in ("length", "context", "means")}
    return json.loads(json.dumps(measure))


def check_comparable(first: RunConfig, other: RunConfig) -> None:
    """Raise InputError, which names the field, where held-out losses of two runs do not compare."""
    _check_alike(other.name, measure_of(first), measure_of(other))


def _check_alike(where: object, first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for name, value in first.items():
        if other.get(name) != value:
            raise InputError(
                where,
                f"{name} is {other.get(name)!r}, that of the run to compare with {value!r}",
                "compare losses of one measure only",
            )


def loss_and_error(
    errors: HeldOutErrors,
    block: Int[np.ndarray, " n"],
    *,
    part: str = "loss",
    draws: int = 1000,
    seed: int = 0,
) -> LossAndError:
    """The pooled loss (sum of losses over sum of weights) and its standard error, by a bootstrap over blocks.

    Neighbouring cells are alike, so blocks of tissue are drawn with replacement, not cells, and the pooled
    loss is computed anew (Efron & Tibshirani 1993, chapter 6). It is the error over tissue, not over training
    seeds.

    Parameters
    ----------
    block
        Spatial block of each of ``errors.cells``, unique over slides, as ``Split.block[errors.cells]``.
    part
        Of `HeldOutErrors.parts`.
    draws, seed
        Of the bootstrap.

    Warns
    -----
    DataWarning
        Below 10 blocks, where the error is too small.
    """
    _, code = np.unique(block, return_inverse=True)
    sums = np.stack([np.bincount(code, weights=values) for values in errors.parts[part]], axis=1)
    sums = sums[sums[:, 1] > 0]
    if len(sums) < 2:
        return LossAndError(errors.parts[part].mean, float("nan"))
    total, weight = (block_draws(len(sums), draws, seed) @ sums).T
    return LossAndError(errors.parts[part].mean, float((total / weight).std(ddof=1)))


def places_by_source(corpus: Corpus, cells: Int64[np.ndarray, " n"]) -> dict[str, Int64[np.ndarray, " m"]]:
    """Places in `cells` of those of each source file that has any, in the order of the corpus."""
    source = np.array([slide.source for slide in corpus.slides])[corpus.slide_of(cells)]
    names = dict.fromkeys(slide.source for slide in corpus.slides)
    return {name: at for name in names if len(at := np.flatnonzero(source == name))}


def loss_by_source(
    errors: HeldOutErrors,
    corpus: Corpus,
    block: Int[np.ndarray, " n"],
    *,
    part: str = "loss",
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, LossAndError]:
    """`loss_and_error` of the cells of each source file."""
    return {
        name: loss_and_error(errors.take(at), block[at], part=part, draws=draws, seed=seed)
        for name, at in places_by_source(corpus, errors.cells).items()
    }


def paired_loss(
    errors: HeldOutErrors,
    reference: HeldOutErrors,
    block: Int[np.ndarray, " n"],
    *,
    part: str = "loss",
    draws: int = 1000,
    seed: int = 0,
) -> Paired:
    """Loss of a run against that of a reference on the same cells and masked genes, with 95% intervals.

    The same blocks are drawn for both, see `scfm_jax.downstream.metrics.paired_bootstrap`; `block`, `part`,
    `draws` and `seed` are as in `loss_and_error`.

    Raises
    ------
    InputError
        Other cells, another corpus, mask or measure; fewer than two blocks.
    """
    if not np.array_equal(errors.cells, reference.cells):
        raise InputError("cells", "differ between the two runs", "evaluate both on the same held-out cells")
    about = [{"corpus": of.corpus, "seed": of.seed, **of.measure} for of in (reference, errors)]
    _check_alike("held-out errors", *about)
    return paired_bootstrap(errors.parts[part], reference.parts[part], block, n_draws=draws, seed=seed)
