"""Sentences against the rule of ranks stated plainly, cell by cell, from the files' own matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from scfm_jax.data.batch import SentenceBatch
from scfm_jax.data.ranks import RankConfig, RankReader, Sentences
from scfm_jax.data.technology_means import usable_means
from scfm_jax.errors import InputError
from scfm_jax.objectives.masked_genes import MaskedGenesConfig, corrupted

SEED, DRAW = 3, 11


def config(**fields: Any) -> RankConfig:
    return RankConfig(**{"extra_assays": ("sim",), **fields})


def plain_means(known: Any) -> np.ndarray:
    """Of each gene, over the cells with any of it, the mean of counts scaled to 10,000 a cell."""
    counts = np.maximum(known.counts, 0)
    scaled = counts / counts.sum(1, keepdims=True) * 10_000
    return np.array([column[column > 0].mean() if column.any() else np.nan for column in scaled.T])


def plain_order(values: np.ndarray, means: np.ndarray) -> list[int]:
    """Genes with counts by value over mean, highest first; equal ones in the order of the vocabulary."""
    shares = (values / means).astype(np.float32)
    return sorted(np.flatnonzero(values > 0).tolist(), key=lambda gene: (-shares[gene], gene))


def rows(read: Sentences, name: str) -> list[list[int]]:
    column = read.tokens.columns[name]
    return [column[s : s + n].tolist() for s, n in zip(read.tokens.starts, read.tokens.lengths, strict=True)]


def test_technology_means(known: Any) -> None:
    np.testing.assert_allclose(known.corpus.technology_means("sim"), plain_means(known), rtol=1e-12)
    assert np.isnan(known.corpus.technology_means("other")).all()


@pytest.mark.parametrize("kind", ["exact", "published"])
@pytest.mark.parametrize("context", [("species", "assay", "modality"), ("modality",), ()])
def test_sentences(known: Any, kind: Any, context: Any) -> None:
    reader = RankReader(known.corpus, config(means=kind, context=context, length=25))
    cells = np.random.default_rng(0).permutation(known.corpus.n_cells)[:200]
    read = reader.read(cells)
    means = usable_means(plain_means(known), kind)
    tokens_of = {"species": 5, "assay": 19}
    cut = 0
    for cell, said, positions in zip(cells, rows(read, "tokens"), rows(read, "positions"), strict=True):
        modality = 4 if known.corpus.slides[known.slide[cell]].spatial else 3
        front = [{**tokens_of, "modality": modality}[field] for field in context]
        genes = [30 + gene for gene in plain_order(np.maximum(known.counts[cell], 0), means)]
        assert said == (front + genes)[:25]
        assert positions == list(range(len(said)))
        cut += len(front + genes) - len(said)
    assert read.cut[:, 0].sum() == cut > 0 and not read.cut[:, 1].any()
    assert not any(read.tokens.columns["segments"])


def test_rounded_means_tie_most_genes_and_ties_follow_the_vocabulary(known: Any) -> None:
    """With means of 1, equal counts tie."""
    reader = RankReader(known.corpus, config(context=()))
    reader.read(np.arange(50))
    reader.means[:] = 1
    for cell, said in zip(range(50), rows(reader.read(np.arange(50)), "tokens"), strict=True):
        counts = known.counts[cell][np.array(said) - 30]
        assert (np.diff(counts) <= 0).all()
        assert all(a < b for a, b, step in zip(said, said[1:], np.diff(counts), strict=False) if step == 0)


@pytest.mark.parametrize("radius", [None, 20.0])
def test_the_niche_is_the_neighbours_mean_by_rank(known: Any, radius: float | None) -> None:
    fields = {"niche_neighbours": 4, "niche_length": 12, "length": 30}
    if radius is not None:  # one slide has no unit
        spatial = [
            slide for slide in range(len(known.corpus.slides)) if known.corpus.slides[slide].um_per_unit
        ]
        cells = np.flatnonzero(np.isin(known.slide, spatial))[::7]
    else:
        cells = np.arange(0, known.corpus.n_cells, 9)
    reader = RankReader(known.corpus, config(niche_radius=radius, **fields))
    read, alone = reader.read(cells), RankReader(known.corpus, config(length=30)).read(cells)
    means = plain_means(known)
    counts = np.maximum(known.counts, 0)
    with_niche = 0
    for row, cell in enumerate(cells):
        near = [other for other in known.nearest[cell][:4] if other >= 0]
        if radius is not None:
            near = [
                other for other in near if np.hypot(*(known.places[other] - known.places[cell])) <= radius
            ]
        own, segments = rows(alone, "tokens")[row], np.array(rows(read, "segments")[row])
        said, positions = (np.array(rows(read, name)[row]) for name in ("tokens", "positions"))
        assert said[segments == 0].tolist() == own
        niche = said[segments == 1]
        if not near:
            assert not len(niche)
            continue
        with_niche += 1
        mean = np.mean([counts[other] / counts[other].sum() * 10_000 for other in near], axis=0)
        # Sums in another order may swap what differs in the last digit of float32.
        value = (mean / means)[niche - 30]
        assert (np.diff(value) <= 1e-6 * value[:-1]).all()
        assert len(niche) == min(12, (mean > 0).sum())
        assert read.cut[row, 1] == (mean > 0).sum() - len(niche)
        assert set(np.flatnonzero(mean > 0)) >= set(niche - 30)
        assert positions[segments == 1].tolist() == list(range(len(niche)))
    assert with_niche > 20


@pytest.mark.parametrize("published_draws", [False, True])
def test_places_are_what_the_jitted_loss_masks(known: Any, published_draws: bool) -> None:
    objective = MaskedGenesConfig(rate=0.3, published_draws=published_draws)
    reader = RankReader(known.corpus, config(niche_neighbours=3))
    cells = np.arange(0, 640, 10)
    read = reader.read(cells, draw=DRAW, seed=SEED, rates=objective.rates)
    width, most = (int(n) for n in read.lengths.max(0))
    batch = read.collate(np.arange(len(cells)), width, most, len(cells) + 2)
    n_tokens = len(known.corpus.vocabulary) + 30
    seen, masked = jax.jit(lambda b: corrupted(b, jax.random.key(SEED), objective, n_tokens))(batch)
    for row, places in enumerate(batch.places):
        assert np.flatnonzero(masked[row]).tolist() == places[places >= 0].tolist()
    assert batch.weight.tolist() == [1] * len(cells) + [0, 0]
    changed = np.asarray(seen != batch.tokens)
    assert not changed[~np.asarray(masked)].any()


def test_shares_of_a_mask() -> None:
    """80% mask, 10% random and 10% as they were; under `published_draws` 81, 10 and 9."""
    tokens = np.tile(np.arange(30, 1030, dtype=np.int32), (40, 1))
    batch = SentenceBatch(
        tokens=tokens,
        positions=np.zeros_like(tokens),
        segments=np.zeros_like(tokens),
        lengths=np.full(40, 1000),
        places=np.full((40, 1), -1),
        cut=np.zeros((40, 2), np.int32),
        index=np.arange(40, dtype=np.uint32),
        draw=np.zeros(40, np.uint32),
        weight=np.ones(40),
    )
    for objective, shares in (
        (MaskedGenesConfig(), (0.80, 0.10)),
        (MaskedGenesConfig(published_draws=True), (0.81, 0.10)),
    ):
        seen, masked = (np.asarray(x) for x in corrupted(batch, jax.random.key(0), objective, 20_000))
        to_mask = (seen == 0)[masked].mean()
        as_it_was = (seen == tokens)[masked].mean()
        assert abs(masked.mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / tokens.size)
        spread = 4 * 0.5 / np.sqrt(masked.sum())
        assert abs(to_mask - shares[0]) < spread and abs(as_it_was - (1 - sum(shares))) < spread


@pytest.mark.parametrize(
    ("means", "kind", "wanted"),
    [
        ([np.nan, 0.4, 0.5, 1.5, -0.2], "published", [1, 1, 1, 2, 1]),
        ([np.nan, 0.4, -3.0, 0.0], "exact", [1, 0.4, 1, 1]),
    ],
)
def test_usable_means(means: list[float], kind: Any, wanted: list[float]) -> None:
    assert usable_means(np.array(means), kind).tolist() == wanted


def test_bad_input(known: Any, tmp_path: Path) -> None:
    corpus = known.corpus
    with pytest.raises(InputError, match=r"assay 'sim' has no token .*extra_assays"):
        RankReader(corpus, RankConfig()).read(np.arange(3))
    np.save(tmp_path / "means.npy", np.ones(7))
    with pytest.raises(InputError, match=r"holds float64 of shape \(7,\)"):
        RankReader(corpus, config(mean_files=(f"sim={tmp_path / 'means.npy'}",))).read(np.arange(3))
    with pytest.raises(InputError, match="cannot be read as means"):
        RankReader(corpus, config(mean_files=(f"sim={tmp_path / 'none.npy'}",))).read(np.arange(3))
    with pytest.raises(InputError, match=r"niche_neighbours is 9, the corpus stores 8"):
        RankReader(corpus, config(niche_neighbours=9))
    with pytest.raises(InputError, match=r"niche_radius is in um"):
        RankReader(corpus, config(niche_neighbours=4, niche_radius=20.0)).read(np.arange(corpus.n_cells))
    with pytest.raises(ValueError, match="leaves no room"):
        RankConfig(length=3)
