"""What a model family brings to training: how to build it, what it reads, what it minimises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scfm_jax.corpus import Corpus
from scfm_jax.data.loader import Loader, evaluation_batches
from scfm_jax.data.mixture import slide_kinds
from scfm_jax.data.ranks import RankReader
from scfm_jax.data.stream import CellBlocks
from scfm_jax.data.tokens import EVALUATION_STEP
from scfm_jax.errors import InputError
from scfm_jax.models.attention import Asked, AttentionName, choose
from scfm_jax.models.nicheformer import Nicheformer, NicheformerConfig
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.objectives.column_masking import ColumnMaskingConfig, column_masking_loss
from scfm_jax.objectives.masked_genes import MaskedGenesConfig, masked_genes_loss
from scfm_jax.training.config import RunConfig
from scfm_jax.training.hosts import greatest_of_hosts


@dataclass(frozen=True)
class Learning:
    """What the step computes: a model and its loss, without the cells.

    Attributes
    ----------
    build
        Random streams to module.
    loss
        (module, batch, key) to sums over the batch, among them ``loss`` and ``weight``, whose ratio is
        minimised.
    drawn
        From cell numbers to how many there are of each kind of slide.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    loss: Callable[[Any, Any, jax.Array], dict[str, jax.Array]]
    drawn: Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Task(Learning):
    """A model family bound to a run and a corpus.

    Attributes
    ----------
    loader
        (training cells, host) to the loader.
    evaluation
        Cells to batches that hold each of them once, with the mask of a constant step.
    kinds
        Names of the kinds of slides.
    """

    loader: Callable[[np.ndarray | CellBlocks, tuple[int, int]], Loader]
    evaluation: Callable[[np.ndarray], Iterator[tuple[np.ndarray, Any]]]
    kinds: list[str]


def model_builder(run: RunConfig, n_genes: int) -> Callable[[nnx.Rngs], nnx.Module]:
    """Random streams to the module that `run` trains over a vocabulary of `n_genes`."""
    if isinstance(run.model, NicheformerConfig):
        niche_model, _, _ = run.nicheformer()
        return lambda rngs: Nicheformer(niche_model, n_genes, rngs=rngs)
    model, _, objective = run.tissue()
    return lambda rngs: TissueModel(model, n_genes, dispersion=objective.loss == "nb", rngs=rngs)


def loss_of(
    model: TissueConfig | NicheformerConfig, objective: ColumnMaskingConfig | MaskedGenesConfig, n_genes: int
) -> Callable[[Any, Any, jax.Array], dict[str, jax.Array]]:
    """(module, batch, key) to sums over the batch, of a run's model and objective."""
    if isinstance(objective, MaskedGenesConfig):
        return partial(masked_genes_loss, config=objective)
    coordinates = isinstance(model, TissueConfig) and model.positions == "coordinates"
    return partial(column_masking_loss, config=objective, n_genes=n_genes, coordinates=coordinates)


def attention_of(run: RunConfig, platform: str) -> AttentionName:
    """The implementation that a run's model attends by on a platform.

    Raises
    ------
    InputError
        It cannot do what the model asks, or what encoder and decoder ask differs.
    """
    model = run.model
    stacks = (model.encoder, model.decoder) if isinstance(model, TissueConfig) else (model,)
    chosen = [choose(model.attention, Asked(platform, model.dtype, stack.head_size)) for stack in stacks]
    if len(set(chosen)) > 1:
        raise InputError(
            "model.attention",
            f"auto is {chosen[0]} for the encoder's heads and {chosen[1]} for the decoder's",
            "name one that can do both, as plain, or change model.decoder.heads",
        )
    return chosen[0]


def make_learning(
    run: RunConfig, n_genes: int, slide_ends: np.ndarray, kind_of_slide: np.ndarray
) -> Learning:
    """What a step of `run` computes over a vocabulary of `n_genes`.

    Parameters
    ----------
    slide_ends, kind_of_slide
        The number of cells up to each slide's end, and the kind of each slide, counted from 0.
    """
    ends, of_slide = slide_ends.astype(np.uint32), kind_of_slide.astype(np.int32)
    return Learning(
        build=model_builder(run, n_genes),
        loss=loss_of(run.model, run.objective, n_genes),
        drawn=lambda cells: jnp.bincount(
            jnp.asarray(of_slide)[jnp.searchsorted(jnp.asarray(ends), cells, side="right")],
            length=int(of_slide.max()) + 1,
        ),
    )


def make_task(run: RunConfig, corpus: Corpus) -> Task:
    """The task of a run: its model's family bound to a corpus.

    Raises
    ------
    InputError
        Positions in um where the unit of a slide is not known, or a sentence longer than the positions.
    """
    objective = run.objective
    kinds, kind_of_slide = slide_kinds(corpus)
    if isinstance(run.model, NicheformerConfig):
        _check_sentences(run, corpus)
    else:
        _check_units(run, corpus)
    learning = make_learning(run, len(corpus.vocabulary), corpus.slide_starts[1:], kind_of_slide)
    return Task(
        build=learning.build,
        loss=learning.loss,
        drawn=learning.drawn,
        loader=lambda cells, host: Loader(
            corpus,
            cells,
            run.data,
            seed=run.seed,
            rates=objective.rates,
            host=host,
            exchange=greatest_of_hosts(),
        ),
        evaluation=lambda cells: evaluation_batches(
            corpus, cells, run.data, seed=run.seed, rates=objective.rates, draw=EVALUATION_STEP
        ),
        kinds=kinds,
    )


def _check_units(run: RunConfig, corpus: Corpus) -> None:
    """Positions in um want slides whose unit is known."""
    unknown = [
        slide.name
        for slide in corpus.slides
        if run.takes(slide.technology) and slide.spatial and slide.um_per_unit is None
    ]
    if run.tissue()[0].positions == "coordinates" and unknown:
        raise InputError(
            corpus.path,
            f"model.positions is in um but the unit of {unknown[0]!r} is not known",
            "build with --um-per-unit, or set model.positions to index",
        )


def _check_sentences(run: RunConfig, corpus: Corpus) -> None:
    """Sentences have room in the model, and every slide has what they are made from."""
    model, sample, _ = run.nicheformer()
    longest = max(sample.length, sample.niche_length if sample.niche_neighbours else 0)
    if longest > model.positions:
        raise InputError(
            run.name,
            f"data.sample makes sentences of {longest} tokens, model.positions is {model.positions}",
            "shorten the sentences or give the model more positions",
        )
    if sample.niche_neighbours and not model.niche:
        raise InputError(run.name, "data.sample reads niches, model.niche is off", "set model.niche to true")
    if model.niche and not sample.niche_neighbours:
        raise InputError(
            run.name, "model.niche is on, data.sample reads no niche", "set data.sample.niche_neighbours"
        )
    # What a slide lacks should be said before anything is written, and not when it is first read.
    taken = [number for number, slide in enumerate(corpus.slides) if run.takes(slide.technology)]
    RankReader(corpus, sample).know(np.array(taken))
