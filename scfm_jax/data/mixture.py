"""How much of each kind of slide a training run draws.

Weights multiply the chance of a slide's cells; without any, all cells are drawn alike, so that a technology
counts by its number of cells. Proportions are fixed, not drawn: every `PERIOD` positions of a shard's stream
hold the same number of cells of each weight, one at least, so where a position leads stays a function of
(seed, shard, position).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.reader import Slide
from scfm_jax.data.stream import CellBlocks, ShardStreams
from scfm_jax.errors import InputError

PERIOD = 16_384
_ORDER = 4  # beside the purposes of `stream` and `loader`


def kind_of(slide: Slide) -> dict[str, str]:
    """What sampling weights tell slides apart by."""
    return {
        "technology": slide.technology,
        "species": slide.species,
        "modality": slide.modality,
        "tissue": slide.tissue,
    }


def slide_kinds(corpus: Corpus) -> tuple[list[str], Int64[np.ndarray, " slides"]]:
    """Names of the kinds of slides that there are, and the kind of each slide."""
    named = [" ".join(filter(None, kind_of(slide).values())) for slide in corpus.slides]
    kinds, of_slide = np.unique(named, return_inverse=True)
    return kinds.tolist(), of_slide.astype(np.int64)


def slide_weights(corpus: Corpus, entries: Sequence[str]) -> Float64[np.ndarray, " slides"]:
    """The weight of each slide: the product of those that name it, 1 where none does.

    Parameters
    ----------
    entries
        ``field=value=weight``, with a field of `kind_of`: ``"technology=merfish=2"``.

    Raises
    ------
    InputError
        An entry that cannot be read, or one that no slide has.
    """
    weights = np.ones(len(corpus.slides))
    kinds = [kind_of(slide) for slide in corpus.slides]
    for entry in entries:
        field, _, rest = entry.partition("=")
        value, _, number = rest.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if field not in kinds[0] or not 0 <= weight < float("inf"):
            raise InputError(
                "data.weights",
                f"cannot read {entry!r}",
                f"write FIELD=VALUE=WEIGHT: one of {', '.join(kinds[0])}, and 0 or more",
            )
        named = np.array([kind[field] == value for kind in kinds])
        if not named.any():
            known = ", ".join(sorted({kind[field] or "(none)" for kind in kinds}))
            raise InputError("data.weights", f"{entry!r}: no slide has that {field}", f"there are {known}")
        weights[named] *= weight
    return weights


class MixedStreams:
    """Streams of all virtual shards, in which cells of each weight come in fixed proportions.

    Parameters
    ----------
    cells, n_shards, seed, pool_blocks
        As of `ShardStreams`.
    weights
        Of each block of `cells`; 0 leaves it out. None: all alike.

    Raises
    ------
    InputError
        No cell has a weight, or the cells of one weight lie in fewer blocks than there are shards.
    """

    def __init__(
        self,
        cells: CellBlocks,
        weights: Float64[np.ndarray, " blocks"] | None,
        *,
        n_shards: int,
        seed: int,
        pool_blocks: int,
    ) -> None:
        if weights is None:
            kinds, groups = np.ones(1), [cells]
        else:
            kinds = np.unique(weights[weights > 0])
            groups = [cells.only(weights == weight) for weight in kinds]
        if not len(kinds):
            raise InputError("data.weights", "leave no cell to train on", "raise one of them")
        self._streams = [
            ShardStreams(group, n_shards=n_shards, seed=seed, pool_blocks=pool_blocks) for group in groups
        ]
        mass = np.array([weight * sum(s.sizes) for weight, s in zip(kinds, self._streams, strict=True)])
        pattern = np.repeat(np.arange(len(kinds)), _share_out(mass, PERIOD))
        self._pattern = np.random.default_rng([seed, _ORDER]).permutation(pattern)
        self._n_shards = n_shards
        self._per_period = np.bincount(self._pattern, minlength=len(kinds))
        one_hot = self._pattern[:, None] == np.arange(len(kinds))
        self._before = np.concatenate([np.zeros((1, len(kinds)), np.int64), one_hot.cumsum(0)])

    def draw(self, shard: int, start: int, stop: int) -> Int64[np.ndarray, " m"]:
        """Cells at positions `start` to `stop` of a shard's stream."""
        # Shards start at places of their own in the pattern, so that a step does not draw one kind in all.
        turned = shard * PERIOD // self._n_shards
        kinds = self._pattern[np.arange(start + turned, stop + turned) % PERIOD]
        cells = np.empty(stop - start, np.int64)
        first, last = (self._count(position + turned) - self._count(turned) for position in (start, stop))
        for kind, streams in enumerate(self._streams):
            cells[kinds == kind] = streams.draw(shard, int(first[kind]), int(last[kind]))
        return cells

    def _count(self, position: int) -> Int64[np.ndarray, " kinds"]:
        """Cells of each weight before a position of the pattern."""
        return position // PERIOD * self._per_period + self._before[position % PERIOD]


def _share_out(mass: Float64[np.ndarray, " n"], places: int) -> Int64[np.ndarray, " n"]:
    """Places in proportion to `mass`, by largest remainder; none is left without."""
    exact = mass / mass.sum() * places
    shares = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (left := places - int(shares.sum())) != 0:
        kind = np.argmax(exact - shares if left > 0 else (shares - exact) * (shares > 1))
        shares[kind] += np.sign(left)
    return shares
