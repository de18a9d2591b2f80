"""What a model family brings to training: how to build it, what it reads, what it minimises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any

import jax
import numpy as np
from flax import nnx

from scfm_jax.corpus import Corpus
from scfm_jax.data.loader import TissueLoader, evaluation_batches
from scfm_jax.data.tokens import EVALUATION_STEP
from scfm_jax.errors import InputError
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.objectives.column_masking import column_masking_loss
from scfm_jax.training.config import RunConfig


@dataclass(frozen=True)
class Task:
    """A model family bound to a run and a corpus.

    Attributes
    ----------
    build
        Random streams to module.
    loss
        (module, batch, key) to sums over the batch, among them ``loss`` and ``weight``, whose ratio is
        minimised.
    loader
        (training cells, host) to the loader.
    evaluation
        Cells to batches that hold each of them once, with the mask of a constant step.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    loss: Callable[[Any, Any, jax.Array], dict[str, jax.Array]]
    loader: Callable[[np.ndarray, tuple[int, int]], TissueLoader]
    evaluation: Callable[[np.ndarray], Iterator[tuple[np.ndarray, Any]]]


def model_builder(run: RunConfig, n_genes: int) -> Callable[[nnx.Rngs], nnx.Module]:
    """Random streams to the module that `run` trains over a vocabulary of `n_genes`."""
    return lambda rngs: TissueModel(run.model, n_genes, dispersion=run.objective.loss == "nb", rngs=rngs)


@singledispatch
def make_task(model: Any, run: RunConfig, corpus: Corpus) -> Task:
    """The task of a model config; each family registers its own."""
    raise TypeError(f"no model family is registered for {type(model).__name__}")


@make_task.register
def _(model: TissueConfig, run: RunConfig, corpus: Corpus) -> Task:
    if model.positions == "coordinates":
        unknown = [
            slide.name
            for slide in corpus.slides
            if run.takes(slide.technology) and slide.spatial and slide.um_per_unit is None
        ]
        if unknown:
            raise InputError(
                corpus.path,
                f"model.positions is in um but the unit of {unknown[0]!r} is not known",
                "build with --um-per-unit, or set model.positions to index",
            )
    n_genes, objective = len(corpus.vocabulary), run.objective
    return Task(
        build=model_builder(run, n_genes),
        loss=partial(
            column_masking_loss,
            config=objective,
            n_genes=n_genes,
            coordinates=model.positions == "coordinates",
        ),
        loader=lambda cells, host: TissueLoader(
            corpus, cells, run.data, seed=run.seed, rates=objective.rates, host=host
        ),
        evaluation=lambda cells: evaluation_batches(
            corpus, cells, run.data, seed=run.seed, rates=objective.rates, draw=EVALUATION_STEP
        ),
    )
