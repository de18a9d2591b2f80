"""Samples against a plain statement of them; masks by jax's Threefry and scikit-learn's hash."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from sklearn.utils import murmurhash3_32

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.context import Context
from scfm_jax.corpus.subset import unique_cells
from scfm_jax.data.batch import TissueBatch
from scfm_jax.data.masks import MaskRates
from scfm_jax.data.tokens import EVALUATION_STEP, Ragged, SampleConfig, SampleReader
from scfm_jax.errors import InputError

RATES = MaskRates(nonzero=0.4, zero=0.1)
SEED, DRAW = 3, 17
# 45 and 40 genes were measured: with the depth tokens the first panel exceeds it, the second just does not.
LIMIT = 42
LABELS = ("cell_type", "domain")
EXCHANGED = SampleConfig(neighbours=3, skip_nearest=1, exchanged_within=LABELS)


@pytest.fixture(scope="module")
def centres(known) -> np.ndarray:
    """Some cells of every slide, all those of the small ones, one of them twice, in no order."""
    rng = np.random.default_rng(0)
    chosen = [
        rng.choice(np.flatnonzero(known.slide == s), min(25, np.sum(known.slide == s)), False)
        for s in range(4)
    ]
    return rng.permutation(np.concatenate([*chosen, chosen[0][:1]]))


def read(
    known, centres, config: SampleConfig, rates: MaskRates | None = RATES, draw: int = DRAW
) -> TissueBatch:
    samples = SampleReader(known.corpus, config).read(centres, draw=draw, seed=SEED, rates=rates)
    width, decoded = samples.tokens.lengths.max() + 3, samples.decoder.lengths.max() + 2
    return samples.collate(np.arange(len(centres)), width, decoded, len(centres))


def masks(known, centres: np.ndarray, rates: MaskRates | None, draw: int = DRAW) -> np.ndarray:
    """Which of the vocabulary's genes are masked in each sample."""
    counts = known.counts[centres]
    if rates is None:
        return np.zeros(counts.shape, bool)
    n_genes = counts.shape[1]
    key, genes = jax.random.key_data(jax.random.key(SEED)), np.arange(n_genes, dtype=np.int32)
    steps = np.stack([np.full(len(centres), draw), centres], axis=1).astype(np.uint32)
    keys = jax.vmap(lambda step: threefry_2x32(threefry_2x32(key, step), jnp.zeros(2, jnp.uint32)))(steps)
    bits = [murmurhash3_32(genes, seed=int(word), positive=True) for word in np.asarray(keys)[:, 0]]
    uniform = np.array(bits) / 2**32
    return np.where(counts > 0, uniform < rates.nonzero, uniform < rates.zero) & (counts >= 0)


def sample(known, centre: int, masked: np.ndarray, config: SampleConfig) -> dict[str, Any]:
    """One sample, as the documentation says it."""
    n_genes, own = known.counts.shape[1], known.counts[centre]
    measured = np.flatnonzero(own >= 0)
    decoded = np.arange(n_genes)
    if config.decoder == "panel":
        decoded = measured
        if len(measured) + 2 > config.panel_limit:
            decoded = np.flatnonzero((own > 0) | masked)
    decoder_genes = [*decoded.tolist(), n_genes, n_genes + 1]
    skipped = config.skip_nearest
    members = [centre, *known.nearest[centre, skipped : skipped + config.neighbours].tolist()]
    shown = members
    if config.exchanged_within:
        context = Context(
            known.corpus, config.neighbours, skip_nearest=skipped, exchanged_within=config.exchanged_within
        )
        (shown,) = context.members(np.array([centre]))[1].tolist()
    tokens = set()
    for cell, member in enumerate(shown):
        if member < 0:
            continue
        for gene in [*np.flatnonzero((known.counts[member] > 0) & ~masked).tolist(), n_genes, n_genes + 1]:
            count = int(known.counts[member, gene]) if gene < n_genes else 0
            slot = decoder_genes.index(gene) if gene in decoder_genes else -1
            tokens.add((gene, count, cell, slot))
    return {
        "tokens": tokens,
        "decoder": list(zip(decoder_genes, [*own[decoded].tolist(), -1, -1])),
        "totals": [int(known.counts[m].clip(0).sum()) if m >= 0 else 0 for m in shown],
        "offsets": [
            known.places[m] - known.places[centre]
            if m >= 0 and np.isfinite(known.places[m]).all()
            else [0, 0]
            for m in members
        ],
    }


@pytest.mark.parametrize("rates", [RATES, None], ids=["masked", "unmasked"])
@pytest.mark.parametrize("decoder", ["panel", "limit", "vocabulary"])
@pytest.mark.parametrize("k", [0, 3, "after 2", "exchanged"])
def test_samples_hold_what_the_files_say(known, centres, k, decoder, rates):
    around = {"after 2": SampleConfig(neighbours=3, skip_nearest=2), "exchanged": EXCHANGED}
    config = replace(
        around[k] if k in around else SampleConfig(neighbours=k),
        decoder="vocabulary" if decoder == "vocabulary" else "panel",
        panel_limit=2_048 if decoder == "panel" else LIMIT,
    )
    batch = read(known, centres, config, rates)
    masked = masks(known, centres, rates)
    assert masked.any() == (rates is not None)
    medians = [np.median(known.counts[known.slide == s].clip(0).sum(1)) for s in range(4)]
    for row, centre in enumerate(centres):
        truth = sample(known, centre, masked[row], config)
        real = batch.cells[row] >= 0
        found = list(
            zip(
                *(
                    column[row][real].tolist()
                    for column in (batch.genes, batch.counts, batch.cells, batch.slots)
                )
            )
        )
        assert len(found) == len(set(found)) and set(found) == truth["tokens"]
        listed = batch.decoder_genes[row] >= 0
        pairs = zip(batch.decoder_genes[row][listed].tolist(), batch.decoder_counts[row][listed].tolist())
        assert list(pairs) == truth["decoder"]
        assert batch.totals[row].tolist() == truth["totals"]
        np.testing.assert_allclose(batch.offsets[row], truth["offsets"], atol=1e-3)  # um
        # Padding is on the right and says so in every column.
        for flags in (real, listed):
            assert np.array_equal(flags, np.sort(flags)[::-1])
        assert not batch.counts[row][~real].any() and (batch.slots[row][~real] == -1).all()
        assert (batch.decoder_counts[row][~listed] == -1).all()
    assert np.array_equal(batch.target_sum, np.array(medians, np.float32)[known.slide[centres]])
    assert np.array_equal(batch.index, centres) and (batch.draw == DRAW).all() and (batch.weight == 1).all()


def test_tokens_stand_cell_by_cell_with_depth_tokens_behind_the_genes(known, centres):
    batch = read(known, centres, SampleConfig(neighbours=3))
    masked, n_genes = masks(known, centres, RATES), known.counts.shape[1]
    for row, centre in enumerate(centres):
        plain = []
        for cell, member in enumerate([centre, *known.nearest[centre, :3]]):
            if member >= 0:
                genes = np.flatnonzero((known.counts[member] > 0) & ~masked[row])
                plain += [(gene, cell) for gene in [*genes.tolist(), n_genes, n_genes + 1]]
        real = batch.cells[row] >= 0
        assert list(zip(batch.genes[row][real].tolist(), batch.cells[row][real].tolist())) == plain


def test_flat_rows_are_in_order_with_nothing_between():
    ragged = Ragged(np.array([5, 0, 3]), np.array([2, 0, 1]), {"a": np.arange(8, dtype=np.int32)})
    row, columns = ragged.flat()
    assert row.tolist() == [0, 0, 2] and columns["a"].tolist() == [5, 6, 3]
    assert ragged.pad(np.array([2, 0]), 3, {"a": -1})["a"].tolist() == [[3, -1, -1], [5, 6, -1]]


def test_the_simulated_corpus_has_the_cases_that_matter(known, centres):
    """Else the test above would say less than it seems to."""
    assert len({tuple(slide.panel) for slide in known.corpus.slides}) == 2
    assert sum(len(slide.panel) for slide in known.corpus.slides[:2]) == 45 + 40
    present = known.nearest[centres, :3] >= 0
    assert set(present.sum(1)) == {0, 2, 3}
    assert (known.counts[centres] == -1).any() and (known.counts[centres] == 0).any()


def test_a_masked_gene_is_in_no_cell_and_everything_else_is(known, centres):
    config = SampleConfig(neighbours=3)
    with_mask, without = (read(known, centres, config, rates) for rates in (RATES, None))
    masked = masks(known, centres, RATES)
    n_genes = masked.shape[1]
    taken = 0
    for row in range(len(centres)):
        before, after = (
            set(zip(batch.genes[row][batch.cells[row] >= 0], batch.cells[row][batch.cells[row] >= 0]))
            for batch in (without, with_mask)
        )
        gone = {(gene, cell) for gene, cell in before if gene < n_genes and masked[row, gene]}
        assert after == before - gone
        taken += sum(cell > 0 for _, cell in gone)
    assert taken > 0


def test_samples_do_not_depend_on_the_others_that_are_read(known, centres):
    config = SampleConfig(neighbours=3, panel_limit=LIMIT)
    together = read(known, centres, config)
    for row in (0, len(centres) // 2, len(centres) - 1):
        alone = read(known, centres[row : row + 1], config)
        for name in ("genes", "counts", "cells", "slots", "decoder_genes", "decoder_counts"):
            one, many = getattr(alone, name)[0], getattr(together, name)[row]
            real = (alone.decoder_genes if name.startswith("decoder") else alone.cells)[0] >= 0
            assert np.array_equal(one[real], many[: real.sum()])
        assert np.array_equal(alone.offsets[0], together.offsets[row])


def test_an_exchange_changes_neighbours_and_nothing_else(known, centres):
    """Not the centre, nor its mask, nor where the neighbours stand; their classes as a whole stay."""
    plain, exchanged = (read(known, centres, replace(EXCHANGED, exchanged_within=w)) for w in ((), LABELS))
    for name in ("decoder_genes", "decoder_counts", "target_sum", "index", "draw", "weight"):
        assert np.array_equal(getattr(plain, name), getattr(exchanged, name))
    assert np.array_equal(plain.offsets, exchanged.offsets) and plain.offsets.any()
    assert np.array_equal(plain.totals[:, 0], exchanged.totals[:, 0])
    for row in range(len(centres)):
        own = [tokens(batch, row, {0}) for batch in (plain, exchanged)]
        assert own[0] == own[1]
        others = [tokens(batch, row, {1, 2, 3}) for batch in (plain, exchanged)]
        assert bool(others[0]) == (known.nearest[centres[row], 1] >= 0)
        if known.slide[centres[row]] < 2:  # with classes larger than a neighbourhood
            assert others[0] != others[1]


def tokens(batch: TissueBatch, row: int, cells: set[int]) -> list[tuple[int, ...]]:
    """Tokens of some cells of a sample."""
    columns = (batch.genes, batch.counts, batch.cells, batch.slots)
    listed = zip(*(column[row].tolist() for column in columns))
    return [token for token in listed if token[2] in cells]


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(neighbours=0),
        SampleConfig(neighbours=3),
        SampleConfig(neighbours=3, skip_nearest=2),
        EXCHANGED,
    ],
    ids=["alone", "plain", "after 2", "exchanged"],
)
def test_unique_cells_are_those_whose_expression_is_read(known, centres, monkeypatch, config):
    corpus, asked = Corpus.open(known.corpus.path), []
    cells = corpus.cells
    monkeypatch.setattr(corpus, "cells", lambda index: asked.append(index) or cells(index))
    SampleReader(corpus, config).read(centres)
    read_cells = set(np.concatenate(asked).tolist())
    assert unique_cells(centres, config.context_of(known.corpus)) == len(read_cells)
    assert (len(read_cells) > len(set(centres.tolist()))) == (config.neighbours > 0)


def test_another_step_masks_other_genes(known, centres):
    one, other = (masks(known, centres, RATES, draw) for draw in (DRAW, EVALUATION_STEP))
    assert (one != other).any()
    config = SampleConfig(neighbours=0)
    later = read(known, centres, config, draw=EVALUATION_STEP)
    for row, centre in enumerate(centres):
        genes = later.genes[row][later.cells[row] >= 0]
        assert set(genes[genes < other.shape[1]]) == set(
            np.flatnonzero((known.counts[centre] > 0) & ~other[row])
        )


def test_the_longest_bounds_hold_every_sample(known):
    everything = np.arange(known.corpus.n_cells)
    for config in (SampleConfig(neighbours=8), SampleConfig(neighbours=0, decoder="vocabulary")):
        reader = SampleReader(known.corpus, config)
        samples = reader.read(everything)
        assert (samples.lengths.max(0) <= reader.longest).all()


def test_rows_that_fill_a_batch_have_no_weight(known):
    samples = SampleReader(known.corpus, SampleConfig(neighbours=0)).read(np.array([5, 6, 7]))
    batch = samples.collate(np.array([2, 0]), 64, 64, 4)
    assert batch.index.tolist() == [7, 5, 7, 7] and batch.weight.tolist() == [1, 1, 0, 0]


def test_a_width_that_cuts_a_token_off_is_an_error(known):
    samples = SampleReader(known.corpus, SampleConfig(neighbours=0)).read(np.array([5, 6, 7]))
    tokens, decoded = samples.tokens.lengths.max(), samples.decoder.lengths.max()
    assert samples.collate(np.arange(3), tokens, decoded, 3).genes.shape == (3, tokens)
    for widths in ((tokens - 1, decoded), (tokens, decoded - 1)):
        with pytest.raises(ValueError, match="do not fit"):
            samples.collate(np.arange(3), *widths, 3)


def test_more_neighbours_than_stored_is_an_error(known):
    with pytest.raises(InputError, match=r"data.sample.neighbours is 9, the corpus stores 8 a cell"):
        SampleReader(known.corpus, SampleConfig(neighbours=9))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            SampleConfig(neighbours=6, skip_nearest=3),
            r"neighbours is 6 after 3 skipped \(skip_nearest\), the corpus stores 8 .*; ask for 8 or fewer",
        ),
        (
            SampleConfig(neighbours=1, exchanged_within=("cell_type", "region")),
            r"exchanged_within names 'region', no label of the corpus; use one of cell_type, domain",
        ),
    ],
)
def test_controls_that_the_corpus_cannot_give_are_errors(known, config, message):
    with pytest.raises(InputError, match=message):
        SampleReader(known.corpus, config)
    # Without neighbours they ask nothing of it.
    alone = read(known, np.arange(9), replace(config, neighbours=0))
    plain = read(known, np.arange(9), SampleConfig(neighbours=0))
    for name in ("genes", "counts", "cells", "slots", "totals", "offsets"):
        assert np.array_equal(getattr(alone, name), getattr(plain, name))


def test_a_negative_number_to_skip_is_an_error():
    with pytest.raises(ValueError, match="skip_nearest is -1, not a number from 0"):
        SampleConfig(skip_nearest=-1)
