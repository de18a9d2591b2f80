"""A trained run opened for use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.data.batch import TissueBatch
from scfm_jax.data.loader import evaluation_batches
from scfm_jax.data.masks import MaskRates
from scfm_jax.data.tokens import EVALUATION_STEP
from scfm_jax.errors import InputError
from scfm_jax.genes import Vocabulary
from scfm_jax.models.functional import Parameters, abstract
from scfm_jax.models.tissue import TissueModel
from scfm_jax.training.checkpoint import Checkpoints, abstract_state
from scfm_jax.training.config import RunConfig
from scfm_jax.training.mesh import make_mesh, replicated
from scfm_jax.training.optimiser import make_optimiser
from scfm_jax.training.train import read_run


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """Parameters of a run, and all that is needed to feed them.

    Attributes
    ----------
    config
        The run's.
    vocabulary
        Genes that the model knows, in the order of its table.
    graph, parameters
        For `nnx.merge`.
    step
        Of the checkpoint.
    """

    config: RunConfig
    vocabulary: Vocabulary
    graph: nnx.GraphDef
    parameters: Parameters
    step: int

    @property
    def hash(self) -> str:
        """SHA-256 over the parameters, in the order of their names."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.parameters):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    @property
    def coordinates(self) -> bool:
        return self.config.model.positions == "coordinates"

    def batches(
        self, corpus: Corpus, cells: Int64[np.ndarray, " n"], *, rates: MaskRates | None, seed: int = 0
    ) -> Iterator[tuple[Int64[np.ndarray, " b"], TissueBatch]]:
        """Batches that hold each of `cells` once, under the evaluation mask of `seed`, or (None) under none.

        Raises
        ------
        InputError
            The corpus has another vocabulary than the model.
        """
        if corpus.vocabulary.hash != self.vocabulary.hash:
            raise InputError(
                corpus.path,
                "has another vocabulary than the model",
                "build it with the run's vocabulary.json",
            )
        yield from evaluation_batches(
            corpus, cells, self.config.data, seed=seed, rates=rates, draw=EVALUATION_STEP
        )


def open_model(folder: Path, *, checkpoint: str = "best") -> TrainedModel:
    """Open a run directory.

    Parameters
    ----------
    folder
        What `scfm train` wrote.
    checkpoint
        ``best`` by held-out loss, or ``last``.

    Raises
    ------
    InputError
        No run there, or one without a checkpoint.
    """
    config, _ = read_run(folder)
    vocabulary = Vocabulary.from_dict(json.loads((folder / "vocabulary.json").read_text()))
    graph, shapes, names = abstract(
        lambda rngs: TissueModel(
            config.model, len(vocabulary), dispersion=config.objective.loss == "nb", rngs=rngs
        )
    )
    place = replicated(make_mesh(type(config.mesh)()))
    moments = jax.eval_shape(make_optimiser(config.optimiser, names).init, shapes)
    state = {"parameters": shapes, "optimiser": moments, "step": jax.ShapeDtypeStruct((), np.int32)}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.best if checkpoint == "best" else checkpoints.latest
        if step is None:
            raise InputError(folder, "has no checkpoint yet", "train it first")
        restored = checkpoints.restore(step, abstract_state(state, jax.tree.map(lambda _: place, state)))
    return TrainedModel(config, vocabulary, graph, restored["parameters"], step)


def pooled(
    hidden: Float32[jax.Array, "b s d"], chosen: Float32[jax.Array, "b s"], pooling: str
) -> Float32[jax.Array, "b d"]:
    """Mean or maximum of the `chosen` tokens (1 or 0); zeros for a row without any."""
    if pooling == "max":
        highest = jax.numpy.where(chosen[..., None] > 0, hidden, -jax.numpy.inf).max(1)
        return jax.numpy.where(chosen.sum(1, keepdims=True) > 0, highest, 0.0)
    return (hidden * chosen[..., None]).sum(1) / jax.numpy.maximum(chosen.sum(1, keepdims=True), 1.0)
