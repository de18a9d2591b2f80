"""The whole way in one go on a simulated tissue: simulate, build, pretrain, embed, score, report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from scfm_jax.console import Bar, TrainingBar
from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.corpus.split import Split, split_cells
from scfm_jax.downstream import baselines, metrics
from scfm_jax.downstream.cohort import Cohort
from scfm_jax.downstream.embed import embed_cells
from scfm_jax.downstream.expression import beside_neighbours, components
from scfm_jax.downstream.folds import Fold
from scfm_jax.downstream.imputation import baseline_inputs, masked_expression, predict_masked
from scfm_jax.downstream.linear import linear_answer
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.downstream.page import Table
from scfm_jax.downstream.question import Question
from scfm_jax.downstream.report import Predictions, Tissue, write_report
from scfm_jax.downstream.scores import score
from scfm_jax.errors import InputError
from scfm_jax.simulate import SimulationConfig, simulate
from scfm_jax.training.config import RunConfig
from scfm_jax.training.metrics import read_metrics
from scfm_jax.training.train import train

LABEL = "domain"


def run_demo(
    out: Path, alone: RunConfig, config: RunConfig, simulation: SimulationConfig | None = None
) -> Path:
    """Run the demo into a new folder.

    Parameters
    ----------
    out
        Becomes the run directory; the slides and their corpus go to ``data/`` and ``corpus/`` inside.
    alone
        A first experiment whose weights the second starts from; it goes to ``alone/`` inside.
    config
        The experiment. The corpus of both is set here.
    simulation
        The tissue; the default one if not given.

    Returns
    -------
    The report's page.

    Raises
    ------
    InputError
        The folder exists already.
    """
    if out.exists():
        raise InputError(out, "exists already", "remove it or name another folder")
    corpus_path = str(out / "corpus")
    alone = replace(alone, corpus=corpus_path)
    config = replace(config, corpus=corpus_path, initial_weights=str(out / "alone"))
    simulate_corpus(out, simulation or SimulationConfig())
    for what, stage, folder in (("cells alone", alone, out / "alone"), ("with neighbours", config, out)):
        with TrainingBar(stage.optimiser.steps, what) as bar:
            train(stage, folder, report=bar.report)
    model, corpus = open_model(out), Corpus.open(out / "corpus")
    split = split_cells(corpus, config.split)
    answers, table = score_embeddings(model, corpus, split)
    predictions, errors = score_expression(model, corpus, split)
    test = split.test
    classes = np.array(corpus.labels(LABEL)[1])
    slide = corpus.slides[int(corpus.slide_of(test[:1])[0])]
    place = np.stack([corpus.column(axis, test) for axis in ("x", "y")], axis=1)
    return write_report(
        out,
        title="scfm_jax: a tissue model, pretrained on a simulated tissue",
        history=read_metrics(out / "metrics.jsonl"),
        tables=[table, errors],
        predictions=predictions,
        tissue=Tissue(
            [place],
            [classes[corpus.labels(LABEL, test)[0]]],
            [classes[answers["embedding"].argmax(1)]],
            [slide.name],
        ),
        notes=[
            f"Trained on {len(split.train):,} cells, scored on {len(split.test):,} cells of the held-out "
            f"slide {slide.name}: {alone.optimiser.steps:,} steps on cells alone, then "
            f"{config.optimiser.steps:,} with {config.tissue()[1].neighbours} neighbours.",
            "Domains share their cell types, so a cell's own expression does not give its domain. The "
            "baseline that adds the neighbours' mean is strong: a model below it has learnt nothing that a "
            "mean does not give.",
        ],
    )


def simulate_corpus(out: Path, simulation: SimulationConfig) -> None:
    """Write the slides of a simulated tissue to ``data/`` and their corpus to ``corpus/``."""
    (out / "data").mkdir(parents=True)
    sources = []
    for number, slide in enumerate(simulate(simulation)):
        path = out / "data" / f"slide{number}.h5ad"
        slide.write_h5ad(path)
        technology = str(slide.obs["technology"].iloc[0])
        sources.append(Source(str(path), "human", technology, labels=(LABEL, "cell_type"), um_per_unit=1.0))
    with Bar("building the corpus") as bar:
        build_corpus(
            out / "corpus", sources, progress=lambda what, done, total: bar.update(done, total, what)
        )


def score_embeddings(
    model: TrainedModel, corpus: Corpus, split: Split
) -> tuple[dict[str, Float32[np.ndarray, "m c"]], Table]:
    """Probabilities of the domain from embeddings and from expression, training cells to held-out cells."""
    k = max(model.config.tissue()[1].neighbours, 1)
    codes, classes = corpus.labels(LABEL)
    with Bar("embedding") as bar:
        embedded = embed_cells(model, corpus, np.arange(corpus.n_cells), progress=bar.update)
    cohort, fold = Cohort(corpus, Path(corpus.path), ()), Fold("held out", split.train, split.test)
    near = cohort.neighbours(k)
    question = Question("classes", codes.astype(np.int64), classes, fold.labelled(codes), split.block, near)
    own = components(cohort, fold.train)
    features = {
        "own expression": own,
        f"own + mean of {k} neighbours": beside_neighbours(own, near, (k,)),
        "embedding": embedded,
    }
    answers = {name: linear_answer(matrix, question)[0] for name, matrix in features.items()}
    rows = []
    for name, answer in answers.items():
        scores = score("classes", question.truth, answer)
        rows.append((name, f"{scores['accuracy']:.3f}", f"{scores['macro_f1']:.3f}"))
    caption = "Domain of held-out cells, logistic regression on each"
    return answers, Table(caption, ("features", "accuracy", "macro-F1"), rows)


def score_expression(model: TrainedModel, corpus: Corpus, split: Split) -> tuple[Predictions, Table]:
    """Masked expression of the held-out cells; baselines learn from training cells of the same panel."""
    _, _, config = model.config.tissue()
    test_cells = split.test
    held = masked_expression(corpus, test_cells, config, seed=0)
    same = [np.array_equal(slide.panel, held.panel) for slide in corpus.slides]
    train_cells = split.train
    train_cells = train_cells[np.array(same)[corpus.slide_of(train_cells)]]
    seen = masked_expression(corpus, train_cells, config, seed=1)
    rates = (config.nonzero_rate, config.zero_rate)
    cells, masked = baseline_inputs(seen, split.block[train_cells], held)
    predicted, _, mask = predict_masked(model, corpus, test_cells, held.panel, seed=0)
    methods = {
        "weighted gene mean": baselines.weighted_gene_mean(cells, masked, rates),
        "calibrated mean of 10 neighbours (sees the masked genes)": baselines.calibrated_neighbours(
            cells, masked, rates
        ),
        "ridge on the cell's other genes": baselines.ridge(cells, masked, rates),
        "the model": predicted,
    }
    rows = []
    for name, prediction in methods.items():
        errors = metrics.squared_error(held.values, prediction, mask, held.counts > 0, rates)
        rows.append((name, *(f"{errors[part].mean:.3f}" for part in ("all", "nonzero", "zero"))))
    caption = "Squared error of masked genes in held-out cells, log1p units"
    return (
        Predictions(held.values[mask], predicted[mask]),
        Table(caption, ("method", "all", "non-zeros", "zeros"), rows),
    )
