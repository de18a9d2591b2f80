"""The task "mixing": whether batches or technologies mix where their biology is alike, and only there.

The two pull apart: noise mixes everything, and batches of unlike biology should not mix. So every embedding
gets scores of both, each from 0 to 1 and better when higher, by the formulas of Luecken et al. 2022 (Nature
Methods 19:41) and, for LISI, Korsunsky et al. 2019 (Nature Methods 16:1289).
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Float64, Int, Shaped
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors

from scfm_jax.errors import InputError

MAX_CELLS = 5000  # silhouettes compare all pairs
PERPLEXITY = 30
GRAPH_NEIGHBOURS = 15
CONSERVATION_WEIGHT = 0.6  # of Luecken et al.
_HALVINGS = 60


def mixing(
    embedding: Float[np.ndarray, "n d"],
    batch: Shaped[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    seed: int = 0,
) -> dict[str, float]:
    """Score how an embedding mixes batches and keeps labels apart.

    Parameters
    ----------
    embedding
        One row a cell; distances are Euclidean. Beyond 5,000 cells (`MAX_CELLS`) as many are drawn at random.
    batch
        Batch, section or technology of each cell, names or codes.
    labels
        Cell type or other biology, names or codes; leave cells without one out.
    seed
        Of the cells drawn.

    Returns
    -------
    Of mixing: ``batch_asw``, 1 - |silhouette of the batch| among the cells of each label, averaged over
    labels that several batches have; ``ilisi``, the median over cells of how many batches their 90 nearest
    hold in effect, scaled; ``graph_connectivity``, the share of a label's cells in the largest component of
    its graph of 15 nearest neighbours, averaged over labels.

    Of conservation: ``label_asw``, the silhouette of the label, scaled; ``clisi``, as ``ilisi`` but of
    labels, 1 where a cell's nearest are all of one.

    Means: ``mixing``, ``conservation``, and ``overall``, which weighs them 0.4 and 0.6.

    Raises
    ------
    InputError
        Shapes that differ, values that are not finite, codes below 0, fewer than two batches or labels, no
        label in two batches, or too few cells (fewer than 16).
    """
    embedding, batch, labels = _sample(embedding, batch, labels, seed)
    near, distance = _nearest(embedding)
    n_batches, n_labels = batch.max() + 1, labels.max() + 1
    of_mixing = {
        "batch_asw": _batch_asw(embedding, batch, labels),
        "ilisi": (np.median(lisi(distance, batch[near])) - 1) / (n_batches - 1),
        "graph_connectivity": _graph_connectivity(near[:, :GRAPH_NEIGHBOURS], labels),
    }
    of_conservation = {
        "label_asw": (silhouette_samples(embedding, labels).mean() + 1) / 2,
        "clisi": (n_labels - np.median(lisi(distance, labels[near]))) / (n_labels - 1),
    }
    mixed, kept = (np.mean(list(scores.values())) for scores in (of_mixing, of_conservation))
    overall = CONSERVATION_WEIGHT * kept + (1 - CONSERVATION_WEIGHT) * mixed
    means = {"mixing": mixed, "conservation": kept, "overall": overall}
    return {name: float(value) for name, value in (of_mixing | of_conservation | means).items()}


def scib_scores(
    embedding: Float[np.ndarray, "n d"],
    batch: Shaped[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    seed: int = 0,
) -> dict[str, float]:
    """What scib-metrics (the extra ``scib``) has beside `mixing`, whose parameters and errors are these.

    Returns
    -------
    ``kbet``, of mixing (NaN where no label is large and shared enough), and of conservation ``nmi`` and
    ``ari`` of k-means clusters and ``isolated_labels``.

    Raises
    ------
    InputError
        It is not installed.
    """
    try:
        import scib_metrics
        from scib_metrics.nearest_neighbors import NeighborsResults
    except ImportError:
        raise InputError("scib-metrics", "is not installed", "pip install 'scfm_jax[scib]'") from None
    embedding, batch, labels = _sample(embedding, batch, labels, seed)
    near, distance = _nearest(embedding)
    own = np.arange(len(near))[:, None]
    graph = NeighborsResults(np.hstack([own, near]), np.hstack([np.zeros(own.shape), distance]))
    scores = {
        "kbet": scib_metrics.kbet_per_label(graph, batch, labels),
        **scib_metrics.nmi_ari_cluster_labels_kmeans(embedding, labels),
        "isolated_labels": scib_metrics.isolated_labels(embedding, labels, batch),
    }
    return {name: float(value) for name, value in scores.items()}


def lisi(
    distance: Float64[np.ndarray, "n k"], codes: Int[np.ndarray, "n k"], perplexity: float | None = None
) -> Float64[np.ndarray, " n"]:
    """Local inverse Simpson index: how many classes the neighbours of each cell hold in effect.

    Neighbours weigh exp(-beta distance), with beta such that the entropy of the weights is that of
    `perplexity` equal ones (by default k / 3).
    """
    target = np.log(distance.shape[1] / 3 if perplexity is None else perplexity)
    apart = distance - distance[:, :1]  # the weights are the same, and none can vanish
    low, high = np.zeros(len(apart)), np.full(len(apart), np.inf)
    beta = np.ones(len(apart))
    for _ in range(_HALVINGS):
        weight = np.exp(-apart * beta[:, None])
        total = weight.sum(1)
        flat = np.log(total) + beta * (apart * weight).sum(1) / total > target
        low, high = np.where(flat, beta, low), np.where(flat, high, beta)
        beta = np.where(np.isinf(high), 2 * beta, (low + high) / 2)
    share = weight / total[:, None]
    return 1 / sum(np.where(codes == code, share, 0).sum(1) ** 2 for code in np.unique(codes))


def _batch_asw(
    embedding: Float[np.ndarray, "n d"], batch: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> float:
    of_label = []
    for label in np.unique(labels):
        cells = labels == label
        if 1 < len(np.unique(batch[cells])) < cells.sum():  # else a silhouette is not defined
            of_label.append(1 - np.abs(silhouette_samples(embedding[cells], batch[cells])).mean())
    if not of_label:
        raise InputError("labels", "no label lies in two batches", "give labels that the batches share")
    return float(np.mean(of_label))


def _graph_connectivity(near: Int[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> float:
    edges = (np.ones(near.size), near.ravel(), np.arange(len(near) + 1) * near.shape[1])
    graph = sp.csr_array(edges, shape=(len(near), len(near)))
    shares = []
    for label in np.unique(labels):
        cells = np.flatnonzero(labels == label)
        _, component = connected_components(graph[cells][:, cells], directed=False)
        shares.append(np.bincount(component).max() / len(cells))
    return float(np.mean(shares))


def _nearest(
    embedding: Float[np.ndarray, "n d"],
) -> tuple[Int[np.ndarray, "n k"], Float64[np.ndarray, "n k"]]:
    """The nearest other cells and their distances, nearest first."""
    k = min(3 * PERPLEXITY, len(embedding) - 1)
    distance, near = NearestNeighbors(n_neighbors=k).fit(embedding).kneighbors()
    return near, distance.astype(np.float64)


def _sample(
    embedding: Float[np.ndarray, "n d"],
    batch: Shaped[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    seed: int,
) -> tuple[Float[np.ndarray, "m d"], Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """At most `MAX_CELLS` cells, batches and labels as codes."""
    if embedding.ndim != 2 or batch.shape != embedding.shape[:1] or labels.shape != embedding.shape[:1]:
        problem = f"of shape {embedding.shape} for {batch.shape} batches and {labels.shape} labels"
        raise InputError("embedding", problem, "give one row, batch and label a cell")
    if not np.isfinite(embedding).all():
        raise InputError("embedding", "some values are not finite", "leave these cells out")
    cells = np.arange(len(embedding))
    if len(cells) > MAX_CELLS:
        cells = np.sort(np.random.default_rng(seed).choice(len(cells), MAX_CELLS, replace=False))
    if len(cells) <= GRAPH_NEIGHBOURS:
        raise InputError("embedding", f"{len(cells)} cells", f"give more than {GRAPH_NEIGHBOURS}")
    codes: list[Int[np.ndarray, " m"]] = []
    for name, values in (("batch", batch), ("labels", labels)):
        if np.issubdtype(values.dtype, np.number) and (values < 0).any():
            raise InputError(name, "negative codes mean none", "leave these cells out")
        there, code = np.unique(values[cells], return_inverse=True)
        if not 1 < len(there) < len(cells):
            problem = f"{len(there)} different in {len(cells)} cells"
            raise InputError(name, problem, "give at least two, and fewer than cells")
        codes.append(code)
    return embedding[cells], codes[0], codes[1]
