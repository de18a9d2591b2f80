"""The command: what it prints, what it leaves, and status 2 with one line for bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest

from scfm_jax.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def slide(corpus_path: Path) -> Path:
    return corpus_path.parent / "slide0.h5ad"


READING = ("--species", "human", "--technology", "simscope", "--um-per-unit", "1")


def test_build_info_verify(slide, tmp_path, capsys):
    out = tmp_path / "corpus"
    assert main(["corpus", "build", str(out), str(slide), *READING, "--labels", "domain"]) == 0
    assert "160 of 160 cells kept" in capsys.readouterr().out
    assert main(["corpus", "info", str(out), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["n_cells"] == 160
    assert list(info["labels"]) == ["domain"]
    assert main(["corpus", "verify", str(out)]) == 0
    assert "whole" in capsys.readouterr().out


def test_verify_exits_1_on_damage(corpus_path, tmp_path, capsys):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus_path, copy)
    largest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert main(["corpus", "verify", str(copy)]) == 1
    assert "slide" in capsys.readouterr().out


def test_embed(finished, slide, tmp_path, capsys):
    out = tmp_path / "out.h5ad"
    assert main(["embed", str(finished), str(slide), "-o", str(out), *READING]) == 0
    assert "160 cells embedded" in capsys.readouterr().out
    assert np.isfinite(anndata.read_h5ad(out).obsm["X_tissue"]).all()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["corpus", "build", "{new}", "{slide}", "--species", "human"], "--technology is not given"),
        (["corpus", "build", "{corpus}", "{slide}", *READING], "exists"),
        (["corpus", "build", "{new}"], "no file is given"),
        (["corpus", "info", "{new}"], "corpus"),
        (["train", "{new}.py", "{new}", "--corpus", "{corpus}"], "no such recipe"),
        (["train", "{recipe}", "{new}"], "names no corpus"),
        (["train", "{recipe}", "{new}", "--corpus", "{corpus}", "--model.encoder.widht", "8"], "widht"),
        (
            ["train", "{recipe}", "{new}", "--corpus", "{corpus}", "--data.sample.neighbours", "60"],
            "neighbours",
        ),
        (
            [
                "train",
                "{recipe}",
                "{run}",
                "--corpus",
                "{corpus}",
                "--split.margin",
                "4",
                "--split.held_out",
                "slide1",
                "--data.sample.neighbours",
                "2",
            ],
            "holds a run already",
        ),
        (["embed", "{new}", "{slide}", "-o", "{new}.h5ad", *READING], "no run directory"),
        (["embed", "{run}", "{slide}", "-o", "{slide}", *READING], "exists already"),
        (["embed", "{run}", "{corpus}", "-o", "{new}2.h5ad", *READING], "a copy of an .h5ad file"),
        (["embed", "{run}", "{new}.h5ad", "-o", "{new}2.h5ad", *READING], "no such file"),
        (["demo", "{corpus}"], "exists already"),
        (["fly"], "no verb"),
        (["scaling", "fly"], "no verb 'scaling fly'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, told, finished, corpus_path, slide, tmp_path, capsys):
    places = {
        "new": tmp_path / "new",
        "slide": slide,
        "corpus": corpus_path,
        "run": finished,
        "recipe": ROOT / "experiments" / "tissue_real.py",
    }
    before = sorted(tmp_path.iterdir())
    assert main([word.format(**places) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert told in said.err
    lines = said.err.strip().splitlines()
    assert lines[0].startswith("scfm: ")
    assert len(lines) == 1 or words[-1] == "fly"
    assert sorted(tmp_path.iterdir()) == before


GROUPS = {
    "corpus": ["build", "add", "remove", "merge", "info", "verify"],
    "scaling": ["run", "compare", "fit", "plot", "predict", "recommend"],
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("asked", [["--help"], ["-h"], []])
def test_a_group_of_verbs_lists_them(group, asked, capsys):
    assert main([group, *asked]) == 0
    said = capsys.readouterr()
    first, empty, *lines = said.out.splitlines()
    assert first.startswith(f"usage: scfm {group} VERB") and empty == said.err == ""
    assert [line.split()[:2] for line in lines] == [[group, verb] for verb in GROUPS[group]]
    assert all(line.endswith((".", "damaged.", "PATH")) and len(line.split()) > 5 for line in lines)


def test_all_verbs_are_listed(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr()
    verbs = [f"  {group} {verb} " for group, names in GROUPS.items() for verb in names]
    assert all(verb in said.out for verb in ["  demo ", "  train ", "  export ", *verbs])
    assert said.err == ""


@pytest.mark.parametrize(
    ("words", "positionals"),
    [
        (["train"], "RECIPE.py RUN"),
        (["corpus", "merge"], "OUT CORPUS ..."),
        (["scaling", "run"], "SWEEP.py [OUT]"),
        (["scaling", "compare"], "OUT"),
        (["scaling", "fit"], "RESULTS.jsonl"),
        (["scaling", "plot"], "LAW.json FOLDER"),
        (["scaling", "predict"], "LAW.json"),
        (["scaling", "recommend"], "LAW.json"),
    ],
)
def test_help_says_what_is_asked_for(words, positionals, capsys):
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])
    said = capsys.readouterr().out
    usage = " ".join(said.split("\n\n")[0].split())
    assert left.value.code == 0
    assert f"] {positionals}" in usage and "PATH" not in usage and "STR" not in usage
    assert "{None}" not in said and "None," not in said
