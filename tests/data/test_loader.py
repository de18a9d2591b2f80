"""A batch is a function of (seed, step), on any number of hosts, and nothing is lost or seen twice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from scfm_jax.corpus import BLOCK, Corpus
from scfm_jax.data.batch import TissueBatch
from scfm_jax.data.loader import DataConfig, Loader, evaluation_batches
from scfm_jax.data.masks import MaskRates
from scfm_jax.data.tokens import SampleConfig, SampleReader
from scfm_jax.errors import DataWarning, InputError

RATES = MaskRates(nonzero=0.3, zero=0.05)
CONFIG = DataConfig(
    sample=SampleConfig(neighbours=3),
    batch_size=8,
    virtual_shards=4,
    window=4,
    rungs=3,
    pool_blocks=2,
    prefetch=2,
)
ONE_SHARD = dataclasses.replace(CONFIG, virtual_shards=1)
CONTROL = SampleConfig(neighbours=3, skip_nearest=2, exchanged_within=("cell_type",))
FIELDS = list(TissueBatch.__annotations__)


@pytest.fixture(scope="module")
def centres(known) -> np.ndarray:
    """Seven eighths of the cells, with gaps, as a split leaves them."""
    everything = np.arange(known.corpus.n_cells)
    return everything[everything % 8 != 3]


@pytest.fixture(scope="module")
def make(known, centres):
    def make(
        config: DataConfig = CONFIG, *, seed: int = 5, cells=centres, host=(0, 1), rates=RATES
    ) -> Loader:
        return Loader(known.corpus, cells, config, seed=seed, rates=rates, host=host)

    return make


def content(batch: TissueBatch) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name in FIELDS for a in [getattr(batch, name)]}


def tokens(batch: TissueBatch, row: int) -> list[tuple[int, ...]]:
    columns = (batch.genes[row], batch.counts[row], batch.cells[row], batch.slots[row])
    real = batch.cells[row] >= 0
    return sorted(zip(*(column[real].tolist() for column in columns)))


def test_a_batch_is_a_function_of_seed_and_step(make):
    loader = make()
    forward = [content(loader.batch(step)) for step in range(14)]
    order = np.random.default_rng(0).permutation(14).tolist()
    other = make()
    assert all(content(other.batch(step)) == forward[step] for step in order)
    assert content(make().batch(13)) == forward[13]
    assert all(content(loader.batch(step)) == forward[step] for step in (0, 13))
    assert len({batch["index"] for batch in forward}) == 14


@pytest.mark.parametrize("start", [0, 3, 9])
def test_iterating_from_a_step_gives_the_batches_of_the_steps(make, start):
    loader = make()
    batches = [content(batch) for batch in make().iterate(start, 12)]
    assert batches == [content(loader.batch(step)) for step in range(start, 12)]


def test_another_seed_draws_other_cells_in_the_same_shapes(make):
    one, other = make(), make(seed=6)
    assert one.ladders == other.ladders
    assert not np.array_equal(one.batch(0).index, other.batch(0).index)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_make_the_batch_of_one(make, hosts):
    whole = make()
    parts = [make(host=(number, hosts)) for number in range(hosts)]
    for step in (0, 5, 6):
        batches = [part.batch(step) for part in parts]
        assert {batch.genes.shape[0] for batch in batches} == {CONFIG.batch_size // hosts}
        joined = TissueBatch(**{name: np.concatenate([getattr(b, name) for b in batches]) for name in FIELDS})
        assert content(joined) == content(whole.batch(step))


def test_an_epoch_sees_every_cell_once(make, centres):
    per_window = ONE_SHARD.window * ONE_SHARD.batch_size
    some = centres[: len(centres) // per_window * per_window]
    loader, steps = make(ONE_SHARD, cells=some), len(some) // ONE_SHARD.batch_size
    assert len(some) == steps * ONE_SHARD.batch_size
    for epoch in range(2):
        seen = [loader.batch(step).index for step in range(epoch * steps, (epoch + 1) * steps)]
        assert np.array_equal(np.sort(np.concatenate(seen)), some)


def test_no_cell_of_a_shard_falls_behind_the_others_of_its_shard(make, known, centres):
    loader, rows = make(), CONFIG.batch_size // CONFIG.virtual_shards
    steps = 3 * len(centres) // CONFIG.batch_size // CONFIG.window * CONFIG.window
    drawn = np.stack([loader.batch(step).index for step in range(steps)]).reshape(
        steps, CONFIG.virtual_shards, rows
    )
    shards = [np.unique(drawn[:, shard], return_counts=True) for shard in range(CONFIG.virtual_shards)]
    assert np.array_equal(np.sort(np.concatenate([cells for cells, _ in shards])), centres)
    assert all(np.ptp(times) <= 1 for _, times in shards)
    blocks = [set(known.corpus.block_of(cells)) for cells, _ in shards]
    assert sum(map(len, blocks)) == len(set().union(*blocks))


def test_blocks_are_those_of_the_corpus(known):
    truth, number = [], 0
    for slide in known.corpus.slides:
        for start in range(0, slide.n_cells, BLOCK):
            truth += [number] * min(BLOCK, slide.n_cells - start)
            number += 1
    everything = np.arange(known.corpus.n_cells)
    assert known.corpus.block_of(everything).tolist() == truth
    assert known.corpus.block_of(everything[::7]).tolist() == truth[::7]


@pytest.mark.parametrize("sample", [CONFIG.sample, CONTROL], ids=["plain", "control"])
def test_rows_are_the_samples_of_their_cells_whole(make, known, sample):
    """Reading them again would fail on a length that does not hold them."""
    loader = make(dataclasses.replace(CONFIG, sample=sample))
    reader = SampleReader(known.corpus, sample)
    for step in range(6):
        batch = loader.batch(step)
        assert batch.genes.shape[1] in loader.ladders[0].rungs
        assert batch.decoder_genes.shape[1] in loader.ladders[1].rungs
        assert len(set(batch.draw)) == 1 and (batch.weight == 1).all()
        truth = reader.read(
            batch.index.astype(np.int64), draw=int(batch.draw[0]), seed=5, rates=RATES
        ).collate(np.arange(8), batch.genes.shape[1], batch.decoder_genes.shape[1], 8)
        assert content(truth) == content(batch)


def test_every_cell_gets_a_new_mask_in_the_next_epoch(make, centres):
    some = centres[:64]
    loader = make(ONE_SHARD, cells=some)
    first, second = (
        {
            int(cell): tokens(batch, row)
            for step in steps
            for batch in [loader.batch(step)]
            for row, cell in enumerate(batch.index)
        }
        for steps in (range(8), range(8, 16))
    )
    assert first.keys() == second.keys() == set(some.tolist())
    assert np.mean([first[cell] == second[cell] for cell in first]) < 0.05


def test_sorting_a_window_pads_less_than_rows_as_they_come(make):
    wide = dataclasses.replace(CONFIG, window=16)
    loader, plain = make(wide), make(dataclasses.replace(CONFIG, window=1, rungs=3))
    fill = [
        np.mean(np.concatenate([(each.batch(step).cells >= 0).ravel() for step in range(16)]))
        for each in (loader, plain)
    ]
    assert fill[0] > fill[1]


def evaluate(
    known, cells, k: int, *, batch_size: int = 8, like: SampleConfig = CONFIG.sample
) -> dict[int, tuple[TissueBatch, int]]:
    sample = dataclasses.replace(like, neighbours=k, panel_limit=20)
    config = dataclasses.replace(CONFIG, sample=sample, batch_size=batch_size)
    batches = list(evaluation_batches(known.corpus, cells, config, seed=5, rates=RATES, draw=2**32 - 1))
    found = {}
    for place, batch in batches:
        assert batch.genes.shape[0] == batch_size
        assert batch.weight.tolist() == [1] * len(place) + [0] * (batch_size - len(place))
        assert np.array_equal(batch.index[: len(place)], cells[place])
        for row, where in enumerate(place):
            assert int(where) not in found
            found[int(where)] = (batch, row)
    assert sum(len(place) < batch_size for place, _ in batches) <= 1
    assert sorted(found) == list(range(len(cells)))
    return found


def test_evaluation_sees_every_cell_once_under_one_mask_whatever_the_context(known, centres):
    cells = centres[5:218:2]  # no multiple of the batch, nor of the window
    alone, tissue, bigger, control = (
        evaluate(known, cells, 0),
        evaluate(known, cells, 3),
        evaluate(known, cells, 3, batch_size=16),
        evaluate(known, cells, 3, like=CONTROL),
    )
    for where in range(len(cells)):
        views = []
        for batch, row in (alone[where], tissue[where], bigger[where], control[where]):
            # Over the panel limit only expressed and masked genes are decoded: together they tell the mask.
            listed = batch.decoder_genes[row] >= 0
            own = [token for token in tokens(batch, row) if token[2] == 0]
            views.append(
                (own, batch.decoder_genes[row][listed].tolist(), batch.decoder_counts[row][listed].tolist())
            )
        assert views[0] == views[1] == views[2] == views[3]
        assert tokens(*tissue[where]) == tokens(*bigger[where])
    assert any(len(tokens(*tissue[w])) > len(tokens(*alone[w])) for w in range(len(cells)))
    assert any(tokens(*tissue[w]) != tokens(*control[w]) for w in range(len(cells)))


def test_evaluation_of_an_unordered_list_keeps_its_places(known, centres):
    evaluate(known, np.random.default_rng(0).permutation(centres)[:37], 3)


def test_shards_that_do_not_divide_the_batch_are_an_error():
    with pytest.raises(InputError, match=r"data.virtual_shards: 3 does not divide data.batch_size, 8"):
        DataConfig(batch_size=8, virtual_shards=3)


def test_hosts_that_do_not_divide_the_shards_are_an_error(make):
    with pytest.raises(InputError, match=r"data.virtual_shards: 3 hosts do not divide 4 shards"):
        make(host=(0, 3))


def test_more_neighbours_than_stored_is_an_error(make):
    with pytest.raises(InputError, match=r"data.sample.neighbours is 9, the corpus stores 8"):
        make(dataclasses.replace(CONFIG, sample=SampleConfig(neighbours=9)))


def test_no_cells_is_an_error(make):
    with pytest.raises(InputError, match="no cell to train on"):
        make(cells=np.empty(0, np.int64))


def test_fewer_blocks_than_shards_is_an_error(make, centres):
    with pytest.raises(InputError, match="4 shards but the training cells lie in 1 blocks"):
        make(cells=centres[:30])


def test_a_cache_too_small_for_the_pools_is_warned_of(known, centres):
    small = Corpus.open(known.corpus.path, cache_bytes=10_000)
    with pytest.warns(DataWarning, match=r"the pools of 4 shards take .* lower data.pool_blocks"):
        Loader(small, centres, CONFIG, seed=5, rates=RATES)
