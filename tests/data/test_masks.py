"""The mask's bits are scikit-learn's hash under jax's Threefry, and mask what the rates say in any batch."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats
from sklearn.utils import murmurhash3_32

from scfm_jax.data.masks import (
    MaskRates,
    column_mask,
    mask_bits,
    murmur3,
    seed_words,
    threefry2x32,
    token_bits,
)

RATES = MaskRates(nonzero=0.3, zero=0.03)
STEP, CELL = np.uint32(7), np.arange(300, dtype=np.uint32) * 1_000_003
GENE = np.arange(500)


def bits(cells=CELL, genes=GENE, *, seed=11, step=STEP):
    steps = np.full(len(cells), step, np.uint32)
    return mask_bits(seed_words(seed), steps, cells, np.broadcast_to(genes, (len(cells), len(genes))))


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(key, counter, answer):
    words = threefry2x32(*((np.array([a], np.uint32), np.array([b], np.uint32)) for a, b in (key, counter)))
    assert [int(word[0]) for word in words] == list(answer)


def test_threefry_is_jaxs_bit_for_bit():
    rng = np.random.default_rng(0)
    key, counter = rng.integers(2**32, size=(2, 2, 4096), dtype=np.uint32)
    theirs = jax.vmap(threefry_2x32)(key.T, counter.T)
    assert np.array_equal(np.stack(threefry2x32(tuple(key), tuple(counter)), axis=1), theirs)


def test_murmur3_is_that_of_scikit_learn():
    words = np.random.default_rng(0).integers(-(2**31), 2**31, 4096).astype(np.int32)
    for seed in (0, 1, 2**31, 2**32 - 1):
        ours = murmur3(words[None], np.full((1, 1), seed, np.uint32))
        assert np.array_equal(ours[0], murmurhash3_32(words, seed=seed, positive=True))


@pytest.mark.parametrize("stream", [0, 1])
def test_bits_are_the_hash_of_gene_under_the_threefry_of_step_and_cell(stream):
    def key_of(cell):
        sample = threefry_2x32(seed_words(11), jnp.stack([jnp.uint32(STEP), cell]))
        return threefry_2x32(sample, jnp.array([stream, 0], jnp.uint32))

    keys = np.asarray(jax.vmap(key_of)(CELL))
    steps, genes = np.full(len(CELL), STEP, np.uint32), np.broadcast_to(GENE, (len(CELL), len(GENE)))
    for word, ours in enumerate(token_bits(seed_words(11), steps, CELL, genes, stream=stream)):
        theirs = [
            murmurhash3_32(GENE.astype(np.int32), seed=int(key), positive=True) for key in keys[:, word]
        ]
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("seed", [0, 1, 12_345, 2**31, 2**32 - 1])
def test_seed_words_are_those_of_a_jax_key(seed):
    assert np.array_equal(seed_words(seed), jax.random.key_data(jax.random.key(seed)))


def test_numpy_and_jit_draw_the_same_mask():
    counts = np.random.default_rng(1).integers(-1, 3, (len(CELL), len(GENE))).astype(np.int32)
    genes = np.broadcast_to(GENE, counts.shape).astype(np.int32)
    steps = np.full(len(CELL), STEP, np.uint32)
    words = jax.random.key_data(jax.random.key(11))
    there = jax.jit(mask_bits)(words, steps, CELL, genes)
    assert there.dtype == np.uint32 and np.array_equal(there, bits())
    masked = jax.jit(partial(column_mask, rates=RATES))(there, counts)
    assert np.array_equal(masked, column_mask(bits(), counts, RATES)) and masked.any()


def test_a_gene_of_a_cell_has_its_bits_in_any_company():
    cells, genes = (
        np.random.default_rng(2).permutation(300)[:40],
        np.random.default_rng(3).permutation(500)[:60],
    )
    assert np.array_equal(bits(CELL[cells], GENE[genes]), bits()[np.ix_(cells, genes)])
    padded = np.concatenate([GENE, np.full(28, GENE[0])])
    assert np.array_equal(bits(genes=padded)[:, :500], bits())


@pytest.mark.parametrize(
    "change", [{"seed": 12}, {"step": STEP + 1}, {"cells": CELL + 1}, {"genes": GENE + 1}]
)
def test_another_seed_step_cell_or_gene_has_other_bits(change):
    same = np.mean(bits(**change) == bits())
    assert same < 1e-4  # 2**-32 by chance


def test_bits_are_uniform_over_cells_and_over_genes():
    uniform = bits() / 2**32
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3
    for axis in (0, 1):  # the mean of n uniform numbers is normal with variance 1 / 12 n
        standard = (uniform.mean(axis) - 0.5) * np.sqrt(12 * uniform.shape[axis])
        assert stats.kstest(standard, "norm").pvalue > 1e-3


def test_masks_of_any_two_genes_and_of_any_two_cells_are_uncorrelated():
    cells, genes = np.arange(4_000, dtype=np.uint32), np.arange(4_000)
    for masked in (bits(cells, genes[:120]), bits(cells[:120], genes).T):
        correlation = np.corrcoef((masked < 0.3 * 2**32).T)[np.triu_indices(120, 1)]
        assert stats.kstest(correlation * np.sqrt(len(masked)), "norm").pvalue > 1e-3


def test_the_two_words_and_the_streams_are_independent():
    steps, genes = np.full(len(CELL), STEP, np.uint32), np.broadcast_to(GENE, (len(CELL), len(GENE)))
    words = [
        word.ravel() / 2**32
        for stream in (0, 1)
        for word in token_bits(seed_words(3), steps, CELL, genes, stream=stream)
    ]
    for first, second in itertools.combinations(words, 2):
        assert stats.pearsonr(first, second).pvalue > 1e-4


def test_zeros_and_nonzeros_are_masked_at_their_own_rates_and_the_unmeasured_never():
    counts = np.random.default_rng(4).choice([-1, 0, 1, 9], bits().shape, p=[0.1, 0.5, 0.2, 0.2])
    masked = column_mask(bits(), counts, RATES)
    for chosen, rate in ((counts > 0, RATES.nonzero), (counts == 0, RATES.zero)):
        found = stats.binomtest(int(masked[chosen].sum()), int(chosen.sum()), rate)
        assert found.pvalue > 1e-3
    assert not masked[counts < 0].any()


def test_rates_of_none_and_all():
    counts = np.random.default_rng(5).integers(-1, 3, bits().shape)
    assert not column_mask(bits(), counts, MaskRates(0.0, 0.0)).any()
    assert np.array_equal(column_mask(bits(), counts, MaskRates(1.0, 1.0)), counts >= 0)


def test_a_higher_rate_masks_more_of_the_same_genes():
    counts = np.random.default_rng(6).integers(0, 3, bits().shape)
    few, many = (column_mask(bits(), counts, MaskRates(rate, rate)) for rate in (0.1, 0.4))
    assert many.sum() > few.sum() and many[few].all()
