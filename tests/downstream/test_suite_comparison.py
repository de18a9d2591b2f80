"""What a suite's results are held to be: which method is best, by how much, and what is no result at all."""

from __future__ import annotations

import re

import numpy as np
import pytest
from sklearn.metrics import f1_score
from synthetic_suite import METHODS, Suite, judged, numbers, predictions

from scfm_jax.downstream.suite_report import write_suite_report
from scfm_jax.downstream.suite_results import read_results
from scfm_jax.errors import DataWarning, InputError


def test_chance_is_not_called_a_win(tmp_path):
    suite = Suite(tmp_path)
    suite.task("region", "classes", [("own", "baseline", None, 1.5), ("LoRA", "model", 8, 1.5)], seeds=(0,))
    _, first = judged(suite)
    assert first.startswith("No model beats the best baseline in the one task. Not told apart from it")
    low, high = numbers(re.search(r"\[(.*?)\]", first)[1])
    assert low < 0 < high


def test_a_control_that_is_as_good_as_the_model_is_named(tmp_path):
    suite = Suite(tmp_path)
    methods = [("own", "baseline", None, 1.5), ("untrained", "control", 8, 2.0)]
    methods += [("head of expression", "control", 0, 0.6), ("head", "model", 8, 0.6)]
    suite.task("region", "classes", methods, seeds=(0,))
    (found,), first = judged(suite)
    assert "beats the best baseline" in first
    assert found.over_control.against.name == "head of expression"
    (truth, model), (_, control) = (
        predictions(suite, method=name) for name in ("head", "head of expression")
    )
    f1 = [f1_score(truth, said.argmax(1), average="macro") for said in (model, control)]
    value, low, high = found.over_control.interval
    assert value == pytest.approx(f1[0] - f1[1]) and low < 0 < high
    text = write_suite_report(tmp_path).read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "over the best control, head of expression, k = 0, which was not pretrained" in text


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
    assert [gain.against.name if gain else None for gain in found.gains] == [
        None,
        None,
        "own",
        "coordinates",
        "own",
    ]
    assert "beats the best baseline, its 95% interval clear of zero, in the one task: region (probe" in first
    for row in suite.rows:
        row["leaking"] = row["group"] == "baseline"
    (found,), first = judged(suite)
    assert found.gains[2:] == [None, None, None]
    assert first == "No model is compared with a baseline in region."
    for row in suite.rows:
        row["leaking"] = True
    (found,), first = judged(suite)
    assert found.best_model.name == "LoRA"
    assert "(LoRA, k = 8 [leaking]: " in first
    assert "over coordinates [leaking]" in first


def test_a_name_with_its_k_is_one_curve_with_the_others_of_its_kind(tmp_path):
    suite = Suite(tmp_path, n=200)
    names = [
        ("mean of 8", 8),
        ("mean of 16", 16),
        ("means of 8, 16", None),
        ("LoRA of v8", 8),
        ("LoRA of v8", 16),
    ]
    suite.task("region", "classes", [(name, "baseline", k, 1.0) for name, k in names])
    (task,) = read_results(suite.write())
    assert [method.family for method in task.methods] == [
        "mean of k",
        "mean of k",
        "means of 8, 16",
        "LoRA of v8",
        "LoRA of v8",
    ]
    labels = ["mean of 8", "mean of 16", "means of 8, 16", "LoRA of v8, k = 8", "LoRA of v8, k = 16"]
    assert [method.label.replace("\N{NO-BREAK SPACE}", " ") for method in task.methods] == labels


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
        (attach("embeddings/region.npz", "no zip"), r"embeddings/region.npz: cannot be read"),
        (
            lambda suite: (
                change("history", "history/x.json")(suite),
                attach("history/x.json", "[{}]")(suite),
            ),
            r"history/x.json: a row has no number for one of epoch, loss, validation",
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
