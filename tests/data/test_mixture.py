"""Sampling weights: fixed proportions, whole epochs within each weight, nothing carried from draw to draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scfm_jax.data.loader import DataConfig, Loader
from scfm_jax.data.mixture import PERIOD, MixedStreams, slide_kinds, slide_weights
from scfm_jax.data.ranks import RankConfig
from scfm_jax.data.stream import CellBlocks, ShardStreams
from scfm_jax.errors import InputError

CENTRES = np.arange(0, 6_400, 2)
BLOCKS = CellBlocks(np.arange(0, 6_400, 64), np.full(100, 0x5555_5555_5555_5555, np.uint64))
# A first kind of 1,600 cells, a second of 1,120 and a third of 480, which is left out.
WEIGHTS = np.repeat([1.0, 3.0, 0.0], [1_600, 1_120, 480])


def streams(seed: int = 0, weights: np.ndarray = WEIGHTS) -> MixedStreams:
    return MixedStreams(BLOCKS, weights[::32], n_shards=2, seed=seed, pool_blocks=4)


def test_proportions_are_fixed_in_every_period() -> None:
    share = 3 * 1_120 / (3 * 1_120 + 1_600)
    for shard in (0, 1):
        for period in (0, 1, 7):
            cells = streams().draw(shard, period * PERIOD, (period + 1) * PERIOD)
            kinds = WEIGHTS[cells // 2]
            assert abs((kinds == 3).sum() - share * PERIOD) <= 1 and (kinds > 0).all()
        # And nearly so in short runs: they are mixed, not behind one another.
        short = np.array([(WEIGHTS[streams().draw(shard, s, s + 256) // 2] == 3).mean() for s in (0, 900)])
        assert (abs(short - share) < 0.12).all()


def test_each_weight_goes_through_all_its_cells() -> None:
    mixed = streams()
    for shard in (0, 1):
        cells = mixed.draw(shard, 0, 6 * PERIOD)
        for weight in (1.0, 3.0):
            own = cells[WEIGHTS[cells // 2] == weight]
            counts = np.bincount(own // 2)[np.unique(own // 2)]
            assert counts.max() - counts.min() <= 1


def test_a_draw_is_the_sum_of_its_parts_in_any_order_of_asking() -> None:
    whole, mixed = streams().draw(1, 0, 3 * PERIOD), streams()
    random = np.random.default_rng(0)
    for _ in range(100):
        a, b, c = np.sort(random.integers(0, 3 * PERIOD, 3)).tolist()
        parts = [mixed.draw(1, b, c), mixed.draw(1, a, b)]
        assert np.array_equal(np.concatenate(parts[::-1]), whole[a:c])


def test_without_weights_it_is_the_plain_stream() -> None:
    plain = ShardStreams(BLOCKS, n_shards=2, seed=5, pool_blocks=4)
    mixed = streams(5, np.ones(len(CENTRES)))
    assert np.array_equal(mixed.draw(1, 100, 9_000), plain.draw(1, 100, 9_000))


def test_weights_of_slides_multiply_and_the_loader_draws_by_them(known: Any) -> None:
    corpus = known.corpus
    entries = ("modality=dissociated=6", "species=human=0.5")
    spatial = np.array([slide.spatial for slide in corpus.slides])
    weights = slide_weights(corpus, entries)
    assert weights.tolist() == np.where(spatial, 0.5, 3.0).tolist()
    config = DataConfig(sample=RankConfig(extra_assays=("sim",)), batch_size=16, window=32, weights=entries)
    cells = np.arange(corpus.n_cells)
    loader = Loader(corpus, cells, config, seed=0, rates=None)
    drawn = np.concatenate([loader.batch(step).index for step in range(PERIOD // 16)])
    dissociated = ~spatial[corpus.slide_of(np.arange(corpus.n_cells))]
    share = 6 * dissociated.sum() / (6 * dissociated.sum() + (~dissociated).sum())
    assert abs(dissociated[drawn].mean() - share) < 1e-3
    names, of_slide = slide_kinds(corpus)
    assert [names[kind] for kind in of_slide] == [
        "sim human spatial" if there else "sim human dissociated" for there in spatial
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("technology=sim", "cannot read"),
        ("technology=sim=-1", "cannot read"),
        ("technology=sim=nan", "cannot read"),
        ("organ=brain=2", "one of technology, species, modality, tissue"),
        ("technology=xenium=2", "no slide has that technology; there are sim"),
        ("tissue=brain=2", r"no slide has that tissue; there are \(none\)"),
    ],
)
def test_bad_weights(known: Any, entry: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        slide_weights(known.corpus, (entry,))


def test_a_small_weight_is_not_none() -> None:
    weights = np.repeat([1.0, 1e-9, 2.0], [1_600, 1_120, 480])
    drawn = streams(weights=weights).draw(0, 0, PERIOD)
    assert (weights[drawn // 2] == 1e-9).sum() == 1


def test_shards_do_not_draw_the_same_kind_in_the_same_place() -> None:
    mixed = streams()
    kinds = [WEIGHTS[mixed.draw(shard, 0, 512) // 2] for shard in (0, 1)]
    assert 0.3 < (kinds[0] == kinds[1]).mean() < 0.8


def test_weights_that_leave_nothing() -> None:
    with pytest.raises(InputError, match="leave no cell"):
        streams(weights=np.zeros(len(CENTRES)))
