"""The built-in tissue: cell types in spatial domains that signal to their neighbours, read as noisy counts.

It stands in for a data set wherever the truth must be known: in the demo, in tests, and for asking whether
a model can use a cell's neighbours at all. It is a generative model of its own, not a fit to any tissue.
Lengths are in um.

Positions
    A slide has n cells on a hexagonal lattice with ``spacing`` a between centres, each moved by a Gaussian of
    standard deviation 0.15 a. Density is thus the same in every domain. Cells i and j touch when
    ``|x_i - x_j| < 1.3 a``.
Domains
    ``d_i`` in 0..D-1 by place alone. "patches": the nearest of 3 D seeds, dealt to the domains in turn.
    "layers": D bands across the slide with a wavy edge.
Types
    ``t_i ~ Categorical(p[d_i])`` independently, where ``p[d]`` is a softmax over types of ``0.6 z`` with
    ``z`` the standardised sine of a type's place on a circle, turned by ``d / D``: every type lives in
    every domain, in other proportions, so a cell alone says little of its domain and its neighbours say
    much.
Activity (relative expression before signalling), ``a_ig`` of gene g in cell i
    * ordinary gene: ``exp(b_g + 2.5 [g marks t_i])``, ``b_g ~ N(-2, 0.8^2)``; a gene marks one type with
      probability 0.5;
    * ligand of triple r: ``8 w[d_i, r] v`` in the third of types that send it, 0.1 v elsewhere, with ``w``
      either 1.25 or 1 / 1.25, each in half of the domains;
    * receptor of triple r: ``4 v`` in the half of types that receive, ``0.4 v`` elsewhere;
    * target of triple r: ``0.08 exp(0.3 e[t_i, r])``, ``e ~ N(0, 1)``;
    * ``v = exp(0.3 N(0, 1))`` is drawn for each cell and each of its ligands and receptors; signalling acts
      on the result.
Signalling
    ``m_ir`` is the mean activity of ligand r over the cells within ``radius`` of cell i (itself not
    counted; 0 where there is none), and ``z_ir = a_i,receptor(r) m_ir``. The target's activity is
    multiplied by

        1 + strength * z_ir^2 / (z_ir^2 + kappa^2)

    with ``kappa`` such that a receiving cell with the average share of average senders around it is half on.
Counts
    ``e_kg = exp(0.3 N(0, 1))`` is the efficiency of technology k for gene g, ``rho_ig`` the share ``a_ig
    e_kg / sum_g' a_ig' e_kg'`` over the panel of the slide's technology, ``s_i ~ LogNormal(log depth,
    depth_sigma)`` the depth, which depends on nothing, and ``y_ig ~ NB(mean = s_i rho_ig, variance = mean +
    dispersion mean^2)``.
Spill-over
    Each molecule of a cell is then read, with probability ``spill_over``, in one of the cells that touch
    it, all equally likely. No molecule is lost (a cell that touches none keeps its own).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import sparse
from scipy.interpolate import RectBivariateSpline
from scipy.spatial import KDTree
from scipy.stats import nbinom

from scfm_jax.errors import InputError

_SIGNALLING = ("ligand", "receptor", "target")


@dataclass(frozen=True)
class SimulationConfig:
    """Sizes and strengths of a simulated tissue; the module says what each does in the model.

    Attributes
    ----------
    n_slides, cells_per_slide, n_genes
        Slides, cells in each, and genes in all: ``3 n_triples`` of them signal.
    technologies
        Name and panel size of each technology; slides take them in turn. All signalling genes are in every
        panel, the others are dealt so that the panels cover as many genes as they can.
    n_types, n_domains, arrangement
        Cell types, spatial domains, and how domains lie on a slide.
    n_triples, radius, strength
        Ligand-receptor-target triples; how far a ligand reaches, um; how many times its base a full signal
        adds to a target.
    spacing
        Distance between the centres of adjacent cells, um.
    depth, depth_sigma, dispersion
        Median counts of a cell, standard deviation of their logarithm, and the dispersion of the negative
        binomial.
    spill_over
        Share of a cell's molecules read in the cells that touch it.
    seed
        The tissue is a function of the config; a slide does not depend on how many slides there are.

    Raises
    ------
    InputError
        A field out of its range.
    """

    n_slides: int = 4
    cells_per_slide: int = 1600
    n_genes: int = 150
    technologies: tuple[tuple[str, int], ...] = (("simscope", 120), ("simseq", 110))
    n_types: int = 6
    n_domains: int = 4
    arrangement: Literal["patches", "layers"] = "patches"
    n_triples: int = 6
    radius: float = 24.0
    strength: float = 60.0
    spacing: float = 15.0
    depth: float = 200.0
    depth_sigma: float = 0.35
    dispersion: float = 0.1
    spill_over: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        signalling = 3 * self.n_triples
        checks = {
            "n_slides": (self.n_slides >= 1, "give 1 or more"),
            "cells_per_slide": (self.cells_per_slide >= 1, "give 1 or more"),
            "n_genes": (self.n_genes > signalling, f"give more than 3 n_triples = {signalling}"),
            "technologies": (
                len(self.technologies) > 0
                and all(signalling < size <= self.n_genes for _, size in self.technologies),
                f"give panel sizes over 3 n_triples = {signalling} and at most n_genes = {self.n_genes}",
            ),
            "n_types": (self.n_types >= 3, "give 3 or more"),
            "n_domains": (self.n_domains >= 1, "give 1 or more"),
            "arrangement": (self.arrangement in ("patches", "layers"), 'give "patches" or "layers"'),
            "n_triples": (self.n_triples >= 1, "give 1 or more"),
            "radius": (self.radius > 0, "give a length in um over 0"),
            "strength": (self.strength >= 0, "give 0 or more"),
            "spacing": (self.spacing > 0, "give a length in um over 0"),
            "depth": (self.depth > 0, "give a number of counts over 0"),
            "depth_sigma": (self.depth_sigma >= 0, "give 0 or more"),
            "dispersion": (self.dispersion > 0, "give a number over 0"),
            "spill_over": (0 <= self.spill_over < 1, "give a share from 0 to below 1"),
        }
        for field in fields(self):
            valid, mend = checks.get(field.name, (True, ""))
            if not valid:
                value = getattr(self, field.name)
                raise InputError("SimulationConfig", f"{field.name} is {value!r}, out of range", mend)


@dataclass(frozen=True, eq=False)
class _Rules:
    """What all slides of a tissue share, drawn once from the seed."""

    genes: tuple[str, ...]
    roles: tuple[str, ...]
    proportions: Float[np.ndarray, "domains types"]
    activity: Float[np.ndarray, "domains types genes"]
    noisy: np.ndarray
    kappa: float
    panels: list[Int[np.ndarray, " panel"]]
    efficiency: Float[np.ndarray, "technologies genes"]


def _draw_rules(config: SimulationConfig) -> _Rules:
    rng = np.random.default_rng([config.seed, 0])
    n_types, n_domains, n_triples = config.n_types, config.n_domains, config.n_triples
    n_ordinary = config.n_genes - 3 * n_triples

    angle = np.arange(n_types)[None] / n_types + np.arange(n_domains)[:, None] / n_domains
    preference = np.exp(0.6 * np.sqrt(2) * np.sin(2 * np.pi * angle))
    proportions = preference / preference.sum(1, keepdims=True)

    senders = np.zeros((n_types, n_triples), bool)
    receivers = np.zeros((n_types, n_triples), bool)
    induced = np.zeros((n_domains, n_triples), bool)
    for triple in range(n_triples):
        senders[rng.permutation(n_types)[: n_types // 3], triple] = True
        receivers[rng.permutation(n_types)[: n_types // 2], triple] = True
        induced[rng.permutation(n_domains)[: n_domains // 2], triple] = True
    ligand = np.where(senders, 8.0 * np.where(induced, 1.25, 1 / 1.25)[:, None], 0.1)
    receptor = np.where(receivers, 4.0, 0.4)
    target = 0.08 * np.exp(0.3 * rng.standard_normal((n_types, n_triples)))
    marked = np.where(rng.random(n_ordinary) < 0.5, rng.integers(n_types, size=n_ordinary), -1)
    ordinary = np.exp(rng.normal(-2.0, 0.8, n_ordinary) + 2.5 * (marked == np.arange(n_types)[:, None]))

    def in_all_domains(of_type: np.ndarray) -> np.ndarray:
        return np.broadcast_to(of_type, (n_domains, *of_type.shape))

    activity = np.concatenate([ligand, *map(in_all_domains, (receptor, target, ordinary))], axis=2)
    average_ligand = np.einsum("dt,dtr->", proportions, ligand) / (n_domains * n_triples)

    panels, covered = [], np.zeros(n_ordinary)
    for _, size in config.technologies:
        # Least covered first, ties at random: panels overlap only as far as their sizes ask.
        chosen = np.lexsort((rng.random(n_ordinary), covered))[: size - 3 * n_triples]
        covered[chosen] += 1
        panels.append(np.sort(np.concatenate([np.arange(3 * n_triples), 3 * n_triples + chosen])))

    return _Rules(
        genes=tuple(f"{role.upper()}{r}" for role in _SIGNALLING for r in range(n_triples))
        + tuple(f"GENE{g:04d}" for g in range(n_ordinary)),
        roles=tuple(role for role in _SIGNALLING for _ in range(n_triples)) + ("ordinary",) * n_ordinary,
        proportions=proportions,
        activity=activity,
        noisy=np.arange(config.n_genes) < 2 * n_triples,
        kappa=float(4.0 * average_ligand),
        panels=panels,
        efficiency=np.exp(0.3 * rng.standard_normal((len(config.technologies), config.n_genes))),
    )


def simulate(config: SimulationConfig) -> list[anndata.AnnData]:
    """Draw a tissue: one AnnData a slide, as a laboratory would hand it over, with the truth beside it.

    Returns
    -------
    list of AnnData
        ``X``: counts [cells, panel], CSR float32 of whole numbers; ``obsm["spatial"]``: float64 [cells, 2],
        um; ``obs``: ``domain``, ``cell_type`` (categories over the whole tissue), ``slide``,
        ``technology``; ``var``: the panel's genes by name with their ``role`` ("ligand", "receptor",
        "target" or "ordinary"; triple r is ``LIGANDr``, ``RECEPTORr``, ``TARGETr``) and the technology's
        ``efficiency``; ``layers["activity"]``: float32, the true activity before signalling;
        ``uns["simulation"]``: the config and ``kappa``.
    """
    rules = _draw_rules(config)
    return [_draw_slide(config, rules, slide) for slide in range(config.n_slides)]


def _draw_slide(config: SimulationConfig, rules: _Rules, slide: int) -> anndata.AnnData:
    rng = np.random.default_rng([config.seed, 1 + slide])
    technology = slide % len(config.technologies)
    panel, efficiency = rules.panels[technology], rules.efficiency[technology, rules.panels[technology]]

    places = _draw_places(config, rng)
    domain = _draw_domains(config, places, rng)
    # Inverse of the cumulative proportions: one uniform a cell.
    cell_type = (rng.random(len(places))[:, None] > rules.proportions.cumsum(1)[domain, :-1]).sum(1)
    activity = rules.activity[domain, cell_type]
    activity[:, rules.noisy] *= np.exp(0.3 * rng.standard_normal((len(places), rules.noisy.sum())))
    activity = activity[:, panel]

    ligand, receptor, target = (np.flatnonzero(np.array(rules.roles)[panel] == role) for role in _SIGNALLING)
    signal = _mean_within(places, config.radius) @ activity[:, ligand]
    expressed = activity * efficiency
    expressed[:, target] *= _response(activity[:, receptor] * signal, config.strength, rules.kappa)
    depth = np.exp(rng.normal(np.log(config.depth), config.depth_sigma, (len(places), 1)))
    mean = depth * expressed / expressed.sum(1, keepdims=True)
    counts = rng.poisson(mean * rng.gamma(1 / config.dispersion, config.dispersion, mean.shape))
    if config.spill_over > 0:
        counts = _spill(counts, places, 1.3 * config.spacing, config.spill_over, rng)

    name = f"slide{slide}"
    obs = pd.DataFrame(
        {
            "domain": _categorical("domain", domain, config.n_domains),
            "cell_type": _categorical("type", cell_type, config.n_types),
            "slide": pd.Categorical([name] * len(places)),
            "technology": pd.Categorical([config.technologies[technology][0]] * len(places)),
        },
        index=[f"{name}-{cell}" for cell in range(len(places))],
    )
    var = pd.DataFrame(
        {"role": [rules.roles[g] for g in panel], "efficiency": efficiency},
        index=[rules.genes[g] for g in panel],
    )
    settings = {key: value for key, value in asdict(config).items() if key != "technologies"}
    return anndata.AnnData(
        X=sparse.csr_matrix(counts, dtype=np.float32),
        obs=obs,
        var=var,
        obsm={"spatial": places},
        layers={"activity": activity.astype(np.float32)},
        uns={"simulation": {**settings, "kappa": rules.kappa}},
    )


def _categorical(name: str, codes: Int[np.ndarray, " n"], size: int) -> pd.Categorical[str]:
    return pd.Categorical.from_codes(codes, categories=pd.Index([f"{name}{code}" for code in range(size)]))


def _draw_places(config: SimulationConfig, rng: np.random.Generator) -> Float[np.ndarray, "n 2"]:
    height = np.sqrt(3) / 2
    columns = int(np.ceil(np.sqrt(config.cells_per_slide * height)))
    row, column = np.divmod(np.arange(config.cells_per_slide), columns)
    lattice = np.stack([column + 0.5 * (row % 2), height * row], axis=1)
    return config.spacing * (lattice + 0.15 * rng.standard_normal(lattice.shape))


def _draw_domains(
    config: SimulationConfig, places: Float[np.ndarray, "n 2"], rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    low, high = places.min(0), places.max(0)
    if config.arrangement == "patches":
        seeds = rng.uniform(low, high, (3 * config.n_domains, 2))
        return np.asarray(KDTree(seeds).query(places)[1]) % config.n_domains
    x, y = ((places - low) / np.maximum(high - low, config.spacing)).T
    wave = 0.25 / config.n_domains * np.sin(2 * np.pi * (2 * x + rng.random()))
    return np.clip((config.n_domains * (y + wave)).astype(int), 0, config.n_domains - 1)


def _mean_within(places: Float[np.ndarray, "n 2"], radius: float) -> sparse.csr_array:
    """Matrix that takes the mean over the other cells within a radius; an empty row where there is none."""
    pairs = KDTree(places).query_pairs(radius, output_type="ndarray")
    ends = np.concatenate([pairs, pairs[:, ::-1]])
    near = sparse.csr_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(places), len(places)))
    return sparse.csr_array(sparse.diags_array(1 / np.maximum(near.sum(1), 1)) @ near)


def _response(z: Float[np.ndarray, "*shape"], strength: float, kappa: float) -> Float[np.ndarray, "*shape"]:
    """Factor on a target's activity: a Hill curve of exponent 2."""
    return 1 + strength * z**2 / (z**2 + kappa**2)


def _spill(
    counts: Int[np.ndarray, "n g"],
    places: Float[np.ndarray, "n 2"],
    reach: float,
    share: float,
    rng: np.random.Generator,
) -> Int[np.ndarray, "n g"]:
    touching = KDTree(places).query_ball_point(places, reach)
    others = [[j for j in near if j != i] for i, near in enumerate(touching)]
    degree = np.array([len(near) for near in others])
    left = rng.binomial(counts, share * (degree > 0)[:, None])
    result = counts - left
    # A multinomial as a chain of binomials: neighbour after neighbour takes its share of what is left.
    for rank in range(degree.max()):
        sender = np.flatnonzero(degree > rank)
        moved = rng.binomial(left[sender], 1 / (degree[sender] - rank)[:, None])
        left[sender] -= moved
        np.add.at(result, [others[i][rank] for i in sender], moved)
    return result


def _expected_log1p(
    dispersion: float, total: Float[np.ndarray, "n 1"], scale: Float[np.ndarray, "n 1"]
) -> RectBivariateSpline:
    """Table of E[log1p(scale y)], y negative binomial, over the logarithms of its mean and of the scale."""
    log_mean = np.linspace(np.log(1e-6), np.log(total.max()), 128)
    log_scale = np.linspace(np.log(scale.min()) - 0.1, np.log(scale.max()) + 0.1, 32)
    success = 1 / (1 + dispersion * np.exp(log_mean))
    y = np.arange(nbinom.ppf(1 - 1e-9, 1 / dispersion, success[-1]) + 1)
    probability = nbinom.pmf(y, 1 / dispersion, success[:, None])
    return RectBivariateSpline(log_mean, log_scale, probability @ np.log1p(y[:, None] * np.exp(log_scale)))


@dataclass(frozen=True, eq=False)
class Oracle:
    """What the generator predicts for the targets; a cell's own type, activity and total are always known.

    Attributes
    ----------
    genes
        Names of the targets.
    value
        float64 [cells, targets], what is predicted: ``log1p(count / total * median total of the slide)``.
    own
        The mean ligand around the cell averaged over its distribution in cells of the same type.
    own_domain
        The same within the cell's type and domain, as if the cell knew its domain too.
    observed
        The mean ligand around the cell estimated from its neighbours' counts, which a model can see.
    latent
        The true mean ligand: the best prediction there is.
    """

    genes: tuple[str, ...]
    value: Float[np.ndarray, "n targets"]
    own: Float[np.ndarray, "n targets"]
    own_domain: Float[np.ndarray, "n targets"]
    observed: Float[np.ndarray, "n targets"]
    latent: Float[np.ndarray, "n targets"]

    def error(self, prediction: Literal["own", "own_domain", "observed", "latent"]) -> float:
        """Mean squared error over cells and targets."""
        return float(np.mean((self.value - getattr(self, prediction)) ** 2))


def oracle(slides: Sequence[anndata.AnnData], *, donors: int = 64) -> Oracle:
    """Predict the target genes of a simulated tissue from its truth, without and with the neighbours.

    Neighbours are those that ``obsm["spatial"]`` shows now, so shuffling it shows what they are worth. The
    expectation of the logarithm is taken over the negative binomial at the cell's observed total (the
    total's own share of the noise is left out: with targets at a few per cent of it, that is small and the
    same for all predictions). ``observed`` puts the counts' estimate of the ligand in place of the truth,
    so it bounds from below what the neighbours' counts are worth.

    Parameters
    ----------
    slides
        As `simulate` returns them, all of one tissue, without spill-over.
    donors
        Cells drawn from each group to average the unknown ligand over.

    Raises
    ------
    InputError
        A tissue with spill-over, where a target's counts are not only its own.
    """
    settings = slides[0].uns["simulation"]
    if settings["spill_over"] > 0:
        raise InputError("oracle", f"spill_over is {settings['spill_over']}", "simulate with spill_over = 0")
    base, rest, receptor, true_ligand, seen_ligand, total, scale, value = (
        np.concatenate(parts) for parts in zip(*map(_what_the_oracle_knows, slides))
    )
    expected = _expected_log1p(settings["dispersion"], total, scale)

    def predict(ligand: Float[np.ndarray, "n triples"]) -> Float[np.ndarray, "n targets"]:
        on = base * _response(receptor * ligand, settings["strength"], settings["kappa"])
        mean = total * on / (rest + on.sum(1, keepdims=True))
        return expected.ev(np.log(mean), np.log(scale))

    def average_within(group: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n targets"]:
        rng = np.random.default_rng(0)
        drawn = np.empty((donors, len(group)), int)
        for label in np.unique(group):
            members = np.flatnonzero(group == label)
            drawn[:, members] = rng.choice(members, (donors, len(members)))
        return np.mean([predict(true_ligand[donor]) for donor in drawn], axis=0)

    types = np.concatenate([slide.obs["cell_type"].cat.codes for slide in slides]).astype(int)
    domains = np.concatenate([slide.obs["domain"].cat.codes for slide in slides]).astype(int)
    return Oracle(
        genes=tuple(slides[0].var_names[slides[0].var["role"] == "target"]),
        value=value,
        own=average_within(types),
        own_domain=average_within(types + domains * (types.max() + 1)),
        observed=predict(seen_ligand),
        latent=predict(true_ligand),
    )


def _what_the_oracle_knows(slide: anndata.AnnData) -> tuple[Float[np.ndarray, "n _"], ...]:
    """Base of the targets, rest, receptors, mean ligands (true, estimated), totals, scales and values."""
    ligand, receptor, target = (np.flatnonzero(slide.var["role"] == role) for role in _SIGNALLING)
    activity, efficiency = slide.layers["activity"].astype(float), slide.var["efficiency"].to_numpy()
    base = (activity * efficiency)[:, target]
    rest = (activity * efficiency).sum(1, keepdims=True) - base.sum(1, keepdims=True)

    total = np.maximum(np.asarray(slide.X.sum(1)).reshape(-1, 1), 1)
    scale = np.median(total) / total
    seen = slide.X[:, ligand].toarray() / total / efficiency[ligand]
    # A share of counts becomes an activity by the slide's average ratio of the two.
    seen *= activity[:, ligand].mean(0) / seen.mean(0)
    near = _mean_within(slide.obsm["spatial"], slide.uns["simulation"]["radius"])
    value = np.log1p(slide.X[:, target].toarray() * scale)
    return base, rest, activity[:, receptor], near @ activity[:, ligand], near @ seen, total, scale, value
