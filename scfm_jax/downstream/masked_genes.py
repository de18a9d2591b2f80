"""Masked genes of held-out cells: what the model says of them, and what a table of ranks or a line says.

Every masked place holds the mask token here: at training a tenth keeps its gene, which a baseline that never
sees the place could not copy. Losses are cross-entropies in nats over all tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from flax import nnx
from jaxtyping import Bool, Float64, Int64
from sklearn.linear_model import LogisticRegression

from scfm_jax.corpus import Corpus
from scfm_jax.data.batch import SentenceBatch
from scfm_jax.data.ranks import RankConfig, Sentences
from scfm_jax.downstream.metrics import CellSums
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.objectives.masked_genes import MaskedGenesConfig, masked_gene_scores
from scfm_jax.reserved_tokens import FIRST_GENE, RESERVED_TOKENS

_CHUNK = 256
# Pseudo-counts of a technology's own frequencies behind those of a rank; chosen on held-in cells.
STRENGTHS = (1.0, 10.0, 100.0, 1_000.0)
_VALIDATION_SHARE = 0.1
# Of the regression, inverse: at 1 it overfits some ten thousand masked genes.
_PENALTY = 0.03


@dataclass(frozen=True, eq=False)
class Scores:
    """Of each cell, summed over its masked genes.

    Attributes
    ----------
    loss
        Cross-entropy, nats.
    missed
        Genes that are not the first guess.
    """

    loss: CellSums
    missed: CellSums


@dataclass(frozen=True, eq=False)
class MaskedGenes:
    """Masked genes of some cells, one entry each, in the order of cells and ranks.

    Attributes
    ----------
    cells
        Cell numbers; `row` counts in them.
    row, rank, gene
        Of each masked gene.
    seen_row, seen_rank, seen_gene
        Of each gene that is not masked.
    niche_row, niche_rank, niche_gene
        Of each gene of the niche.
    technology
        Number of each cell's technology in `technologies`.
    """

    cells: Int64[np.ndarray, " n"]
    row: Int64[np.ndarray, " m"]
    rank: Int64[np.ndarray, " m"]
    gene: Int64[np.ndarray, " m"]
    seen_row: Int64[np.ndarray, " s"]
    seen_rank: Int64[np.ndarray, " s"]
    seen_gene: Int64[np.ndarray, " s"]
    niche_row: Int64[np.ndarray, " t"]
    niche_rank: Int64[np.ndarray, " t"]
    niche_gene: Int64[np.ndarray, " t"]
    technology: Int64[np.ndarray, " n"]
    technologies: tuple[str, ...]

    def sums(self, values: Float64[np.ndarray, " m"]) -> CellSums:
        """`values` of the masked genes, summed by cell."""
        n = len(self.cells)
        return CellSums(
            np.bincount(self.row, weights=values, minlength=n),
            np.bincount(self.row, minlength=n).astype(np.float64),
        )

    def scores(self, surprise: Float64[np.ndarray, " m"], missed: Bool[np.ndarray, " m"]) -> Scores:
        return Scores(self.sums(surprise), self.sums(missed.astype(np.float64)))

    def part(self, cells: Bool[np.ndarray, " n"]) -> MaskedGenes:
        """Those of some of the cells, which keep their places in `cells`."""
        fields = {}
        for kind in ("", "seen_", "niche_"):
            chosen = cells[getattr(self, f"{kind}row")]
            for name in ("row", "rank", "gene"):
                fields[f"{kind}{name}"] = getattr(self, f"{kind}{name}")[chosen]
        return replace(self, **fields)


def masked_genes(
    corpus: Corpus,
    cells: Int64[np.ndarray, " n"],
    sample: RankConfig,
    objective: MaskedGenesConfig,
    *,
    seed: int = 0,
) -> MaskedGenes:
    """What the evaluation mask of `seed` takes from `cells`, and what it leaves."""
    reader, n_context = sample.reader(corpus), len(sample.context)
    found: dict[str, list[np.ndarray]] = {
        kind + name: [] for kind in ("", "seen_", "niche_") for name in ("row", "rank", "gene")
    }
    for start in range(0, len(cells), 16 * _CHUNK):
        read = reader.read(cells[start : start + 16 * _CHUNK], seed=seed, rates=objective.rates)
        row, place, token, segment, masked = _flat(read)
        genes = token >= RESERVED_TOKENS
        for kind, chosen in (
            ("", masked & genes),
            ("seen_", ~masked & genes & (segment == 0)),
            ("niche_", segment == 1),
        ):
            found[f"{kind}row"].append(start + row[chosen])
            found[f"{kind}rank"].append(place[chosen] - (n_context if kind != "niche_" else 0))
            found[f"{kind}gene"].append(token[chosen] - FIRST_GENE)
    named = [corpus.slides[slide].technology for slide in corpus.slide_of(cells)]
    technologies, technology = np.unique(named, return_inverse=True)
    return MaskedGenes(
        cells=cells,
        technology=technology.astype(np.int64),
        technologies=tuple(technologies.tolist()),
        **{name: np.concatenate(parts).astype(np.int64) for name, parts in found.items()},
    )


def _flat(read: Sentences) -> tuple[np.ndarray, ...]:
    """Row, position, token, segment and whether it is masked, of every token."""
    row, columns = read.tokens.flat()
    of_place, places = read.places.flat()
    masked = np.zeros(len(row), bool)
    lengths = read.tokens.lengths
    masked[(np.cumsum(lengths) - lengths)[of_place] + places["places"]] = True
    return row, columns["positions"], columns["tokens"], columns["segments"], masked


def score_model(model: TrainedModel, corpus: Corpus, wanted: MaskedGenes, *, seed: int = 0) -> Scores:
    """Scores of a trained model on the masked genes of `wanted`."""
    _, _, trained = model.config.nicheformer()
    objective = replace(trained, mask_share=1.0, random_share=0.0, published_draws=False)
    key = jax.random.key(seed)

    @jax.jit
    def run(parameters: Any, batch: SentenceBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        scores = masked_gene_scores(nnx.merge(model.graph, parameters), batch, key, objective)
        return (
            (scores.entry * scores.surprise).sum(1),
            (scores.entry * scores.missed).sum(1),
            jnp.where(scores.agree, scores.entry.sum(1), jnp.nan),
        )

    sums = np.zeros((3, len(wanted.cells)))
    for rows, batch in model.batches(corpus, wanted.cells, rates=objective.rates, seed=seed):
        for total, part in zip(sums, run(model.parameters, batch), strict=True):
            total[rows] = np.asarray(part)[: len(rows)]
    expected = np.bincount(wanted.row, minlength=len(wanted.cells))
    if not np.array_equal(sums[2], expected):
        raise RuntimeError("the model masked other genes than the baselines: was another seed meant?")
    return Scores(CellSums(sums[0], sums[2]), CellSums(sums[1], sums[2]))


def score_uniform(wanted: MaskedGenes, n_genes: int) -> Scores:
    """Every token of the vocabulary alike; the first guess is right once in as many."""
    n_tokens = n_genes + RESERVED_TOKENS
    ones = np.ones(len(wanted.gene))
    return Scores(wanted.sums(ones * np.log(n_tokens)), wanted.sums(ones * (1 - 1 / n_tokens)))


class RankFrequencies:
    """How often each gene stands at each rank, in each technology.

    Parameters
    ----------
    train
        Training cells.
    n_genes
        Genes of the vocabulary.
    """

    def __init__(self, train: MaskedGenes, n_genes: int) -> None:
        self._n_tokens = n_genes + RESERVED_TOKENS
        held = np.random.default_rng(0).random(len(train.cells)) < _VALIDATION_SHARE
        self._tables: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.strength: dict[tuple[str, bool], float] = {}
        for number, name in enumerate(train.technologies):
            own = train.technology == number
            inner, outer = train.part(own & ~held), train.part(own & held)
            self._fit(name, inner)
            for exclude in (False, True):
                losses = [self._entries(name, outer, strength, exclude)[0].sum() for strength in STRENGTHS]
                self.strength[name, exclude] = STRENGTHS[int(np.argmin(losses))]
            self._fit(name, train.part(own))

    def _fit(self, name: str, train: MaskedGenes) -> None:
        rank, gene = (
            np.concatenate([getattr(train, k + f) for k in ("", "seen_")]) for f in ("rank", "gene")
        )
        genes, column = np.unique(gene, return_inverse=True)
        shape = (int(rank.max(initial=0)) + 1, len(genes))
        counts = np.asarray(sp.coo_array((np.ones(len(rank)), (rank, column)), shape=shape).todense())
        self._tables[name] = genes, counts.astype(np.float32), counts.sum(0)

    def score(self, wanted: MaskedGenes, *, exclude: bool) -> Scores:
        """Scores on masked genes; with `exclude` what is seen elsewhere in the sentence is ruled out."""
        surprise, missed = np.zeros(len(wanted.gene)), np.zeros(len(wanted.gene), bool)
        for number, name in enumerate(wanted.technologies):
            own = wanted.technology == number
            at = own[wanted.row]
            strength = self.strength.get((name, exclude), 0.0)
            surprise[at], missed[at] = self._entries(name, wanted.part(own), strength, exclude)
        return wanted.scores(surprise, missed)

    def _entries(
        self, name: str, wanted: MaskedGenes, strength: float, exclude: bool
    ) -> tuple[Float64[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
        surprise = np.full(len(wanted.gene), np.log(self._n_tokens))
        missed = np.ones(len(wanted.gene), bool)
        if name not in self._tables:
            return surprise, missed
        genes, counts, frequency = self._tables[name]
        share = (frequency / frequency.sum()).astype(np.float32)
        column = np.searchsorted(genes, wanted.gene).clip(max=len(genes) - 1)
        known = genes[column] == wanted.gene
        seen = np.searchsorted(genes, wanted.seen_gene).clip(max=len(genes) - 1)
        for entries in _runs(wanted.row):
            rank = np.minimum(wanted.rank[entries], len(counts) - 1)
            odds = counts[rank] + strength * share
            if exclude:
                first, last = wanted.row[entries[0]], wanted.row[entries[-1]]
                near = slice(*np.searchsorted(wanted.seen_row, [first, last + 1]))
                there = sp.csr_array(
                    (np.ones(near.stop - near.start, bool), (wanted.seen_row[near] - first, seen[near])),
                    shape=(last - first + 1, len(genes)),
                )
                odds[there[wanted.row[entries] - first].todense()] = 0
            # One part in a thousand for what was never seen: a surprise is always finite.
            chance = 0.999 * odds / np.maximum(odds.sum(1, keepdims=True), 1e-9)
            said = np.where(known[entries], chance[np.arange(len(entries)), column[entries]], 0)
            surprise[entries] = -np.log(said + 0.001 / self._n_tokens)
            missed[entries] = (odds.argmax(1) != column[entries]) | ~known[entries]
        return surprise, missed


def _runs(row: Int64[np.ndarray, " m"]) -> Iterator[Int64[np.ndarray, " k"]]:
    """Entries in runs of whole cells."""
    if not len(row):
        return
    cells, first = np.unique(row, return_index=True)
    ends = np.append(first, len(row))
    for start in range(0, len(cells), _CHUNK):
        stop = min(start + _CHUNK, len(cells))
        yield np.arange(ends[start], ends[stop])


def score_linear(
    train: MaskedGenes, wanted: MaskedGenes, n_genes: int, *, niche: bool, most: int = 40_000
) -> Scores:
    """Multinomial logistic regression on what is seen: genes by rank, the masked rank, and the niche.

    Parameters
    ----------
    train, wanted
        Cells of the same technologies; each has a model of its own.
    niche
        Whether the ranks of the neighbours' mean are features too.
    most
        Masked genes to learn from, drawn at random where there are more.
    """
    surprise = np.full(len(wanted.gene), np.log(n_genes + RESERVED_TOKENS))
    missed = np.ones(len(wanted.gene), bool)
    for number, name in enumerate(wanted.technologies):
        if name not in train.technologies:
            continue
        inner = train.part(train.technology == train.technologies.index(name))
        outer = wanted.part(wanted.technology == number)
        entries = np.arange(len(inner.gene))
        if len(entries) > most:
            entries = np.sort(np.random.default_rng(0).choice(entries, most, replace=False))
        line = LogisticRegression(C=_PENALTY, max_iter=100, tol=1e-3)
        line.fit(_features(inner, n_genes, niche)[entries], inner.gene[entries])
        features = _features(outer, n_genes, niche)
        at = (wanted.technology == number)[wanted.row]
        column = np.searchsorted(line.classes_, outer.gene).clip(max=len(line.classes_) - 1)
        known = line.classes_[column] == outer.gene
        chance = 0.999 * line.predict_proba(features)
        said = np.where(known, chance[np.arange(len(column)), column], 0)
        surprise[at] = -np.log(said + 0.001 / (n_genes + RESERVED_TOKENS))
        missed[at] = (chance.argmax(1) != column) | ~known
    return wanted.scores(surprise, missed)


def _features(cells: MaskedGenes, n_genes: int, niche: bool) -> sp.csr_array:
    """One row a masked gene: seen genes, their ranks, the masked rank's bin, and the niche's ranks."""
    n = len(cells.cells)

    def by_rank(row: np.ndarray, rank: np.ndarray, gene: np.ndarray) -> list[sp.csr_array]:
        high = 1 / np.log2(rank + 2.0)
        return [
            sp.csr_array((values, (row, gene)), shape=(n, n_genes)) for values in (np.ones(len(row)), high)
        ]

    of_cell = by_rank(cells.seen_row, cells.seen_rank, cells.seen_gene)
    if niche:
        of_cell += by_rank(cells.niche_row, cells.niche_rank, cells.niche_gene)
    bins = np.floor(4 * np.log2(cells.rank + 1.0)).astype(np.int64)
    place = sp.csr_array((np.ones(len(bins)), (np.arange(len(bins)), bins)), shape=(len(bins), 64))
    return sp.csr_array(sp.hstack([place, *(part[cells.row] for part in of_cell)], format="csr"))
