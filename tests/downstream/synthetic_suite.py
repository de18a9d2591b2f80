"""A suite's results folder of a made-up tissue: a method's predictions are as good as its noise allows."""

from __future__ import annotations

import json
import re

import numpy as np
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import f1_score, mean_absolute_error

from scfm_jax.downstream.suite_comparison import compare
from scfm_jax.downstream.suite_report import verdict
from scfm_jax.downstream.suite_results import read_results

FOLDS = ("0", "1", "2")
CLASSES = ["cortex", "white matter", "hippocampus", "striatum"]
# name, group, k, noise: the more noise the worse.
METHODS = [
    ("majority", "baseline", None, 9.0),
    ("own expression", "baseline", 0, 2.2),
    *((f"own + mean of {k}", "baseline", k, noise) for k, noise in ((8, 1.6), (16, 1.4))),
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
        record |= {"left_out": {}, "split": "blocks of 150 um"}
        units = {"value": "log1p(cells per 1,000 µm²)", "composition": "shares within 50 µm"}
        record["unit"] = units.get(kind, "")
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
    embedding[:9] = np.nan  # of cells of which the model knows no gene
    for what in ("tissue-k8-mean", "tissue-k16-mean"):
        for checksum in ("0123456789ab", "123456789abc"):
            path = folder / "embeddings" / f"region-{what}-{checksum}.npz"
            np.savez(path, embedding=embedding.astype(np.float32), cells=cells)
    (folder / "embeddings" / "region-tissue-k4-mean.partial.npz").touch()  # a run that was stopped
    (folder / "embeddings" / "gone-tissue-k4-mean-0123456789ab.npz").touch()  # a task of an earlier suite
    for row in of(suite.rows, task="region", method="LoRA"):
        rows = [
            {"epoch": e, "loss": 1.2 * 0.8**e + 0.1 * suite.rng.random(), "validation": 0.8 - 0.4 * 0.7**e}
            for e in range(1, 11)
        ]
        if row["k"] == 0:
            rows = [{**each, "validation": None} for each in rows]
        name = row["predictions"].split("/")[1].replace(".npz", ".json")
        if row["k"] == 16:
            name = f"of_{name}"
            row["history"] = f"history/{name}"
        (folder / "history" / name).write_text(json.dumps(rows))
    return suite


def predictions(suite, **wanted):
    """Truth and probabilities of all folds, in the order of the folds."""
    held = [np.load(suite.folder / row["predictions"]) for row in of(suite.rows, **wanted)]
    return [np.concatenate([file[name] for file in held]) for name in ("truth", "predicted")]


def judged(suite):
    """Comparisons of the tasks, and the first line of the page."""
    tasks = read_results(suite.write())
    comparisons = [compare(task) for task in tasks]
    return comparisons, verdict(tasks, comparisons).replace("\N{NO-BREAK SPACE}", " ")


def numbers(text):
    return [float(x) for x in re.findall(r"[+-]?\d+\.?\d*", text.replace("−", "-"))]
