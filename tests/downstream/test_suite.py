"""A suite from end to end on the tests' tiny tissue and model: rows, resuming, what counts as learnt from."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from scfm_jax.downstream import suite as suite_module
from scfm_jax.downstream.model import TrainedModel
from scfm_jax.downstream.scores import score
from scfm_jax.downstream.suite import run_suite
from scfm_jax.downstream.suite_comparison import compare
from scfm_jax.downstream.suite_config import read_suite
from scfm_jax.downstream.suite_models import Models
from scfm_jax.downstream.suite_results import read_results
from scfm_jax.downstream.suite_tasks import make_task
from scfm_jax.errors import InputError
from scfm_jax.training.metrics import read_metrics
from scfm_jax.training.run import read_run

pytestmark = [
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.filterwarnings("ignore::scfm_jax.errors.DataWarning"),  # few blocks
]

FILE = """
[files.{name}]
path = "{name}.h5ad"
species = "human"
technology = "{technology}"
labels = ["cell_type", "domain"]
"""
FILES = "".join(
    FILE.format(name=name, technology=technology) + more
    for name, technology, more in (
        ("slide0", "simscope", "um_per_unit = 1.0"),
        ("slide1", "simseq", "um_per_unit = 1.0"),
        ("cells", "simseq", "spatial = false"),
    )
)
SMALL = "min_cells = 5\nmin_blocks = 2\nneighbours = [2]\nmeans = []\nchoosing_margin = 2\n"
BLOCKS = "split = { blocks = 4, n_folds = 2, margin = 2, min_kept = 0.05 }\n"
DOMAIN = f"""
[tasks.domain]
files = ["slide0", "slide1"]
labels = ["domain"]
{SMALL}
split = {{ by = "slides", blocks = 4 }}
"""
TINY = """
[models.tiny]
run = "tiny"
"""


@pytest.fixture
def write(tmp_path: Path, corpus_path: Path, finished: Path) -> Callable[[str], Path]:
    """Write a suite beside the slides that the model `tiny` knows, one of them as dissociated cells too."""
    for name in ("slide0", "slide1"):
        (tmp_path / f"{name}.h5ad").symlink_to(corpus_path.parent / f"{name}.h5ad")
    (tmp_path / "tiny").symlink_to(finished)
    cells = anndata.read_h5ad(tmp_path / "slide1.h5ad")
    del cells.obsm["spatial"]
    cells.write_h5ad(tmp_path / "cells.h5ad")

    def write(text: str) -> Path:
        path = tmp_path / "suite.toml"
        path.write_text(FILES + text)
        return path

    return write


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def names(rows: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {(row["method"], row["group"], row["k"], row["fold"], row["seed"]) for row in rows}


def test_a_suite_leaves_rows_that_its_predictions_bear_out_and_a_report(write, tmp_path):
    methods = """
[methods.probe]
way = "probe"
of = ["tiny", "untrained"]
attend = true
folds = [1]

[methods.head]
way = "neighbourhood"
of = ["tiny", "expression"]
beside_expression = true
seeds = [0, 1]
folds = [0]
neighbourhood = { epochs = 2, width = 8 }

[methods.tuned]
way = "finetune"
of = ["tiny"]
folds = [1]
neighbours = [0]
finetune = { epochs = 1, way = "head" }
"""
    out, said = tmp_path / "out", []
    page = run_suite(write(DOMAIN + TINY + methods), out, report=said.append)
    rows = rows_of(out)
    expected = {
        (name, "baseline", k, fold, 0)
        for name, k in (("majority", None), ("own expression", 0), ("own expression + mean of 2", 2))
        for fold in ("slide0", "slide1")
    }
    expected |= {
        ("probe of tiny", "model", 2, "slide1", 0),
        ("probe of untrained", "control", 2, "slide1", 0),
    }
    for seed in (0, 1):
        expected.add(("head of tiny", "model", 2, "slide0", seed))
        expected.add(("head of expression", "control", 2, "slide0", seed))
    expected.add(("tuned of tiny", "model", 0, "slide1", 0))
    assert names(rows) == expected and len(rows) == len(expected)
    assert sum("macro_f1" in line for line in said) == len(rows)
    (task,) = read_results(out)
    tissue, width = task.tissue(), read_run(tmp_path / "tiny")[0].model.encoder.width
    assert tissue.xy.shape == (320, 2) and task.split == "one of slides held out at a time"
    for row in rows:
        held = np.load(out / row["predictions"])
        assert row["scores"] == score("classes", held["truth"], held["predicted"])
        assert np.array_equal(held["truth"], tissue.truth[held["cells"]]) and (held["truth"] >= 0).all()
        assert (
            len(held["cells"]) == row["n_test"]
            and row["n_train"] + row["n_test"] == (tissue.truth >= 0).sum()
        )
        assert set(tissue.slide[held["cells"]]) == {int(row["fold"][-1])}
        assert row["seconds"] > 0 and not row["leaking"]
        # The model has learnt from slide0 alone; baselines and controls from no cell of a test fold.
        assert row["transductive"] == (row["group"] == "model" and row["fold"] == "slide0")
        if row["method"].startswith(("head", "tuned")):
            history = json.loads((out / row["history"]).read_text())
            assert [epoch["epoch"] for epoch in history] == list(range(1, len(history) + 1))
            assert row["stored_bytes"] > 0
        if row["method"].startswith("probe"):  # a float32 weight a class and feature, and a bias
            assert row["stored_bytes"] == 4 * len(task.classes) * (width + 1)
    seeds = [row["scores"] for row in rows if row["method"] == "head of tiny"]
    assert seeds[0] != seeds[1]
    text = page.read_text()
    assert "tuned of tiny" in text and "transductive" in text and (out / "results.md").exists()


class Counting:
    """Stands before `suite._ask`: counts what is asked, and stops like a kill after so many rows."""

    def __init__(self, monkeypatch):
        self.asked, self.last, ask = [], None, suite_module._ask

        def counted(out, data, method, models, key):
            if len(self.asked) == self.last:
                raise KeyboardInterrupt
            self.asked.append(f"{data.task.name} {data.fold.name} {method.name}, {method.k}, {method.seed}")
            return ask(out, data, method, models, key)

        monkeypatch.setattr(suite_module, "_ask", counted)
        monkeypatch.setattr(suite_module, "write_suite_report", lambda folder: folder / "report.html")

    def run(self, path, out, last=None):
        self.asked, self.last = [], last
        if last is None:
            run_suite(path, out)
        else:
            with pytest.raises(KeyboardInterrupt):
                run_suite(path, out)
        return self.asked


PROBE = """
[methods.probe]
way = "probe"
of = ["expression"]
seeds = [0]
beside_expression = false
"""


def test_a_suite_that_was_killed_asks_nothing_twice(write, tmp_path, monkeypatch):
    count, out = Counting(monkeypatch), tmp_path / "out"
    path = write(DOMAIN + PROBE)
    first = count.run(path, out, last=3)
    assert len(rows_of(out)) == 3
    rest = count.run(path, out)
    assert len(rest) == 5 and not set(first) & set(rest) and len(rows_of(out)) == 8
    assert count.run(path, out) == []
    gone = next(row for row in rows_of(out) if row["method"] == "majority" and row["fold"] == "slide1")
    (out / gone["predictions"]).unlink()
    assert count.run(path, out) == ["domain slide1 majority, None, 0"]
    (out / "results.jsonl").open("a").write("half a row")
    with pytest.raises(InputError, match=r"results.jsonl:9: is no row of a suite"):
        run_suite(path, out)


def test_processes_with_different_tasks_share_a_folder(write, tmp_path):
    types = DOMAIN.replace("tasks.domain", "tasks.types").replace('["domain"]', '["cell_type"]')
    path, out, alone = write(DOMAIN + types), tmp_path / "out", tmp_path / "alone"
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run_suite, path, out, tasks=(name,)) for name in ("types", "domain")]:
            assert done.result() == out / "report.html"
    run_suite(path, alone)
    scores = [
        {(row["task"], row["method"], row["fold"]): row["scores"] for row in rows_of(folder)}
        for folder in (out, alone)
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 12
    # In the order of the suite, whoever came first.
    assert [task.name for task in read_results(out)] == ["domain", "types"]
    with pytest.raises(InputError, match="has no task 'place'; name some of domain, types"):
        run_suite(path, tmp_path / "new", tasks=("place",))
    assert not (tmp_path / "new").exists()
    run_suite(write(DOMAIN), out)
    assert {row["task"] for row in rows_of(out)} == {"domain"}
    (out / "tasks.json").write_text("{")
    with pytest.raises(InputError, match=r"tasks.json: holds no tasks of a suite; remove it"):
        run_suite(path, out)


def test_what_changed_is_asked_again_and_what_is_not_wanted_leaves(write, tmp_path, monkeypatch):
    count, out = Counting(monkeypatch), tmp_path / "out"
    assert len(count.run(write(DOMAIN + PROBE), out)) == 8
    more = count.run(write(DOMAIN + PROBE.replace("[0]", "[0, 1]")), out)
    assert more == [f"domain {fold} probe of expression, 2, 1" for fold in ("slide0", "slide1")]
    wider = count.run(write(DOMAIN + PROBE.replace("false", "true")), out)
    assert wider == [f"domain {fold} probe of expression, 2, 0" for fold in ("slide0", "slide1")]
    assert len(rows_of(out)) == 8
    assert len(count.run(write(DOMAIN.replace("min_cells = 5", "min_cells = 6")), out)) == 6
    assert {row["method"][:3] for row in rows_of(out)} == {"maj", "own"}
    assert count.run(write(DOMAIN.replace("min_cells = 5", "min_cells = 6\nfolds = [1]")), out) == []
    assert {row["fold"] for row in rows_of(out)} == {"slide1"}


def test_labels_go_over_to_dissociated_cells_of_another_technology(write, tmp_path):
    """They have no neighbours: means over none are zero, and a model sees each cell alone."""
    text = f"""
[tasks.transfer]
files = ["slide0", "cells"]
labels = ["domain"]
{SMALL}
split = {{ by = "technology", groups = ["simseq"], blocks = 4 }}

[methods.probe]
way = "probe"
of = ["tiny"]
attend = true

[methods.tuned]
way = "finetune"
of = ["tiny"]
finetune = {{ epochs = 1, way = "head" }}
"""
    out = tmp_path / "out"
    run_suite(write(text + TINY), out)
    rows = rows_of(out)
    assert {row["method"] for row in rows} >= {"probe of tiny", "tuned of tiny", "own expression + mean of 2"}
    for row in rows:
        assert row["fold"] == "simseq" and row["n_test"] > 100 and not row["transductive"]
        assert np.isfinite(np.load(out / row["predictions"])["predicted"]).all()
    (task,) = read_results(out)
    tissue = task.tissue()
    assert np.isnan(tissue.xy[tissue.slide == 1]).all() and np.isfinite(tissue.xy[tissue.slide == 0]).all()


def test_mixing_and_imputation(write, tmp_path):
    text = f"""
[tasks.mixed]
kind = "mixing"
files = ["slide0", "slide1"]
labels = ["cell_type"]
{SMALL}

[tasks.masked]
kind = "imputation"
files = ["slide0"]
neighbours = [0, 2]
test_cells = 40
folds = [0]
{BLOCKS}

[methods.plain]
way = "embedding"
of = ["tiny"]

[methods.masking]
way = "imputation"
of = ["tiny", "untrained"]
"""
    out = tmp_path / "out"
    page = run_suite(write(text + TINY), out)
    rows = rows_of(out)
    assert all((row["predictions"] is None) == (row["task"] == "mixed") for row in rows)
    mixed = [row for row in rows if row["task"] == "mixed"]
    assert [row["method"] for row in mixed] == [
        "own expression",
        "own expression + mean of 2",
        "plain of tiny",
    ]
    for row in mixed:
        assert row["fold"] == "" and row["scores"]["overall"] == pytest.approx(
            0.4 * row["scores"]["mixing"] + 0.6 * row["scores"]["conservation"]
        )
    assert [row["transductive"] for row in mixed] == [False, False, True]
    masked = {(row["method"], row["k"]): row["scores"] for row in rows if row["task"] == "masked"}
    assert len(masked) == 3 + 2 * 2
    reference = masked["weighted gene mean", None]
    for scores in masked.values():
        ratio = scores["squared_error"] / reference["squared_error"]
        assert scores["skill"] == pytest.approx(1 - ratio)
    assert masked["masking of tiny", 0] != masked["masking of tiny", 2]
    assert masked["masking of tiny", 2]["skill"] > masked["masking of untrained", 2]["skill"]
    sums = [np.load(out / row["predictions"]) for row in rows if row["task"] == "masked"]
    for held, scores in zip(sums, masked.values(), strict=True):
        assert np.array_equal(held["cells"], sums[0]["cells"]) and len(held["cells"]) == 40
        assert np.array_equal(held["truth"], sums[0]["truth"]) and (held["truth"] > 0).any()
        mean = held["predicted"].sum() / held["truth"].sum()
        assert mean == pytest.approx(scores["squared_error"], rel=1e-5)
    found = compare(read_results(out)[1])
    assert found.best_model.name == "masking of tiny" and found.verdict.interval.low < 0
    assert found.best_baseline.name == "ridge on the cell's other genes"
    text = page.read_text()
    assert "ridge on the cell" in text and "plain of tiny" in text


def test_density_and_composition(write, tmp_path, monkeypatch):
    text = f"""
[tasks.crowd]
kind = "density"
files = ["slide0"]
radius = 30.0
coordinates = true
folds = [0]
{SMALL}{BLOCKS}

[tasks.around]
kind = "composition"
files = ["slide0"]
labels = ["cell_type"]
radius = 60.0
folds = [0]
{SMALL}{BLOCKS}

[methods.probe]
way = "probe"
of = ["expression"]
"""
    out = tmp_path / "out"
    Counting(monkeypatch).run(write(text), out)
    crowd, around = (
        {r["method"]: r for r in rows_of(out) if r["task"] == task} for task in ("crowd", "around")
    )
    assert set(crowd) == {
        "training median",
        "training mean",
        "own expression",
        "own expression + mean of 2",
        "coordinates alone",
        "distance to neighbour 10",
        "probe of expression",
    }
    assert set(around) == {
        "mean composition",
        "own expression",
        "own expression + mean of 2",
        "composition by own type",
        "predicted types of the cells around",
        "probe of expression",
    }
    task = make_task(read_suite(tmp_path / "suite.toml"), "crowd", out / "corpora")
    learnt = task.target[next(task.in_folds()).fold.train]
    for name, value in (("training mean", np.mean(learnt)), ("training median", np.median(learnt))):
        np.testing.assert_allclose(np.load(out / crowd[name]["predictions"])["predicted"], value, rtol=1e-6)
    for task in (crowd, around):  # the same features by another way
        assert task["probe of expression"]["scores"] == task["own expression + mean of 2"]["scores"]
    best = around["predicted types of the cells around"]["scores"]["jensen_shannon"]
    assert best == min(row["scores"]["jensen_shannon"] for row in around.values())


def test_no_model_reads_distances_where_density_is_asked(write, tmp_path, monkeypatch):
    text = f"""
[tasks.crowd]
kind = "density"
files = ["slide0"]
radius = 30.0
folds = [0]
{SMALL}{BLOCKS}

[methods.probe]
way = "probe"
of = ["tiny"]
attend = true
"""
    monkeypatch.setattr(TrainedModel, "coordinates", True)
    Counting(monkeypatch)
    with pytest.raises(InputError, match=r"tiny reads the coordinates of its 2 neighbours"):
        run_suite(write(text + TINY), tmp_path / "out")


def test_what_weights_started_from_counts_as_learnt_from(write, tmp_path, finished):
    """`tiny` has learnt from slide0 and not from slide1; `heir` from slide1, with tiny's weights or none."""
    heir = """
[models.heir]
run = "heir"
"""

    def learnt(slide, more="", **changed):
        content = json.loads((finished / "config.json").read_text())
        content["config"]["split"]["held_out"] = ["slide0*"]
        content["config"]["initial_weights"] = changed.get("start", "")
        content["corpus_hash"] = changed.get("corpus_hash", content["corpus_hash"])
        (tmp_path / "heir").mkdir(exist_ok=True)
        (tmp_path / "heir" / "config.json").write_text(json.dumps(content))
        suite = read_suite(write(DOMAIN + TINY + heir + more))
        task = make_task(suite, "domain", tmp_path / "corpora")
        cells = np.flatnonzero(task.cohort.slide == slide)
        return Models(suite, tmp_path, print).transductive("heir", 0, task, cells)

    assert [learnt(slide) for slide in (0, 1)] == [False, True]
    assert learnt(0, start=str(finished)) and learnt(0, start=str(tmp_path / "gone"))
    # Merged or imported weights, whose corpus is not what they have learnt from.
    assert learnt(0, corpus_hash="") and not learnt(0, "unseen = true\n", corpus_hash="")


def test_a_run_that_is_missing_is_pretrained_for_its_fold(write, tmp_path):
    (tmp_path / "recipe.py").write_text(
        """
from dataclasses import replace
from pathlib import Path

from scfm_jax.corpus.split import SplitConfig
from scfm_jax.training.run import read_run


def recipe():
    config, _ = read_run(Path(__file__).parent / "tiny")
    split = SplitConfig(blocks=4, n_folds=2, margin=2, min_kept=0.05)
    steps = replace(config.optimiser, steps=2, warmup_steps=1)
    model = replace(config.model, encoder=config.model.decoder)  # of one layer
    return replace(config, model=model, split=split, optimiser=steps, evaluate_every=2, checkpoint_every=2)
"""
    )
    text = f"""
[tasks.domain]
files = ["slide0"]
labels = ["domain"]
folds = [1]
{SMALL}{BLOCKS}

[models.made]
run = "{{out}}/runs/made-{{fold}}"

[models.made.pretraining]
recipe = "recipe.py"
files = ["slide0"]
flags = ["--split.fold", "{{fold}}"]

[methods.probe]
way = "probe"
of = ["made", "tiny"]
attend = false
"""
    out = tmp_path / "out"
    run_suite(write(text + TINY), out)
    run = out / "runs" / "made-1"
    assert read_run(run)[0].split.fold == 1
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [1, 2]
    made, tiny = (row for row in rows_of(out) if row["group"] == "model")
    assert not made["transductive"] and tiny["transductive"]  # which has learnt from all of slide0
    # What is there is opened and not made again, even where nothing says how it was made.
    written = (run / "metrics.jsonl").read_bytes()
    how = text[text.index("[models.made.pre") : text.index("[methods.probe]")]
    opened = text.replace(how, "").replace("attend = false", 'pooling = "max"') + TINY
    run_suite(write(opened), out)
    assert (run / "metrics.jsonl").read_bytes() == written
    nowhere = opened.replace("{out}/runs/made-{fold}", "nowhere-{fold}")
    with pytest.raises(InputError, match="nowhere-1: is no run directory"):
        run_suite(write(nowhere), out)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"domain"', '"niche"', r"no label 'niche'; use one of cell_type, domain"),
        ("min_cells = 5", "min_cells = 5000", r"\[tasks.domain\]: label 'domain' has no class in 5000"),
        (
            "means = []",
            "means = []\nfolds = [2]",
            r"\[tasks.domain\]: .* has no fold 2; use 0 to 1",
        ),
        (
            'by = "slides"',
            'by = "column", column = "cell_type"',
            r"'cell_type' is not one value",
        ),
        ("means = []", 'means = []\nkind = "density"\nunit = "file"', r"density is per um"),
        (
            "means = []",
            "means = []\ncoordinates = true",
            r"suite.toml \[tasks.domain\], fold slide0: slide 'slide0' has no training cells",
        ),
    ],
)
def test_bad_tasks_are_told_in_one_line(write, tmp_path, old, new, problem):
    assert DOMAIN.count(old) == 1
    with pytest.raises(InputError, match=problem) as error:
        run_suite(write(DOMAIN.replace(old, new)), tmp_path / "out")
    assert "\n" not in str(error.value)
