"""scfm scaling fit, plot and recommend: what they print and leave, and status 2 for bad input."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image as mpimg
import numpy as np
import pytest

from scfm_jax.cli import main

Rows = Callable[..., list[dict[str, Any]]]
FIGURES = ("compute", "isoflop", "neighbours", "parameters", "prediction", "residuals")


def isoflop_points(ks: tuple[int, ...]) -> list[tuple[float, float, int]]:
    """Five sizes on each of four budgets."""
    points = itertools.product(np.geomspace(1e17, 1e20, 4), np.geomspace(0.3, 3, 5), ks)
    return [
        (float(ratio * (c / 120) ** 0.5), float(c / (6 * (k + 1)) / (ratio * (c / 120) ** 0.5)), k)
        for c, ratio, k in points
    ]


@pytest.fixture
def results(make_rows: Rows, write_rows: Callable[..., Path]) -> Path:
    def loss(size: float, data: float, k: int) -> float:
        return 1.69 + 406.4 / size**0.34 + 410.7 / data**0.28 - 0.05 * math.log2(1 + k)

    return write_rows(make_rows(isoflop_points((0, 4)), loss, noise=0.004))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main(["scaling", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_from_runs_to_a_recommendation(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law, figures = tmp_path / "law.json", tmp_path / "figures"
    status, out, _ = run(capsys, "fit", results, "-o", law, "--draws", 100)
    assert status == 0
    printed = {
        line.split()[0]: line.split()[1:]
        for line in out.splitlines()
        if line.startswith(("alpha", "beta", "E[", "A ", "B "))
    }
    record = json.loads(law.read_text())
    for parameter in record["parameters"]:
        value, *ends = (
            float(part) for part in re.findall(r"[-\d.e+]+", " ".join(printed[parameter["name"]]))
        )
        assert value == pytest.approx(parameter["value"], rel=1e-3)
        assert ends[:4] == pytest.approx([*parameter["bootstrap"], *parameter["profile"]], rel=1e-3)
    assert "power law in k: not identified, 2 levels of k, 6 are needed" in out
    assert "k = 4 against 0: -0.1" in out and "IsoFLOP, k = 0: N* ~ C^0.4" in out
    assert "runs that drive the fit: run-" in out and "held-out error" in out
    assert "noise not measured, no seed was repeated" in out

    status, out, _ = run(capsys, "plot", law, figures)
    assert status == 0
    assert {path.name for path in figures.iterdir()} == {
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")
    }
    for name in FIGURES:
        assert f"\n{name}: " in "\n" + out
        assert mpimg.imread(figures / f"{name}.png").shape[1] > 600
        assert (figures / f"{name}.svg").read_text().startswith("<?xml")

    status, out, _ = run(capsys, "recommend", law, "--flops", "2e20", "--json")
    answer = json.loads(out)
    assert status == 0 and answer["flops"] == 2e20
    status, out, _ = run(capsys, "recommend", law, "--flops", "2e20")
    best = answer["choices"][0]
    assert status == 0 and f"N     {best['size']:.3g} [" in out and f"k     {best['k']}, the best in" in out
    assert "start from experiments/tissue_" in out and "it rests on runs of flops" in out
    assert "times above the largest measured" in out
    hours = 2e20 / (8 * 3600 * 989e12 * 0.35)
    machine = ("--chips", 8, "--hours", hours, "--device", "h100")
    assert json.loads(run(capsys, "recommend", law, *machine, "--json")[1])["flops"] == pytest.approx(2e20)


def test_figures_of_a_law_that_refuses(
    make_rows: Rows, write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One k, two sizes, no budgets: what cannot be drawn is said, with the reason."""
    points = itertools.product([1e7, 1e9], np.geomspace(1e8, 1e11, 6), (0,))
    law = tmp_path / "law.json"
    status, out, _ = run(
        capsys, "fit", write_rows(make_rows(points, noise=0.01)), "-o", law, "--draws", 100, "--json"
    )
    record = json.loads(out)
    assert status == 0 and "runs" not in record and "draws" not in record
    alpha = record["parameters"][0]
    assert alpha == {"name": "alpha", "value": None, "bootstrap": None, "profile": None, "why": alpha["why"]}
    assert alpha["why"] == "2 values of N only, 3 are needed"
    status, out, _ = run(capsys, "plot", law, tmp_path / "figures")
    assert status == 0
    assert "isoflop: not drawn, no budget has four sizes at one k" in out
    assert "neighbours: not drawn, all runs have k = 0" in out
    assert "no frontier: alpha: 2 values of N only" in out
    assert not (tmp_path / "figures" / "isoflop.png").exists()
    status, _, err = run(capsys, "recommend", law, "--flops", "1e20")
    assert status == 2 and "2 values of N only" in err and err.count("\n") == 1


def test_bad_input_has_status_2(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = tmp_path / "law.json"
    assert run(capsys, "fit", results, "-o", law, "--draws", 100)[0] == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    rows[0]["loss"] = math.nan
    lost = tmp_path / "lost.jsonl"
    lost.write_text("".join(json.dumps(row) + "\n" for row in rows))
    new = tmp_path / "new.json"
    machine = ("--chips", 8, "--hours", 2, "--device", "h100")
    for words, said in (
        (("fit", tmp_path / "none.jsonl", "-o", new), "none.jsonl: cannot be read"),
        (("fit", lost, "-o", new), "loss is no number in run-0-0 (line 1); add --drop-nan"),
        (("fit", results, "-o", law), "exists already"),
        (("fit", results, "-o", new, "--draws", 10), "--draws: 10 is too low; give 100 or more"),
        (("fit", results, "-o", new, "--draws", 10**9), "--draws: 1000000000 is too high; give 100,000"),
        (("fit", results, "-o", new, "--held-out", -1), "--held-out: -1 is too low"),
        (("fit", results, "-o", new, "--seed", -1), "--seed: -1 is too low; give 0 or more"),
        (("fit", results, "-o", "/proc/law.json"), "/proc/law.json: cannot be written: No such file or"),
        (("fit", results, "-o", tmp_path / ("a" * 256)), "cannot be written: File name too long; name"),
        (("fit", results, "-o", new, "--delta", 0), "--delta"),
        (("fit", results, "-o", new, "--form", "power"), "2 levels of k, 6 are needed"),
        (("fit", results, "-o", new, "--repeats"), "no run has more than one epoch"),
        (("fit", results, "-o", new, "--family", "other"), "no runs of family 'other'"),
        (("plot", results, tmp_path / "figures"), "runs.jsonl: is no JSON"),
        (("plot", law, tmp_path), "exists already"),
        (("plot", law, "/proc/figures"), "/proc/figures: cannot be written"),
        (("recommend", law), "--flops: is not the one budget given"),
        (("recommend", law, "--flops", 1e20, "--chips", 8), "--flops: is not the one budget given"),
        (("recommend", law, "--flops", 1e20, "--mfu", math.nan), "--flops: is not the one budget given"),
        (("recommend", law, *machine, "--mfu", math.nan), "--mfu: nan is no share of the peak"),
        (("recommend", law, "--chips", 8, "--hours", 2), "--flops: is not the one budget given"),
        (("recommend", law, "--chips", 8, "--hours", 2, "--device", "abacus"), "'abacus' is not known"),
        (("recommend", law, "--flops", 1e25), "times above the largest measured"),
    ):
        status, out, err = run(capsys, *words)
        assert status == 2 and out == "", words
        error = err.splitlines()[-1]
        assert error.startswith("scfm: ") and said in error, error
    assert not new.exists() and not (tmp_path / "figures").exists()
    status, out, _ = run(capsys, "fit", lost, "-o", new, "--drop-nan", "--draws", 100)
    assert status == 0 and "1 without a loss left out: run-0-0" in out
