"""Streams: whole epochs, nothing carried from draw to draw."""

from __future__ import annotations

import numpy as np
import pytest

from scfm_jax.data.stream import CellBlocks, ShardStreams
from scfm_jax.errors import InputError

N_SHARDS, POOL = 3, 4
# Blocks of unequal sizes, and cell numbers with gaps: what a split leaves.
BLOCKS = np.repeat(np.arange(20) * 2, np.random.default_rng(0).integers(1, 12, 20))
CENTRES = np.cumsum(np.random.default_rng(1).integers(1, 5, len(BLOCKS)))
_FIRST = CENTRES[np.flatnonzero(np.diff(BLOCKS, prepend=-1))]
CELLS = CellBlocks(
    _FIRST,
    np.array(
        [sum(1 << int(c - first) for c in CENTRES[2 * n == BLOCKS]) for n, first in enumerate(_FIRST)],
        np.uint64,
    ),
)


def streams(seed: int = 0, n_shards: int = N_SHARDS, pool_blocks: int = POOL) -> ShardStreams:
    return ShardStreams(CELLS, n_shards=n_shards, seed=seed, pool_blocks=pool_blocks)


@pytest.mark.parametrize("n_shards", [1, 3, 20])
def test_shards_share_out_the_cells(n_shards):
    dealt = streams(n_shards=n_shards)
    assert sum(dealt.sizes) == len(CENTRES)
    drawn = [dealt.draw(shard, 0, size) for shard, size in enumerate(dealt.sizes)]
    assert np.array_equal(np.sort(np.concatenate(drawn)), CENTRES)


def test_every_epoch_visits_every_cell_of_the_shard_once():
    dealt = streams()
    for shard, size in enumerate(dealt.sizes):
        first, *later = (np.sort(dealt.draw(shard, e * size, (e + 1) * size)) for e in range(4))
        assert len(np.unique(first)) == size
        assert all(np.array_equal(epoch, first) for epoch in later)


def test_a_draw_is_the_sum_of_its_parts_in_any_order_of_asking():
    whole = [streams().draw(shard, 0, 5 * len(CENTRES)) for shard in range(N_SHARDS)]
    dealt, rng = streams(), np.random.default_rng(2)
    for _ in range(200):
        shard = int(rng.integers(N_SHARDS))
        a, b, c = np.sort(rng.integers(0, 5 * len(CENTRES), 3)).tolist()
        parts = [dealt.draw(shard, b, c), dealt.draw(shard, a, b)]
        assert np.array_equal(np.concatenate(parts[::-1]), whole[shard][a:c])
    assert dealt.draw(0, 9, 9).shape == (0,)


def test_epochs_shards_and_seeds_have_orders_of_their_own():
    size = streams(n_shards=1).sizes[0]
    first, second = (streams(n_shards=1).draw(0, e * size, (e + 1) * size) for e in (0, 1))
    other = streams(seed=1, n_shards=1).draw(0, 0, size)
    for a, b in ((first, second), (first, other), (first, CENTRES)):
        assert np.mean(a == b) < 0.1
    assert set(streams().draw(0, 0, streams().sizes[0])) != set(
        streams(seed=1).draw(0, 0, streams(seed=1).sizes[0])
    )


def test_cells_are_mixed_within_a_pool_of_blocks_and_no_farther():
    block_of = dict(zip(CENTRES.tolist(), BLOCKS.tolist()))
    size = streams(n_shards=1).sizes[0]
    blocks = [block_of[cell] for cell in streams(n_shards=1).draw(0, 0, size).tolist()]
    seen, start = [], 0
    while start < size:  # a pool ends where as many cells as its blocks hold have come
        pool: set[int] = set()
        stop = start
        while stop < size and (len(pool) < POOL or blocks[stop] in pool):
            pool.add(blocks[stop])
            stop += 1
        assert stop - start == sum(np.sum(block == BLOCKS) for block in pool)
        seen.append(pool)
        start = stop
    assert sum(map(len, seen)) == 20 and {len(pool) for pool in seen} == {POOL}
    assert len(set(blocks[:10])) > 2


def test_every_epoch_pools_other_blocks():
    block_of = dict(zip(CENTRES.tolist(), BLOCKS.tolist()))
    dealt = streams(n_shards=1)
    size = dealt.sizes[0]
    first_pools = {
        frozenset(block_of[cell] for cell in dealt.draw(0, epoch * size, epoch * size + 10).tolist())
        for epoch in range(6)
    }
    # With one order of blocks, the first ten cells of every epoch would lie in the same four.
    assert len(frozenset().union(*first_pools)) > 2 * POOL


def test_fewer_blocks_than_shards_is_an_error_that_says_how_many_there_are():
    with pytest.raises(
        InputError, match=r"data.virtual_shards: 21 shards but .* 20 blocks of 64; set it to 20 or less"
    ):
        streams(n_shards=21)


def test_the_order_is_the_one_that_the_text_says():
    """Stated plainly, with a list of cells for each block."""
    seed, n_shards, pool_blocks = 3, 2, 4
    cells = [CENTRES[block == BLOCKS] for block in np.unique(BLOCKS)]
    dealt = np.random.default_rng([seed, 0]).permutation(len(cells))
    made = streams(seed, n_shards, pool_blocks)
    for shard in range(n_shards):
        expected = []
        for epoch in range(3):
            order = np.random.default_rng([seed, 1, shard, epoch]).permutation(dealt[shard::n_shards])
            for pool, start in enumerate(range(0, len(order), pool_blocks)):
                of_pool = np.concatenate([cells[block] for block in order[start : start + pool_blocks]])
                expected.append(np.random.default_rng([seed, 2, shard, epoch, pool]).permutation(of_pool))
        expected = np.concatenate(expected)
        np.testing.assert_array_equal(made.draw(shard, 0, len(expected)), expected)


@pytest.mark.parametrize("as_mask", [False, True])
def test_chosen_cells_are_found_again(known, as_mask):
    n_cells = known.corpus.n_cells
    for share in (0.0, 0.01, 0.4, 1.0):
        is_chosen = np.random.default_rng(7).random(n_cells) < share
        numbers = np.flatnonzero(is_chosen)
        cells = CellBlocks.of(known.corpus, is_chosen if as_mask else numbers)
        assert len(cells) == len(numbers)
        np.testing.assert_array_equal(cells.numbers(), numbers)
        places = np.random.default_rng(8).integers(0, max(len(numbers), 1), 50)[: len(numbers)]
        np.testing.assert_array_equal(cells.at(places), numbers[places])
        blocks = known.corpus.block_of(numbers)
        np.testing.assert_array_equal(known.corpus.block_of(cells.first), np.unique(blocks))
        np.testing.assert_array_equal(np.bitwise_count(cells.bits), np.unique(blocks, return_counts=True)[1])
        some = np.arange(len(cells.first)) % 3 == 0
        kept = np.isin(blocks, np.unique(blocks)[some])
        np.testing.assert_array_equal(cells.only(some).numbers(), numbers[kept])


@pytest.mark.parametrize("cells", [[3, 1], [1, 1], [-1, 2], [10**6]])
def test_cells_that_do_not_ascend_or_are_not_there_are_an_error(known, cells):
    with pytest.raises(ValueError, match="do not ascend, or lie outside"):
        CellBlocks.of(known.corpus, np.array(cells))
