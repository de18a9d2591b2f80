"""The built-in tissue does what its module says, checked with SciPy and scikit-learn on its output."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pytest
from scipy import sparse, stats
from scipy.spatial import KDTree
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scfm_jax.errors import InputError
from scfm_jax.simulate import SimulationConfig, oracle, simulate

SMALL = SimulationConfig(n_slides=2, cells_per_slide=400, depth_sigma=0.2)


@pytest.fixture(scope="module")
def tissue() -> list[anndata.AnnData]:
    return simulate(SimulationConfig())


def neighbours(slide: anndata.AnnData, k: int) -> np.ndarray:
    return KDTree(slide.obsm["spatial"]).query(slide.obsm["spatial"], k + 1)[1][:, 1:]


def normalised(slide: anndata.AnnData, genes: list[str]) -> np.ndarray:
    total = slide.X.sum(1).A1
    return np.log1p(slide[:, genes].X.toarray() * (np.median(total) / total)[:, None])


def shared_genes(tissue: list[anndata.AnnData]) -> list[str]:
    return [gene for gene in tissue[0].var_names if gene in set(tissue[1].var_names)]


def test_slides_are_what_a_laboratory_hands_over(tissue, tmp_path):
    names = [name for slide in tissue for name in slide.obs_names]
    assert len(set(names)) == len(names)
    for number, slide in enumerate(tissue):
        assert sparse.isspmatrix_csr(slide.X) and slide.X.dtype == np.float32
        assert slide.X.data.min() >= 1 and np.array_equal(slide.X.data, np.round(slide.X.data))
        assert set(slide.obs["slide"]) == {f"slide{number}"}
        distance, _ = KDTree(slide.obsm["spatial"]).query(slide.obsm["spatial"], 2)
        assert 10 < np.median(distance[:, 1]) < 15  # um
    tissue[0].write_h5ad(tmp_path / "slide.h5ad")
    again = anndata.read_h5ad(tmp_path / "slide.h5ad")
    assert np.array_equal(again.X.toarray(), tissue[0].X.toarray())
    assert again.uns["simulation"]["radius"] == SimulationConfig().radius


def test_panels_differ_and_hold_every_signalling_gene(tissue):
    first, second = set(tissue[0].var_names), set(tissue[1].var_names)
    assert (len(first), len(second)) == (120, 110)
    assert [slide.obs["technology"].iloc[0] for slide in tissue] == ["simscope", "simseq"] * 2
    signalling = {f"{role}{r}" for role in ("LIGAND", "RECEPTOR", "TARGET") for r in range(6)}
    assert signalling <= first & second
    assert len(first | second) == 150 and first - second and second - first


def test_targets_follow_the_formula():
    """Expected shares, recomputed in plain loops, match mean counts where depth is high and noise low."""
    config = SimulationConfig(n_slides=1, cells_per_slide=100, depth=1e6, depth_sigma=0.0, dispersion=1e-6)
    (slide,) = simulate(config)
    activity, settings = slide.layers["activity"].astype(float), slide.uns["simulation"]
    places, column = slide.obsm["spatial"], slide.var_names.get_loc
    rate = activity.copy()
    for i in range(100):
        near = [j for j in range(100) if j != i and np.hypot(*(places[i] - places[j])) <= config.radius]
        for r in range(config.n_triples):
            z = activity[i, column(f"RECEPTOR{r}")] * np.mean(activity[near, column(f"LIGAND{r}")])
            rate[i, column(f"TARGET{r}")] *= 1 + config.strength * z * z / (z * z + settings["kappa"] ** 2)
    rate *= slide.var["efficiency"].to_numpy()
    expected = rate / rate.sum(1, keepdims=True) * 1e6
    np.testing.assert_allclose(slide.X.toarray(), expected, atol=6 * np.sqrt(expected.max()))
    assert stats.pearsonr(slide.X.toarray().ravel(), expected.ravel()).statistic > 0.9999


def test_counts_are_negative_binomial_with_the_given_dispersion():
    config = replace(SMALL, n_slides=1, cells_per_slide=4000, strength=0.0, depth_sigma=0.0, dispersion=0.3)
    (slide,) = simulate(config)
    marker = slide.obs["cell_type"] == slide.obs["cell_type"].cat.categories[0]
    rest = (slide.var["role"] == "ordinary").to_numpy()
    rate = slide.layers["activity"][marker] * slide.var["efficiency"].to_numpy()
    mean = (rate / rate.sum(1, keepdims=True) * config.depth)[:, rest]
    counts = slide.X[marker.to_numpy()][:, rest].toarray()
    # E[(y - mean)^2 - mean] = dispersion mean^2, summed over all cells and genes.
    estimate = np.sum((counts - mean) ** 2 - mean) / np.sum(mean**2)
    assert estimate == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("seed", [0, 1])
def test_oracle_gains_from_neighbours(seed):
    """At least 15% of squared error, from counts that a model could see, even where the domain is known."""
    truth = oracle(simulate(SimulationConfig(seed=seed)))
    own, domain, observed, latent = map(truth.error, ("own", "own_domain", "observed", "latent"))
    assert latent < observed < 0.85 * domain
    assert domain < own < truth.value.var(axis=0).mean()


def test_oracle_is_calibrated(tissue):
    """The best prediction is right on average at every level that it predicts."""
    truth = oracle(tissue)
    order = np.argsort(truth.latent.ravel())
    for part in np.array_split(order, 10):
        assert truth.value.ravel()[part].mean() == pytest.approx(truth.latent.ravel()[part].mean(), abs=0.04)


def test_shuffled_neighbours_remove_the_gain(tissue):
    shuffled = [slide.copy() for slide in tissue]
    for slide in shuffled:
        slide.obsm["spatial"] = np.random.default_rng(0).permutation(slide.obsm["spatial"])
    truth, lie = oracle(tissue), oracle(shuffled)
    assert lie.error("observed") > truth.error("own")
    assert lie.error("latent") > truth.error("own")


def test_a_learner_gains_from_neighbours_on_a_held_out_slide(tissue):
    """Ridge on the other genes, then also on 8 neighbours' mean and receptor x ligand: it can be learnt."""
    genes = shared_genes(tissue)
    error = []
    for triple in range(SimulationConfig().n_triples):
        target, receptor, ligand = (
            genes.index(f"{role}{triple}") for role in ("TARGET", "RECEPTOR", "LIGAND")
        )
        value = [normalised(slide, genes) for slide in tissue]
        own = [np.delete(x, target, axis=1) for x in value]
        around = [x[neighbours(slide, 8)].mean(1) for x, slide in zip(own, tissue)]
        pair = [
            x[:, [receptor]] * x[neighbours(slide, 8)].mean(1)[:, [ligand]] for x, slide in zip(value, tissue)
        ]
        for features in (own, [np.hstack(parts) for parts in zip(own, around, pair)]):
            model = make_pipeline(StandardScaler(), Ridge(100.0))
            model.fit(np.concatenate(features[:3]), np.concatenate([x[:, target] for x in value[:3]]))
            error.append(np.mean((model.predict(features[3]) - value[3][:, target]) ** 2))
    own_error, with_neighbours = np.reshape(error, (-1, 2)).mean(0)
    assert with_neighbours < 0.85 * own_error


def test_domains_are_read_from_neighbours_not_from_the_cell(tissue):
    genes = shared_genes(tissue)
    tissue = [tissue[0], tissue[3]]  # of both technologies: the first to learn from, the last held out
    own = [normalised(slide, genes) for slide in tissue]
    both = [np.hstack([x, x[neighbours(slide, 10)].mean(1)]) for x, slide in zip(own, tissue)]
    domain = [slide.obs["domain"].astype(str).to_numpy() for slide in tissue]
    accuracy = []
    for features in (own, both):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.05))
        model.fit(features[0], domain[0])
        accuracy.append(model.score(features[1], domain[1]))
    assert accuracy[1] > accuracy[0] + 0.15


@pytest.mark.parametrize("arrangement", ["patches", "layers"])
def test_every_type_lives_in_every_domain_and_domains_are_contiguous(arrangement):
    for slide in simulate(SimulationConfig(n_slides=2, arrangement=arrangement)):
        table = slide.obs.groupby(["domain", "cell_type"], observed=False).size().unstack()
        share = table.div(table.sum(1), axis=0)
        assert table.shape == (4, 6) and share.to_numpy().min() > 0.03 and share.to_numpy().max() < 0.45
        domain = slide.obs["domain"].cat.codes.to_numpy()
        assert np.mean(domain[neighbours(slide, 6)] == domain[:, None]) > 0.85


def test_depth_is_independent_of_domain(tissue):
    p_values = []
    for slide in tissue:
        total = slide.X.sum(1).A1
        p_values.append(
            stats.kruskal(
                *(total[rows] for rows in slide.obs.groupby("domain", observed=True).indices.values())
            ).pvalue
        )
    assert stats.combine_pvalues(p_values).pvalue > 0.01
    total = np.concatenate([slide.X.sum(1).A1 for slide in tissue])
    assert np.median(total) == pytest.approx(SimulationConfig().depth, rel=0.05)


def test_seed_decides_everything():
    first, again, other = (simulate(replace(SMALL, seed=seed)) for seed in (3, 3, 4))
    longer = simulate(replace(SMALL, seed=3, n_slides=3))
    for a, b, c in zip(first, again, longer):
        for slide in (b, c):
            assert np.array_equal(a.X.toarray(), slide.X.toarray())
            assert np.array_equal(a.obsm["spatial"], slide.obsm["spatial"]) and a.obs.equals(slide.obs)
    assert not np.array_equal(first[0].obsm["spatial"], other[0].obsm["spatial"])
    assert not np.array_equal(first[0].obsm["spatial"], first[1].obsm["spatial"])


def test_spill_over_makes_touching_cells_alike():
    def alike(slide: anndata.AnnData) -> float:
        """Correlation of a cell with its nearest neighbour, over what is left after each gene's mean."""
        x = slide.X.toarray()[:, (slide.var["role"] == "ordinary").to_numpy()]
        x = x / x.sum(1, keepdims=True)
        return stats.pearsonr(
            (x - x.mean(0)).ravel(), (x - x.mean(0))[neighbours(slide, 1)[:, 0]].ravel()
        ).statistic

    clean, leaky = (simulate(replace(SMALL, n_slides=1, spill_over=share))[0] for share in (0.0, 0.3))
    assert np.array_equal(clean.obs["cell_type"], leaky.obs["cell_type"])
    assert clean.X.sum() == leaky.X.sum()  # no molecule is lost
    assert not np.array_equal(clean.X.toarray(), leaky.X.toarray())
    assert alike(leaky) > alike(clean) + 0.1
    with pytest.raises(InputError, match=r"spill_over is 0\.3"):
        oracle([leaky])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_slides", 0),
        ("n_genes", 18),
        ("technologies", (("simscope", 18),)),
        ("technologies", (("simscope", 151),)),
        ("arrangement", "stripes"),
        ("spill_over", 1.0),
        ("dispersion", 0.0),
    ],
)
def test_a_field_out_of_range_is_named(field, value):
    with pytest.raises(InputError, match=f"SimulationConfig: {field} is"):
        SimulationConfig(**{field: value})
