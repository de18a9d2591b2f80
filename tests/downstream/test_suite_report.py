"""A suite's report: what it says follows from the predictions on disk, and it shows all that it drew."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import f1_score, mean_absolute_error

from scfm_jax.downstream.drawing import class_colour
from scfm_jax.downstream.suite_comparison import compare
from scfm_jax.downstream.suite_maps import ABSENT, WRONG, draw_maps, paint, project
from scfm_jax.downstream.suite_report import verdict, write_suite_report
from scfm_jax.downstream.suite_results import read_results
from scfm_jax.errors import DataWarning, InputError

FOLDS = ("0", "1", "2")
CLASSES = ["cortex", "white matter", "hippocampus", "striatum"]
# name, group, k, noise: the more noise the worse.
METHODS = [
    ("majority", "baseline", None, 9.0),
    ("own expression", "baseline", 0, 2.2),
    *(("own + mean of k nearest", "baseline", k, noise) for k, noise in ((8, 1.6), (16, 1.4))),
    ("own + means of 10, 64, 256", "baseline", None, 1.2),
    ("untrained encoder", "control", 16, 2.6),
    ("probe", "model", 0, 2.4),
    *(("LoRA", "model", k, noise) for k, noise in ((0, 2.0), (8, 1.0), (16, 0.7))),
]


class Suite:
    """A results folder of two slides in 24 blocks and 3 folds, written as a suite writes it."""

    def __init__(self, folder, n=900, seed=0):
        self.folder, self.tasks, self.rows = folder, [], []
        rng = self.rng = np.random.default_rng(seed)
        self.slide = np.repeat([0, 1], n // 2).astype(np.int32)
        self.xy = rng.uniform(0, (600, 400), (n, 2)).astype(np.float32)
        place = (self.xy // (150, 134)).astype(int)
        self.block = (place[:, 0] + 4 * place[:, 1] + 12 * self.slide).astype(np.int32)
        self.fold = self.block * 7 % 3
        self.niche = (self.xy[:, 0] / 600 * 3 + np.sin(self.xy[:, 1] / 60) > np.arange(1, 4)[:, None]).sum(0)
        for name in ("predictions", "tissue"):
            (folder / name).mkdir(parents=True)

    def task(self, name, kind, methods=METHODS, seeds=(0, 1), **more):
        record = {"name": name, "file": "brain.h5ad", "kind": kind, "label": name, "classes": None}
        record |= {"left_out": {}, "split": "blocks of 150 um", "unit": "µm"}
        if kind in ("classes", "composition"):
            record["classes"] = list(CLASSES)
        record |= more
        self.tasks.append(record)
        truth = self.truth(kind)
        np.savez(self.folder / "tissue" / f"{name}.npz", xy=self.xy, slide=self.slide, truth=truth)
        for method, group, k, noise in methods:
            for seed in seeds if group == "model" else (0,):
                for fold in FOLDS:
                    cells = np.flatnonzero(self.fold == int(fold))
                    file = f"predictions/{name}__{method.replace(' ', '_')}__{k}__{fold}__{seed}.npz"
                    predicted = self.predicted(kind, truth[cells], noise)
                    np.savez(
                        self.folder / file,
                        cells=cells,
                        block=self.block[cells],
                        truth=truth[cells],
                        predicted=predicted,
                    )
                    self.rows.append(
                        self.row(record, method, group, k, fold, seed, truth[cells], predicted, file)
                    )

    def truth(self, kind):
        if kind == "classes":
            return self.niche.astype(np.int64)
        if kind == "value":
            return (1 + self.niche + 0.3 * np.cos(self.xy[:, 0] / 40)).astype(np.float32)
        shares = np.exp(2.0 * np.eye(4)[self.niche] + 0.3 * self.rng.normal(size=(len(self.xy), 4)))
        return (shares / shares.sum(1, keepdims=True)).astype(np.float32)

    def predicted(self, kind, truth, noise):
        if kind == "value":
            return (truth + noise * self.rng.normal(size=len(truth))).astype(np.float32)
        signal = 2.5 * np.eye(4)[truth] if kind == "classes" else np.log(truth)
        logits = signal + noise * self.rng.normal(size=(len(truth), 4))
        shares = np.exp(logits)
        return (shares / shares.sum(1, keepdims=True)).astype(np.float32)

    def row(self, task, method, group, k, fold, seed, truth, predicted, file):
        if task["kind"] == "classes":
            scores = {
                "macro_f1": f1_score(truth, predicted.argmax(1), average="macro"),
                "accuracy": float((truth == predicted.argmax(1)).mean()),
                "ece": float(abs(predicted.max(1).mean() - (truth == predicted.argmax(1)).mean())),
            }
        elif task["kind"] == "value":
            scores = {
                "mae": mean_absolute_error(truth, predicted),
                "pearson": np.corrcoef(truth, predicted)[0, 1],
            }
        else:
            scores = {
                "jensen_shannon": jensenshannon(truth, predicted, base=2, axis=1).mean(),
                "mae": np.abs(truth - predicted).mean(),
            }
        return {
            "task": task["name"],
            "kind": task["kind"],
            "method": method,
            "group": group,
            "k": k,
            "fold": fold,
            "seed": seed,
            "leaking": False,
            "transductive": False,
            "scores": {name: float(value) for name, value in scores.items()},
            "seconds": 3.0 + 2 * (k or 0),
            "peak_mib": 512.0 if group == "model" else None,
            "stored_bytes": 900_000 if group == "model" else None,
            "n_train": int((self.fold != int(fold)).sum()),
            "n_test": len(truth),
            "predictions": file,
        }

    def write(self):
        (self.folder / "tasks.json").write_text(json.dumps(self.tasks))
        (self.folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return self.folder


def of(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def whole_suite(folder):
    """Every kind of task, with embeddings, histories, marks, and a class left out."""
    suite = Suite(folder)
    suite.task("region", "classes", left_out={"choroid plexus": 12, "ventricle": 31})
    suite.task("density", "value", [m for m in METHODS if m[0] != "LoRA"] + [("LoRA", "model", 8, 2.1)])
    (folder / "tissue" / "density.npz").unlink()  # no maps then
    suite.task("composition", "composition", METHODS[:4] + METHODS[7:])
    suite.tasks.append(
        {**suite.tasks[0], "name": "technology", "kind": "mixing", "classes": None, "label": "assay"}
    )
    for method, group, value in (("PCA", "baseline", 0.61), ("probe", "model", 0.58)):
        row = {
            **suite.rows[0],
            "task": "technology",
            "kind": "mixing",
            "method": method,
            "group": group,
            "k": None,
        }
        suite.rows.append({**row, "scores": {"mixing": value, "conservation": 0.5}, "predictions": None})
    for row in of(suite.rows, task="region", method="LoRA", k=8):
        row["transductive"] = True
    (folder / "embeddings").mkdir()
    (folder / "history").mkdir()
    cells = np.arange(len(suite.xy))
    embedding = np.eye(8)[suite.niche] + 0.3 * suite.rng.normal(size=(len(cells), 8))
    np.savez(
        folder / "embeddings" / "region_encoder.npz", embedding=embedding.astype(np.float32), cells=cells
    )
    for row in of(suite.rows, task="region", method="LoRA"):
        rows = [
            {"epoch": e, "loss": 1.2 * 0.8**e + 0.1 * suite.rng.random(), "validation": 0.8 - 0.4 * 0.7**e}
            for e in range(1, 11)
        ]
        name = row["predictions"].split("/")[1].replace(".npz", ".json")
        (folder / "history" / name).write_text(json.dumps(rows))
    return suite


class Page(HTMLParser):
    """Tables as rows of texts, bold texts, marks, images and headings of a page."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.bold, self.marks, self.images, self.paragraphs, self.tags = [], [], [], [], [], []
        self._open, self._text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "p":
            self.paragraphs.append("")
        elif tag == "img":
            self.images.append(dict(attrs)["src"])
            self._open.pop()

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        tags = [tag for tag, _ in self._open]
        if {"td", "th"} & set(tags):
            self.tables[-1][-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")
        if "p" in tags:
            self.paragraphs[-1] += data.replace("\N{NO-BREAK SPACE}", " ")
        if "strong" in tags:
            self.bold.append(data)
        if any(attrs.get("class") == "mark" for _, attrs in self._open):
            self.marks.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def numbers(text):
    return [float(x) for x in re.findall(r"[+-]?\d+\.?\d*", text.replace("−", "-"))]


def predictions(suite, **wanted):
    """Truth and probabilities of all folds, in the order of the folds."""
    held = [np.load(suite.folder / row["predictions"]) for row in of(suite.rows, **wanted)]
    return [np.concatenate([file[name] for file in held]) for name in ("truth", "predicted")]


def judged(suite):
    """Comparisons of the tasks, and the first line of the page."""
    tasks = read_results(suite.write())
    comparisons = [compare(task) for task in tasks]
    return comparisons, verdict(tasks, comparisons).replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    suite = whole_suite(tmp_path_factory.mktemp("suite"))
    return suite, read(write_suite_report(suite.write()))


def test_table_says_what_scikit_learn_says_of_the_predictions(whole):
    suite, page = whole
    table = page.tables[0]
    assert table[0][:5] == ["method", "k", "macro-F1, mean ± SD", "pooled [95%]", "gain [95%]"]
    assert [row[:2] for row in table[1:]] == [
        ["majority", "–"],
        ["own expression", "0"],
        ["own + mean of k nearest", "8"],
        ["own + mean of k nearest", "16"],
        ["own + means of 10, 64, 256", "–"],
        ["untrained encoder", "16"],
        ["probe", "0"],
        ["LoRA", "0"],
        ["LoRA transductive", "8"],
        ["LoRA", "16"],
    ]
    pooled = {}
    for (method, _, k, _), row in zip(METHODS, table[1:]):
        rows = of(suite.rows, task="region", method=method, k=k)
        seeds = sorted({row["seed"] for row in rows})
        by_seed = [predictions(suite, task="region", method=method, k=k, seed=seed) for seed in seeds]
        pooled[method, k] = np.mean([f1_score(t, p.argmax(1), average="macro") for t, p in by_seed])
        value, low, high = numbers(row[3])
        assert value == pytest.approx(pooled[method, k], abs=6e-4)
        assert low < value < high
        of_fold = [
            np.mean(
                [r["scores"]["macro_f1"] for r in of(suite.rows, task="region", method=method, k=k, fold=f)]
            )
            for f in FOLDS
        ]
        assert numbers(row[2]) == pytest.approx([np.mean(of_fold), np.std(of_fold, ddof=1)], abs=6e-4)
    # The best baseline has no k, so that every method is held against it.
    best = pooled["own + means of 10, 64, 256", None]
    for (method, _, k, _), row in zip(METHODS, table[1:]):
        if method == "own + means of 10, 64, 256":
            assert (row[4], row[-1]) == ("–", "it is the best baseline")
        else:
            assert numbers(row[4])[0] == pytest.approx(pooled[method, k] - best, abs=1.1e-3)
            assert row[-1] == "own + means of 10, 64, 256"
    assert table[-1][5:9] == [table[-1][5], "35", "512", "0.858"]
    assert page.marks == ["transductive"] * 2  # in both tables of the task
    assert {"LoRA", table[-1][3]} <= set(page.bold)


def test_an_error_that_falls_is_a_gain_and_baselines_are_those_of_the_same_k_or_without(whole):
    suite, page = whole
    table = next(t for t in page.tables if t[0][2].startswith("Jensen-Shannon distance, mean"))
    rows = {tuple(row[:2]): row for row in table[1:]}

    def mean(method, k):
        each = [predictions(suite, task="composition", method=method, k=k, seed=s) for s in (0, 1)]
        return np.mean([jensenshannon(t, p, base=2, axis=1).mean() for t, p in each if len(t)])

    for k, baseline in (
        (0, "own expression"),
        (8, "own + mean of k nearest"),
        (16, "own + mean of k nearest"),
    ):
        row = rows["LoRA", str(k)]
        assert row[-1] == f"{baseline}, k = {k}"
        gain, low, high = numbers(row[4])
        truth, predicted = predictions(suite, task="composition", method=baseline, k=k)
        wanted = jensenshannon(truth, predicted, base=2, axis=1).mean() - mean("LoRA", k)
        assert gain == pytest.approx(wanted, abs=6e-4)
        assert low < gain < high
        assert gain > 0


def test_the_first_line_names_the_tasks_in_which_models_do_and_do_not_win(whole):
    _, page = whole
    first = page.paragraphs[0]
    wins, rest = first.split("Worse, the interval clear of zero: ")
    assert wins.startswith(
        "The best model beats the best baseline, its 95% interval clear of zero, in 2 of 3 tasks"
    )
    assert "region (LoRA, k = 16: +" in wins
    assert "composition (LoRA, k = 16: +" in wins
    assert rest.startswith("density (LoRA, k = 8: −")
    assert rest.endswith("No model is compared with a baseline in technology.")


def test_chance_is_not_called_a_win(tmp_path):
    suite = Suite(tmp_path)
    suite.task("region", "classes", [("own", "baseline", None, 1.5), ("LoRA", "model", 8, 1.5)], seeds=(0,))
    _, first = judged(suite)
    assert first.startswith("No model beats the best baseline in the one task. Not told apart from it")
    low, high = numbers(re.search(r"\[(.*?)\]", first)[1])
    assert low < 0 < high


def test_page_and_markdown_hold_all_that_was_drawn_and_said(whole):
    suite, page = whole
    drawn = sorted(path.name for path in (suite.folder / "figures").iterdir())
    maps = [f"slide{slide}_{part}" for slide in (0, 1) for part in ("truth", "predicted", "error")]
    wanted = {
        "1_region": ["k", "model", "baseline", "training", "embedding1", *maps],
        "2_density": ["k", "model", "baseline"],
        "3_composition": ["k", "model", "baseline", *maps],
    }
    assert drawn == sorted(f"{task}_{part}.png" for task, parts in wanted.items() for part in parts)
    held = sorted(base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.images)
    assert held == sorted((suite.folder / "figures" / name).read_bytes() for name in drawn)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "Left out as too rare: choroid plexus (12 cells) and ventricle (31 cells)." in page.paragraphs
    text = (suite.folder / "results.md").read_text(encoding="utf-8")
    rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]
    plain = [[re.sub(r"\*\*|\\", "", cell) for cell in row] for row in rows if row[0] != "---"]
    flat = [
        [re.sub(r" transductive$", " (transductive)", cell) for cell in row] for t in page.tables for row in t
    ]
    assert [[cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in plain] == flat


def test_a_run_that_lacks_folds_is_marked_never_best_and_compared_on_the_folds_it_has(tmp_path):
    suite = Suite(tmp_path)
    methods = [("own", "baseline", None, 1.5), ("probe", "model", None, 1.6), ("LoRA", "model", 8, 0.3)]
    suite.task("region", "classes", methods, seeds=(0,))
    suite.task("depth", "value", methods, seeds=(0,), folds=[*FOLDS, "3"])
    suite.task("later", "value", [])
    suite.rows.remove(of(suite.rows, task="region", method="LoRA", fold="1")[0])
    lines = suite.write() / "results.jsonl"
    tasks = read_results(tmp_path)
    region, depth, _ = tasks
    lora = region.methods[2]
    assert (lora.marks, lora.missing, lora.pooled_folds) == (["incomplete"], ["1"], ["0", "2"])
    assert [method.missing for method in depth.methods] == [["3"]] * 3
    found = compare(region)
    assert found.best is region.methods[0]
    assert found.best_model is region.methods[1]
    held = [predictions(suite, task="region", method="LoRA")]
    held += (
        [
            np.concatenate(part)
            for part in zip(
                *(predictions(suite, task="region", method="own", fold=fold) for fold in ("0", "2"))
            )
        ],
    )
    scores = [f1_score(truth, predicted.argmax(1), average="macro") for truth, predicted in held]
    assert found.gains[2].interval.value == pytest.approx(scores[0] - scores[1], abs=1e-12)
    for path in (tmp_path / "tissue").iterdir():
        path.unlink()
    page = read(write_suite_report(tmp_path))
    assert "No results yet: later. Incomplete, with folds missing: region and depth." in page.paragraphs[0]
    assert "Incomplete. Folds are missing of LoRA, k = 8 (fold 1)." in page.paragraphs
    assert page.marks.count("incomplete") == 2 + 2 * 3
    # A line that a crash cut short counts as missing, and nothing else is lost.
    lines.write_text(lines.read_text()[:-40])
    assert [len(method.rows) for method in read_results(tmp_path)[1].methods] == [3, 3, 2]


def test_rows_that_leak_are_no_measure_for_rows_that_do_not(tmp_path):
    suite = Suite(tmp_path)
    methods = [("own", "baseline", None, 1.5), ("coordinates", "baseline", None, 0.2)]
    methods += [("probe", "model", None, 0.9), ("LoRA", "model", 8, 0.1), ("wide", "model", 8, 0.4)]
    suite.task("region", "classes", methods, seeds=(0,))
    for row in suite.rows:
        row["leaking"] = row["method"] in ("coordinates", "LoRA")
        row["transductive"] = row["method"] == "wide"
    (found,), first = judged(suite)
    assert found.best.name == found.best_model.name == "probe"
    assert [gain.against.name if gain else None for gain in found.gains] == [None, "own", "own", "own", "own"]
    assert "beats the best baseline, its 95% interval clear of zero, in the one task: region (probe" in first
    for row in suite.rows:
        row["leaking"] = True
    (found,), first = judged(suite)
    assert found.best_model.name == "LoRA"
    assert "(LoRA, k = 8 [leaking]: " in first
    assert "over coordinates [leaking]" in first


def test_few_blocks_are_said_to_be_few(tmp_path):
    suite = Suite(tmp_path)
    suite.block = (suite.block // 4).astype(np.int32)
    suite.fold = suite.block % 3
    methods = [("own", "baseline", None, 1.5), ("LoRA", "model", 8, 0.3)]
    suite.task("region", "classes", methods, seeds=(0,))
    with pytest.warns(DataWarning, match="'region': 6 blocks"):
        judged(suite)
    for row in suite.rows:
        path = tmp_path / row["predictions"]
        held = dict(np.load(path))
        np.savez(path, **{**held, "block": np.zeros_like(held["block"])})
    (found,), first = judged(suite)
    truth, predicted = predictions(suite, method="LoRA")
    assert found.pooled[1].value == pytest.approx(f1_score(truth, predicted.argmax(1), average="macro"))
    assert np.isnan([found.pooled[1].low, found.gains[1].interval.high]).all()
    assert first.startswith("No model beats the best baseline in the one task. Without an interval")


def test_maps_colour_cells_by_what_is_true_said_and_wrong(tmp_path):
    suite = Suite(tmp_path)
    suite.task("region", "classes", [("own", "baseline", None, 1.0)])
    (task,) = read_results(suite.write())
    pooled = task.pooled(task.methods[0])
    some = pooled._replace(cells=pooled.cells[::2], truth=pooled.truth[::2], by_seed=[pooled.by_seed[0][::2]])
    (row, _) = draw_maps(task, task.tissue(), task.methods[0], some, f"{tmp_path}/region")
    truth, predicted, error = (matplotlib.image.imread(drawing.path)[..., :3] for drawing in row)
    shown = [[area(image, class_colour(code)) for code in range(4)] for image in (truth, predicted)]
    assert np.argsort(shown[0]).tolist() == np.argsort(np.bincount(suite.niche[suite.slide == 0])).tolist()
    assert min(shown[1]) > 300
    assert area(truth, ABSENT) < 300 < 3 * 300 < area(predicted, ABSENT)
    assert area(truth, WRONG) == 0 < area(error, WRONG)
    here = suite.slide[some.cells] == 0
    wrong = (some.by_seed[0].argmax(1) != some.truth)[here].mean()
    assert row[2].caption == f"{wrong:.1%} of {here.sum()} tested cells are wrong."
    suite.slide[:] = 0
    on_one = task.tissue()._replace(slide=suite.slide)
    perfect = some._replace(by_seed=[np.eye(4, dtype=np.float32)[some.truth]])
    (row,) = draw_maps(task, on_one, task.methods[0], perfect, f"{tmp_path}/perfect")
    right = matplotlib.image.imread(row[2].path)[..., :3]
    assert area(right, WRONG) < 0.2 * area(error, WRONG)  # the legend's
    with pytest.raises(InputError, match=r"region\.npz: 'xy' has 900 rows, and cell 900 is predicted"):
        draw_maps(task, task.tissue(), task.methods[0], pooled._replace(cells=pooled.cells + 1), "x")


def area(image, colour):
    return int((np.abs(image - to_rgb(colour)).max(-1) < 0.02).sum())


def test_of_many_classes_the_commonest_have_colours_of_their_own(tmp_path):
    suite = Suite(tmp_path)
    suite.task("region", "classes", [], classes=[f"type {i}" for i in range(49)])
    suite.task("depth", "value", METHODS[:1])
    task = read_results(suite.write())[0]
    truth = np.repeat(np.arange(49), np.arange(49) + 1)
    painted = paint(task, truth, np.append(np.arange(49), -1))
    own = painted.colours[34:49]
    assert len(np.unique(own, axis=0)) == 15
    assert len(np.unique(painted.colours[:34], axis=0)) == 1
    labels = [handle.get_label() for handle in painted.handles]
    assert labels == [*(f"type {i}" for i in range(34, 49)), "other (34 classes)", "no label"]
    assert tuple(painted.colours[-1]) == to_rgb(ABSENT)


def test_projection_is_that_of_the_singular_values(monkeypatch):
    monkeypatch.setattr("scfm_jax.downstream.suite_maps.find_spec", lambda name: None)
    x = np.random.default_rng(0).normal(size=(200, 6)) * [5, 3, 1, 1, 1, 1]
    xy, axes = project(x.astype(np.float32))
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(xy), np.abs(u[:, :2] * s[:2]), atol=1e-4)
    shares = s**2 / (s**2).sum()
    assert axes == (f"PC 1 ({shares[0]:.0%})", f"PC 2 ({shares[1]:.0%})")


def test_the_same_results_give_the_same_bytes(tmp_path):
    suite = Suite(tmp_path, n=200)
    suite.slide[:] = 0
    suite.task("region", "classes", METHODS[-2:], seeds=(0,))
    suite.write()

    def written():
        write_suite_report(tmp_path)
        files = [tmp_path / "report.html", tmp_path / "results.md", *(tmp_path / "figures").iterdir()]
        return {path.name: path.read_bytes() for path in files}

    assert written() == written()


def change(field, value):
    return lambda suite: suite.rows[4].__setitem__(field, value)


def predictions_with(**arrays):
    def spoil(suite):
        path = suite.folder / suite.rows[4]["predictions"]
        changed = {**np.load(path), **arrays}
        np.savez(path, **{name: x for name, x in changed.items() if x is not None})

    return spoil


def attach(name, text):
    def spoil(suite):
        path = suite.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda suite: suite.rows.clear(), r"results.jsonl: holds no results; run the suite first"),
        (lambda suite: suite.tasks.clear(), r"tasks.json: is no list of tasks"),
        (lambda suite: suite.tasks.append(suite.tasks[0]), r"tasks.json: two tasks have the same 'name'"),
        (lambda suite: suite.tasks[0].pop("split"), r"tasks.json: task 1 has no field 'split'"),
        (lambda suite: suite.rows[4].pop("seconds"), r"results.jsonl: line 5 has no field 'seconds'"),
        (change("k", "8"), r"line 5: field 'k' is '8', not int or null"),
        (change("leaking", 0), r"line 5: field 'leaking' is 0, not bool"),
        (change("seed", True), r"line 5: field 'seed' is True, not int"),
        (change("group", "winner"), r"line 5: field 'group' is 'winner', none of baseline, control, model"),
        (change("task", "regoin"), r"line 5: field 'task' is 'regoin', none of region"),
        (change("kind", "value"), r"line 5: field 'kind' is 'value', none of classes"),
        (change("scores", {"accuracy": 1.0}), r"line 5, 'scores' has no field 'macro_f1'"),
        (change("predictions", None), r"line 5: field 'predictions' is None, not str"),
        (lambda suite: suite.rows.append(suite.rows[4]), r"results.jsonl: line 7 repeats a run"),
        (change("predictions", "predictions/gone.npz"), r"predictions/gone.npz: is missing; put it back"),
        (predictions_with(block=None), r"npz: has no field 'block'"),
        (predictions_with(truth=np.zeros(3, int)), r"npz: the fields cells, .* have \[3, \d+\] rows"),
        (predictions_with(predicted=np.zeros((1, 4))), r"npz: the fields .* have \[1, \d+\] rows"),
        (
            lambda suite: suite.tasks[0]["classes"].append("fifth"),
            r"npz: 'predicted' is of shape .* not \[\d+, 5\]",
        ),
        (attach("embeddings/other.npz", ""), r"embeddings/other.npz: is of no task; name it after"),
        (attach("embeddings/region.npz", "no zip"), r"embeddings/region.npz: cannot be read"),
        (
            attach("history/region.json", '[{"epoch": 1}]'),
            r"history/region.json: a row has no number",
        ),
    ],
)
def test_bad_input_names_the_file_the_field_and_the_mend(tmp_path, spoil, message):
    suite = Suite(tmp_path, n=200)
    suite.task("region", "classes", [("own", "baseline", None, 1.5), ("LoRA", "model", 8, 1.0)], seeds=(0,))
    (tmp_path / "tissue" / "region.npz").unlink()
    spoil(suite)
    suite.write()
    with pytest.raises(InputError, match=message):
        write_suite_report(tmp_path)


@pytest.mark.parametrize("name", ["tasks.json", "results.jsonl"])
def test_a_folder_without_results_is_an_error(tmp_path, name):
    suite = Suite(tmp_path, n=200)
    suite.task("region", "classes", METHODS[:1])
    (suite.write() / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: is missing; name the results folder of a suite"):
        write_suite_report(tmp_path)


def test_methods_scored_on_other_cells_are_not_compared(tmp_path):
    suite = Suite(tmp_path, n=200)
    suite.task("region", "classes", [("own", "baseline", None, 1.5), ("LoRA", "model", 8, 1.0)], seeds=(0,))
    path = tmp_path / suite.rows[4]["predictions"]
    held = dict(np.load(path))
    np.savez(path, **{**held, "cells": held["cells"] + 1})
    with pytest.raises(InputError, match="'cells' differs between the methods or seeds of task 'region'"):
        judged(suite)
