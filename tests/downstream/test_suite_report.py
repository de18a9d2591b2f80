"""A suite's report: what it says follows from the predictions on disk, and it shows all that it drew."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import f1_score
from synthetic_suite import FOLDS, METHODS, Suite, numbers, of, predictions, whole_suite

from scfm_jax.downstream.suite_comparison import compare
from scfm_jax.downstream.suite_report import write_suite_report
from scfm_jax.downstream.suite_results import read_results


class Page(HTMLParser):
    """Tables as rows of texts, bold texts, marks, images and headings of a page."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.bold, self.marks, self.images, self.tags = [], [], [], [], []
        self.paragraphs, self.captions = [], []
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
        elif tag == "figcaption":
            self.captions.append("")
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
        if "figcaption" in tags:
            self.captions[-1] += data
        if "p" in tags:
            self.paragraphs[-1] += data.replace("\N{NO-BREAK SPACE}", " ")
        if "strong" in tags:
            self.bold.append(data)
        if any(attrs.get("class") == "mark" for _, attrs in self._open):
            self.marks.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    suite = whole_suite(tmp_path_factory.mktemp("suite"))
    return suite, read(write_suite_report(suite.write()))


def test_table_says_what_scikit_learn_says_of_the_predictions(whole):
    suite, page = whole
    table = page.tables[0]
    of_scores = ["macro-F1, mean ± SD", "pooled [95%]", "gain at k [95%]", "gain [95%]"]
    assert table[0][:6] == ["method", "k", *of_scores]
    assert [row[:2] for row in table[1:]] == [
        ["majority", "–"],
        ["own expression", "0"],
        ["own + mean of 8", "8"],
        ["own + mean of 16", "16"],
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
    at_k = {0: "own expression", 8: "own + mean of 8", 16: "own + mean of 16"}
    for (method, _, k, _), row in zip(METHODS, table[1:]):
        if k is None or method == at_k[k]:
            assert row[4] == "–"
        else:
            expected = pooled[method, k] - pooled[at_k[k], k]
            assert numbers(row[4])[0] == pytest.approx(expected, abs=1.1e-3)
    # The best baseline has no k, so that every method is held against it.
    best = pooled["own + means of 10, 64, 256", None]
    for (method, _, k, _), row in zip(METHODS, table[1:]):
        if method == "own + means of 10, 64, 256":
            assert (row[5], row[-1]) == ("–", "it is the best baseline")
        else:
            assert numbers(row[5])[0] == pytest.approx(pooled[method, k] - best, abs=1.1e-3)
            assert row[-1] == "own + means of 10, 64, 256"
    assert table[-1][6:10] == [table[-1][6], "35", "512", "0.858"]
    assert page.marks == ["transductive"] * 2  # in both tables of the task
    assert {"LoRA", table[-1][3]} <= set(page.bold)


def test_an_error_that_falls_is_a_gain_and_baselines_are_those_of_the_same_k_or_without(whole):
    suite, page = whole
    table = next(t for t in page.tables if t[0][2].startswith("Jensen-Shannon distance, mean"))
    rows = {tuple(row[:2]): row for row in table[1:]}

    def mean(method, k):
        each = [predictions(suite, task="composition", method=method, k=k, seed=s) for s in (0, 1)]
        return np.mean([jensenshannon(t, p, base=2, axis=1).mean() for t, p in each if len(t)])

    for k, baseline in ((0, "own expression"), (8, "own + mean of 8"), (16, "own + mean of 16")):
        row = rows["LoRA", str(k)]
        assert row[-1] == (baseline if k else "own expression, k = 0")
        gain, low, high = numbers(row[5])
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


def test_page_and_markdown_hold_all_that_was_drawn_and_said(whole):
    suite, page = whole
    drawn = sorted(path.name for path in (suite.folder / "figures").iterdir())
    maps = [f"slide{slide}_{part}" for slide in (0, 1) for part in ("truth", "predicted", "error")]
    wanted = {
        "1_region": ["k", "model", "baseline", "training", "embedding1", "embedding2", *maps],
        "2_density": ["k", "model", "baseline"],
        "3_composition": ["k", "model", "baseline", *maps],
    }
    assert drawn == sorted(f"{task}_{part}.png" for task, parts in wanted.items() for part in parts)
    held = sorted(base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.images)
    assert held == sorted((suite.folder / "figures" / name).read_bytes() for name in drawn)
    assert not {"script", "link", "iframe"} & set(page.tags)
    # The best model's k first; one of two files that differ by a checksum; no cell without an embedding.
    shown = [caption for caption in page.captions if caption.startswith("Embeddings")]
    assert shown == [f"Embeddings of 891 cells, tissue-k{k}-mean, by region." for k in (16, 8)]
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
    suite.task("region", "classes", [("means", "baseline", None, 0.9), *methods], seeds=(0,))
    suite.task("depth", "value", methods, seeds=(0,), folds=[*FOLDS, "3"])
    suite.task("later", "value", [])
    for method in ("LoRA", "means"):
        suite.rows.remove(of(suite.rows, task="region", method=method, fold="1")[0])
    lines = suite.write() / "results.jsonl"
    region, depth, _ = read_results(tmp_path)
    means, own, probe, lora = region.methods
    assert (lora.marks, lora.missing, lora.pooled_folds) == (["incomplete"], ["1"], ["0", "2"])
    assert [method.missing for method in depth.methods] == [["3"]] * 3
    found = compare(region)
    assert (found.best, found.best_model, found.best_baseline) == (own, probe, own)
    # Where both lack a fold, the better baseline is the measure; no fold of the probe may be left out for it.
    assert [gain.against if gain else None for gain in found.gains] == [None, None, own, means]
    held = [predictions(suite, task="region", method=method) for method in ("LoRA", "means")]
    scores = [f1_score(truth, predicted.argmax(1), average="macro") for truth, predicted in held]
    assert found.gains[3].interval.value == pytest.approx(scores[0] - scores[1], abs=1e-12)
    for path in (tmp_path / "tissue").iterdir():
        path.unlink()
    page = read(write_suite_report(tmp_path))
    assert "No results yet: later. Incomplete, with folds missing: region and depth." in page.paragraphs[0]
    assert "Incomplete. Folds are missing of means (fold 1) and LoRA, k = 8 (fold 1)." in page.paragraphs
    assert page.marks.count("incomplete") == 2 * 2 + 2 * 3
    # A line that a crash cut short counts as missing, and nothing else is lost.
    lines.write_text(lines.read_text()[:-40])
    assert [len(method.rows) for method in read_results(tmp_path)[1].methods] == [3, 3, 2]


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
