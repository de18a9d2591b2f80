"""Scores of mixing against their formulas in loops over cells, against scib-metrics, and in extremes."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.spatial.distance import cdist

from scfm_jax.downstream import mixing as module
from scfm_jax.downstream.mixing import lisi, mixing, scib_scores
from scfm_jax.errors import InputError

N = 240


@pytest.fixture(scope="module")
def cells():
    """Three types, four batches of which one moves its cells, and one type that one batch alone has."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=N)
    batch = np.where(labels == 2, 0, rng.integers(4, size=N))
    centres = rng.normal(0, 2, (3, 5))
    embedding = (
        centres[labels] + rng.normal(0, 1, (N, 5)) + 2.0 * (batch == 3)[:, None] * (labels == 1)[:, None]
    )
    return embedding.astype(np.float32), np.array(list("wxyz"))[batch], labels


def silhouettes(x, codes):
    """Rousseeuw 1987."""
    distance, found = cdist(x, x), []
    for i, own in enumerate(codes):
        same = (codes == own) & (np.arange(len(codes)) != i)
        a = distance[i, same].mean() if same.any() else np.nan
        b = min(distance[i, codes == other].mean() for other in np.unique(codes) if other != own)
        found.append((b - a) / max(a, b) if same.any() else 0.0)
    return np.array(found)


def plain_lisi(distance, codes, perplexity):
    found = []
    for d, c in zip(distance, codes):

        def weights(beta, d=d):
            w = np.exp(-beta * (d - d.min()))
            return w / w.sum()

        def excess(beta, weights=weights):
            p = weights(beta)
            return -(p * np.log(p)).sum() - np.log(perplexity)

        p = weights(brentq(excess, 1e-9, 50))
        found.append(1 / sum(p[c == code].sum() ** 2 for code in np.unique(c)))
    return np.array(found)


def neighbours(x, k):
    distance = cdist(x, x)
    np.fill_diagonal(distance, np.inf)
    near = distance.argsort(1)[:, :k]
    return near, np.take_along_axis(distance, near, 1)


def largest_share(near, members):
    """Walk from cell to cell over edges in either direction."""
    members, best = set(members.tolist()), 0
    edges = {i: set() for i in members}
    for i in members:
        for j in members.intersection(near[i].tolist()):
            edges[i].add(j)
            edges[j].add(i)
    left = set(members)
    while left:
        front = [left.pop()]
        size = 1
        while front:
            new = edges[front.pop()] & left
            left -= new
            front += new
            size += len(new)
        best = max(best, size)
    return best / len(members)


def test_scores_are_their_formulas(cells):
    x, batch, labels = cells
    got = mixing(x, batch, labels)
    near, distance = neighbours(x.astype(float), 90)
    codes = np.unique(batch, return_inverse=True)[1]
    both = [1 - np.abs(silhouettes(x[labels == k], codes[labels == k])).mean() for k in (0, 1)]
    expected = {
        "batch_asw": np.mean(both),
        "ilisi": (np.median(plain_lisi(distance, codes[near], 30)) - 1) / 3,
        "graph_connectivity": np.mean(
            [largest_share(near[:, :15], np.flatnonzero(labels == k)) for k in range(3)]
        ),
        "label_asw": (silhouettes(x, labels).mean() + 1) / 2,
        "clisi": (3 - np.median(plain_lisi(distance, labels[near], 30))) / 2,
    }
    expected["mixing"] = np.mean([expected[k] for k in ("batch_asw", "ilisi", "graph_connectivity")])
    expected["conservation"] = (expected["label_asw"] + expected["clisi"]) / 2
    expected["overall"] = 0.4 * expected["mixing"] + 0.6 * expected["conservation"]
    assert got == pytest.approx(expected, rel=1e-5)
    assert all(0 < value < 1 for name, value in got.items() if name != "graph_connectivity")


def test_graph_connectivity_sees_a_label_in_two_pieces():
    rng = np.random.default_rng(0)
    place = np.repeat([0, 30, 200], [20, 20, 160])  # 15 neighbours stay within a piece, 90 would not
    x = place[:, None] + rng.normal(0, 1, (200, 2))
    labels, batch = (place == 200).astype(int), rng.integers(2, size=200)
    assert mixing(x, batch, labels)["graph_connectivity"] == pytest.approx((0.5 + 1) / 2)


def test_noise_mixes_and_a_batch_effect_does_not():
    rng = np.random.default_rng(0)
    labels, batch = rng.integers(3, size=(2, 600))
    biology, effect = 8 * np.eye(3)[labels], 8 * np.eye(3)[batch]
    noise = rng.normal(0, 1, (600, 3))
    good = mixing(np.hstack([biology, noise]), batch, labels)
    bad = mixing(np.hstack([noise, effect]), batch, labels)
    worst = mixing(np.hstack([noise, 0 * noise]), batch, labels)
    assert good["clisi"] > 0.99 and good["ilisi"] > 0.8 and good["batch_asw"] > 0.9
    assert bad["ilisi"] < 0.01 and bad["batch_asw"] < good["batch_asw"] - 0.3
    assert worst["ilisi"] > 0.8 and worst["clisi"] < 0.3
    assert good["overall"] > max(bad["overall"], worst["overall"])


def test_lisi_of_cells_that_coincide_or_lie_far_off():
    codes = np.tile(np.arange(10) % 2, (3, 1))
    assert lisi(np.zeros((3, 10)), codes) == pytest.approx(2)
    distance = np.sort(np.random.default_rng(0).random((3, 10)))
    assert lisi(distance + 1e4, codes) == pytest.approx(plain_lisi(distance, codes, 10 / 3))


def test_many_cells_are_sampled_by_seed(cells, monkeypatch):
    x, batch, labels = cells
    monkeypatch.setattr(module, "MAX_CELLS", 150)
    kept = np.sort(np.random.default_rng(3).choice(N, 150, replace=False))
    one = mixing(x, batch, labels, 3)
    assert one == mixing(x[kept], batch[kept], labels[kept]) and one != mixing(x, batch, labels, 4)


@pytest.mark.slow
def test_agrees_with_scib_metrics(cells):
    scib = pytest.importorskip("scib_metrics", reason="the extra scib is not installed")
    from scib_metrics.nearest_neighbors import NeighborsResults

    x, batch, labels = cells
    near, distance = neighbours(x.astype(float), 90)
    own = np.arange(N)[:, None]
    graph = NeighborsResults(np.hstack([own, near]), np.hstack([0 * own, distance]))
    # Theirs looks at strong components of a directed graph: given both directions, these are ours.
    linked = (distance[:, :, None] * (near[:, :, None] == np.arange(N)))[:, :15].sum(1)
    both_ways = SimpleNamespace(knn_graph_distances=np.maximum(linked, linked.T))
    got = mixing(x, batch, labels)
    assert got["batch_asw"] == pytest.approx(scib.silhouette_batch(x, labels, batch), rel=1e-4)
    assert got["label_asw"] == pytest.approx(scib.silhouette_label(x, labels), rel=1e-4)
    assert got["ilisi"] == pytest.approx(scib.ilisi_knn(graph, batch), rel=1e-3)
    assert got["clisi"] == pytest.approx(scib.clisi_knn(graph, labels), rel=1e-3)
    assert got["graph_connectivity"] == pytest.approx(scib.graph_connectivity(both_ways, labels))
    more = scib_scores(x, batch, labels)
    assert more.keys() == {"kbet", "nmi", "ari", "isolated_labels"}
    assert more["isolated_labels"] == pytest.approx(
        (silhouettes(x, labels)[labels == 2].mean() + 1) / 2, rel=1e-4
    )


def test_bad_input_is_told(cells, monkeypatch):
    x, batch, labels = cells
    with pytest.raises(InputError, match="one row, batch and label a cell"):
        mixing(x, batch[1:], labels)
    with pytest.raises(InputError, match="not finite"):
        mixing(x * np.nan, batch, labels)
    with pytest.raises(InputError, match="negative codes"):
        mixing(x, batch, labels - 1)
    with pytest.raises(InputError, match="1 different in 240 cells"):
        mixing(x, np.zeros(N, int), labels)
    with pytest.raises(InputError, match="no label lies in two batches"):
        mixing(x, labels, labels)
    with pytest.raises(InputError, match="more than 15"):
        mixing(x[:15], batch[:15], labels[:15])
    monkeypatch.setitem(sys.modules, "scib_metrics", None)
    with pytest.raises(InputError, match=r"scfm_jax\[scib\]"):
        scib_scores(x, batch, labels)
