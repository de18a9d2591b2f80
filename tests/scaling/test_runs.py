"""Results files: what is read, and every way in which one can be bad."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scfm_jax.errors import InputError
from scfm_jax.scaling.runs import Runs, read_runs

POINTS = [(1e6, 1e8, 0), (1e7, 1e8, 4), (1e7, 1e9, 0)]


def test_columns_are_those_of_the_file(
    make_rows: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    rows = make_rows(POINTS, seeds=2)
    rows[1]["loss_se"] = None
    rows[2]["note"] = "fields of others are left alone"
    runs, lost = read_runs(write_rows(rows))
    assert lost == [] and len(runs) == 6 and runs.family == "tissue"
    for name in ("seed", "k", "parameters", "cells", "tokens", "unique_cells", "epochs", "flops", "loss"):
        np.testing.assert_array_equal(getattr(runs, name), [row[name] for row in rows])
    assert math.isnan(runs.loss_se[1])
    del rows[2]["note"]
    assert runs.rows() == rows
    assert isinstance(runs.take(runs.k == 4), Runs) and runs.take(runs.k == 4).name == ("run-1-0", "run-1-1")


def test_runs_are_chosen_by_name(make_rows: Callable[..., Any], write_rows: Callable[..., Path]) -> None:
    path = write_rows([*(rows := make_rows(POINTS, seeds=2)), rows[0] | {"name": "twin-of-it"}])
    assert read_runs(path, without=["twin-*"])[0].name == tuple(row["name"] for row in rows)
    assert read_runs(path, only=["run-0-*", "run-2-*"], without=["*-1"])[0].name == ("run-0-0", "run-2-0")
    for flag, told in (("only", "--only: no run of .* is named run-9"), ("without", "--without: no run of")):
        with pytest.raises(InputError, match=told):
            read_runs(path, **{flag: ["run-9"]})
    with pytest.raises(InputError, match="holds no runs"):
        read_runs(path, without=["*"])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("flops", None, r"runs.jsonl:2: flops is None, no number above 0"),
        ("flops", -1.0, r"flops is -1.0"),
        ("tokens", math.inf, r"tokens is inf"),
        ("epochs", "1", r"epochs is '1'"),
        ("cells", True, r"cells is True"),
        ("k", 1.5, r"k is 1.5, no whole number"),
        ("k", -1, r"k is -1"),
        ("seed", True, r"seed is True"),
        ("name", "", r"name is ''"),
        ("family", 3, r"family is 3"),
        ("loss", 0.0, r"loss is 0.0; its logarithm is fitted; give losses above 0"),
        ("loss", "nan", r"loss is 'nan'"),
        ("loss_se", -0.1, r"loss_se is -0.1"),
        ("name", "run-0-0", r"runs.jsonl:2: name 'run-0-0' stands on line 1 too; take one of them out"),
        ("name", "a\nb", r"name is 'a.nb', no name"),
        ("name", "\ud800", r"name is '.ud800', no name"),
        ("k", 10**30, r"k is 10+, no whole number from 0 \(or one of more than 63 bits\)"),
        ("seed", 2**63, r"seed is 9223372036854775808, no whole number"),
        ("flops", 10**400, r"flops is 10+\.\.\.0+, no number above 0"),
        ("parameters", 10**400, r"parameters is 10+\.\.\.0+, no number above 0"),
        ("loss", -(10**400), r"loss is -10+\.\.\.0+; its logarithm"),
        ("loss", 10**400, r"loss is no number in run-1-0 \(line 2\); add --drop-nan"),
        ("loss_se", math.inf, r"loss_se is inf, no number from 0; give one, or null"),
        ("loss_se", math.nan, r"loss_se is nan"),
        ("loss_se", 10**400, r"loss_se is 10+"),
    ],
    ids=reprlib.repr,
)
def test_a_bad_field_is_named(
    make_rows: Callable[..., Any], write_rows: Callable[..., Path], field: str, value: object, said: str
) -> None:
    rows = make_rows(POINTS)
    rows[1][field] = value
    with pytest.raises(InputError, match=said) as error:
        read_runs(write_rows(rows))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["flops", "loss", "unique_cells", "family"])
def test_a_missing_field_is_named(
    make_rows: Callable[..., Any], write_rows: Callable[..., Path], field: str
) -> None:
    rows = make_rows(POINTS)
    del rows[2][field]
    with pytest.raises(InputError, match=rf"runs.jsonl:3: lacks {field}; "):
        read_runs(write_rows(rows))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no runs"),
        ("\n\n", "holds no runs"),
        ("{", "runs.jsonl:1: is no JSON"),
        ("[1]", "runs.jsonl:1: is no JSON object"),
        ("\n" + "[" * 100_000, "runs.jsonl:2: is no JSON .*recursion"),
        ('{"k": ' + "1" * 5_000 + "}", "runs.jsonl:1: is no JSON .*digits"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said):
        read_runs(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_runs(tmp_path / "none.jsonl")


def test_losses_that_are_no_number_are_named_and_dropped_by_a_flag(
    make_rows: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    rows = make_rows(POINTS)
    rows[0]["loss"], rows[2]["loss"] = math.nan, None
    path = write_rows(rows)
    assert "NaN" in path.read_text()
    with pytest.raises(InputError, match=r"in run-0-0 \(line 1\), run-2-0 \(line 3\); add --drop-nan"):
        read_runs(path)
    runs, lost = read_runs(path, drop_nan=True)
    assert runs.name == ("run-1-0",) and lost == ["run-0-0", "run-2-0"]
    rows[1]["loss"] = math.nan
    with pytest.raises(InputError, match="holds no run with a loss"):
        read_runs(write_rows(rows), drop_nan=True)


@pytest.mark.parametrize("changed", [{}, {"flops": 6.0006e16}, {"epochs": 2.0}])
def test_the_same_run_under_another_name(
    make_rows: Callable[..., Any], write_rows: Callable[..., Path], changed: dict[str, float]
) -> None:
    rows = make_rows(POINTS)
    again = rows[1] | {"name": "other", "loss": 3.0} | changed
    with pytest.raises(
        InputError, match=r"runs.jsonl:4: 'other' is the same run as 'run-1-0' on line 2 .*; take one of them"
    ):
        read_runs(write_rows([*rows, again]))
    for field in ("seed", "k", "cells", "tokens", "unique_cells", "parameters"):
        runs, _ = read_runs(write_rows([*rows, again | {field: again[field] + 1}]))
        assert len(runs) == 4


def test_one_family_at_a_time(make_rows: Callable[..., Any], write_rows: Callable[..., Path]) -> None:
    rows = make_rows(POINTS)
    rows[0]["family"] = "nicheformer"
    path = write_rows(rows)
    with pytest.raises(InputError, match=r"2 families; add --family nicheformer\|tissue"):
        read_runs(path)
    assert read_runs(path, family="nicheformer")[0].name == ("run-0-0",)
    with pytest.raises(InputError, match="no runs of family 'other'"):
        read_runs(path, family="other")
