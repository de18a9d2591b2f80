"""A trained run opened for use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from scfm_jax.corpus import Corpus
from scfm_jax.data.batch import Batch
from scfm_jax.data.loader import evaluation_batches
from scfm_jax.data.masks import MaskRates
from scfm_jax.data.ranks import RankConfig, TokenMask
from scfm_jax.data.tokens import EVALUATION_STEP
from scfm_jax.errors import InputError
from scfm_jax.models.functional import parameters_hash
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.training.run import Weights, restore_weights


class TrainedModel(Weights):
    """Weights of a run, with what feeds them cells."""

    @property
    def hash(self) -> str:
        """SHA-256 over the parameters, in the order of their names."""
        return parameters_hash(self.parameters)

    @property
    def coordinates(self) -> bool:
        """Whether it reads how far its neighbours lie, and not only which they are."""
        model = self.config.model
        return isinstance(model, TissueConfig) and model.positions == "coordinates"

    @property
    def width(self) -> int:
        """Features of a hidden state."""
        model = self.config.model
        return model.width if isinstance(model, NicheformerConfig) else model.encoder.width

    @property
    def neighbours(self) -> int:
        """k, the neighbours that it reads beside a cell."""
        sample = self.config.data.sample
        return sample.niche_neighbours if isinstance(sample, RankConfig) else sample.neighbours

    def with_neighbours(self, k: int) -> TrainedModel:
        """The same weights with `k` neighbours a cell.

        Raises
        ------
        InputError
            `k` is negative, or it is 0 of a sentence with a niche, or above 0 of one without.
        """
        sample = self.config.data.sample
        if k < 0 or (isinstance(sample, RankConfig) and (k > 0) != (sample.niche_neighbours > 0)):
            mend = "give 0 or more"
            if isinstance(sample, RankConfig):
                mend = (
                    "its sentence has a niche: give 1 or more, and use no way that embeds cells alone "
                    "(mean and neighbourhood do; in a suite, set attend = true)"
                    if sample.niche_neighbours
                    else "its sentence has no niche: give 0, or use a way that embeds cells alone (mean, "
                    "neighbourhood)"
                )
            raise InputError(
                self.config.name, f"cannot read {k} neighbours, it was made for {self.neighbours}", mend
            )
        changed = (
            replace(sample, niche_neighbours=k)
            if isinstance(sample, RankConfig)
            else replace(sample, neighbours=k)
        )
        return replace(self, config=replace(self.config, data=replace(self.config.data, sample=changed)))

    def batches(
        self,
        corpus: Corpus,
        cells: Int64[np.ndarray, " n"],
        *,
        rates: MaskRates | TokenMask | None,
        seed: int = 0,
    ) -> Iterator[tuple[Int64[np.ndarray, " b"], Batch]]:
        """Batches that hold each of `cells` once, under the evaluation mask of `seed`, or (None) under none.

        Raises
        ------
        InputError
            The corpus has another vocabulary than the model, or the run has no technology means to rank by.
        """
        sample = self.config.data.sample
        if isinstance(sample, RankConfig) and not sample.mean_files:
            raise InputError(
                self.config.name,
                "has no technology means, which rank a cell's genes",
                "import it again with --technology-means, or give the run its technology_means/ back",
            )
        if corpus.vocabulary.hash != self.vocabulary.hash:
            raise InputError(
                corpus.path,
                "has another vocabulary than the model",
                "build it with the run's vocabulary.json",
            )
        yield from evaluation_batches(
            corpus, cells, self.config.data, seed=seed, rates=rates, draw=EVALUATION_STEP
        )


def open_model(folder: Path, *, checkpoint: Literal["best", "last"] = "best") -> TrainedModel:
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
    return TrainedModel(**vars(restore_weights(folder, checkpoint)))
