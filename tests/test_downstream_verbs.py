"""The verbs probe, finetune and evaluate: what they print, what they leave, and status 2 for bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import anndata
import jax
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from scfm_jax.cli import main
from scfm_jax.downstream.finetuned import FinetuneConfig, open_finetuned
from scfm_jax.downstream.folds import FoldsConfig
from scfm_jax.downstream.labels import MISSING
from scfm_jax.downstream.model import open_model
from scfm_jax.downstream.suite_config import read_suite
from scfm_jax.flags import Labelling, Split, Tuning

ROOT = Path(__file__).parents[1]
READING = ("--species", "human", "--technology", "simseq", "--um-per-unit", "1")
SPLIT = ("--split.blocks", "4", "--split.n-folds", "2", "--split.margin", "2")
LABEL = ("--label", "cell_type", "--min-cells", "5", "--min-blocks", "2")


@pytest.fixture(scope="module", autouse=True)
def compile_fast() -> Iterator[None]:
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def slide(corpus_path: Path, tmp_path: Path) -> Path:
    """Whose cells partly lack a label, in a folder of its own."""
    adata = anndata.read_h5ad(corpus_path.parent / "slide1.h5ad")
    label = adata.obs["cell_type"].astype(str).to_numpy().astype(object)
    label[:10] = "Ambiguous"
    adata.obs["cell_type"] = label
    adata.obs["one"] = "same"
    (tmp_path / "given").mkdir()
    adata.write_h5ad(tmp_path / "given" / "slide1.h5ad")
    return tmp_path / "given" / "slide1.h5ad"


def table(printed: str) -> dict[str, list[float]]:
    """The values of each row of the printed scores."""
    rows = {}
    for line in printed.splitlines():
        name, bracket, _ = line.partition(" (")
        if bracket and " to " in line:
            name, value = name.rsplit(maxsplit=1)
            rest = [part.split()[-1] for part in line.split(" (")[1:-1]]
            rows[name.strip()] = [float(each) for each in (value, *rest)]
    return rows


def test_probe_prints_scores_and_annotates_a_copy(finished, slide, tmp_path, capsys):
    out = tmp_path / "out.h5ad"
    words = ["probe", str(finished), str(slide), "-o", str(out), *LABEL, *READING, *SPLIT]
    assert main([*words, "--missing", "nan,Ambiguous", "--neighbours", "1"]) == 0
    printed = capsys.readouterr()
    adata = anndata.read_h5ad(out)
    assert adata.obs_names.equals(anndata.read_h5ad(slide).obs_names)
    fold = adata.obs["cell_type_probe_fold"].to_numpy()
    labelled = adata.obs["cell_type"].to_numpy() != "Ambiguous"
    np.testing.assert_array_equal(fold == "", ~labelled)
    truth, said = (
        adata.obs[key].to_numpy().astype(str)[labelled] for key in ("cell_type", "cell_type_probe")
    )
    rows = table(printed.out)
    assert list(rows) == ["probe, k = 1", "own expression + mean of 1", "difference"]
    expected = [accuracy_score(truth, said), f1_score(truth, said, average="macro")]
    np.testing.assert_allclose(rows["probe, k = 1"][:2], expected, atol=6e-4)
    values = np.array(list(rows.values()))
    np.testing.assert_allclose(values[0] - values[1], values[2], atol=2e-3)
    assert "6 classes, 150 cells scored in 2 folds (4 x 4 spatial blocks in 2 folds, margin 2)" in printed.out
    assert "10 cells without a label that counts" in printed.out
    assert "fold 1: macro-F1" in printed.err and "leak" not in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "out.h5ad"]


@pytest.mark.filterwarnings("always::scfm_jax.errors.DataWarning")
def test_a_random_split_is_warned_of_and_said_in_json(finished, slide, tmp_path, capsys):
    words = ["probe", str(finished), str(slide), "-o", str(tmp_path / "out.h5ad"), *LABEL, *READING, *SPLIT]
    assert (
        main([*words, "--split.by", "random", "--way", "neighbourhood", "--key-added", "mine", "--json"]) == 0
    )
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["leaking"] and record["key"] == "mine"
    # "Ambiguous" is a class unless it is said to be none.
    assert "Ambiguous" in record["classes"] and record["cells_scored"] == 160
    assert f"warning: {slide}: neighbours of test cells are trained on" in printed.err


@pytest.mark.filterwarnings("always::scfm_jax.errors.DataWarning")
def test_finetune_keeps_the_model_its_scores_and_what_it_says(finished, slide, tmp_path, capsys):
    out, annotated, merged = (tmp_path / name for name in ("tuned", "annotated.h5ad", "merged"))
    words = ["finetune", str(finished), str(slide), str(out), *LABEL, *READING, *SPLIT, "--fold", "1"]
    more = ["--annotate", str(annotated), "--merged", str(merged), "--epochs", "2", "--lora.rank", "2"]
    assert main([*words, *more, "--missing", "Ambiguous", "--max-train-cells", "40"]) == 0
    printed = capsys.readouterr()
    tuned = open_finetuned(out)
    assert (tuned.config.way, tuned.config.lora.rank, tuned.config.max_train_cells) == ("lora", 2, 40)
    assert f"{tuned.trained_parameters:,} parameters trained (the model has 13,257)" in printed.out
    assert f"{tuned.stored_bytes:,} bytes stored, {tuned.optimiser_bytes:,} held" in printed.out
    for row in tuned.history:
        assert f"epoch {row['epoch']}: loss {row['train_loss']:.4f}" in printed.err
    record = json.loads((out / "scores.json").read_text())
    adata = anndata.read_h5ad(annotated)
    labelled = adata.obs["cell_type"].to_numpy() != "Ambiguous"
    said = adata.obs["cell_type_lora"]
    assert (adata.obs["cell_type_lora_fold"].dropna() == "1").all()
    tested = labelled & said.notna().to_numpy()
    assert tested.sum() == record["cells_scored"] and said[~labelled].notna().all()
    accuracy = (said[tested].astype(str) == adata.obs["cell_type"][tested]).mean()
    assert accuracy == pytest.approx(record["scores"]["accuracy"]["value"])
    assert table(printed.out)["lora, k = 2"][0] == pytest.approx(accuracy, abs=6e-4)
    query = open_model(merged).parameters["encoder"]["blocks"]["query"]["kernel"]
    assert np.any(
        np.asarray(query) != open_model(finished).parameters["encoder"]["blocks"]["query"]["kernel"]
    )
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["annotated.h5ad", "given", "merged", "tuned"]


SUITE = """
[files.slide]
path = "given/slide1.h5ad"
species = "human"
technology = "simseq"
um_per_unit = 1.0
labels = ["cell_type"]

[tasks.type]
files = ["slide"]
labels = ["cell_type"]
min_cells = 5
min_blocks = 2
neighbours = [2]
means = []
choosing_margin = 2
folds = [0]
split = {blocks = 4, n_folds = 2, margin = 2}
"""


@pytest.mark.filterwarnings("always::scfm_jax.errors.DataWarning")
def test_evaluate_runs_a_suite_and_does_not_run_it_again(slide, tmp_path, capsys):
    suite, out = tmp_path / "suite.toml", tmp_path / "out"
    suite.write_text(SUITE)
    assert main(["evaluate", str(suite), str(out)]) == 0
    printed = capsys.readouterr()
    page = Path(printed.out.removeprefix("the report: ").strip())
    assert page.exists() and page.parent == out
    assert "type, fold 0: majority: macro_f1" in printed.err
    assert main(["evaluate", str(suite), str(out), "--json"]) == 0
    printed = capsys.readouterr()
    assert {row["method"] for row in json.loads(printed.out)} >= {"majority", "own expression + mean of 2"}
    assert "majority" not in printed.err


def test_flags_have_the_defaults_of_what_they_set():
    assert Split().read() == FoldsConfig() and Tuning().read() == FinetuneConfig()
    assert Labelling("region").missing.split(",") == list(MISSING)


def test_the_suite_of_the_docs_can_be_read(tmp_path):
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "downstream.md").read_text(), re.DOTALL)
    (text,) = (block for block in blocks if "[tasks" in block)
    (tmp_path / "suite.toml").write_text(text)
    suite = read_suite(tmp_path / "suite.toml")
    assert (len(suite.files), len(suite.tasks), len(suite.models), len(suite.methods)) == (2, 3, 2, 3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["probe", "{run}", "{slide}", "-o", "{slide}"], "slide1.h5ad: exists already"),
        (["probe", "{run}", "{slide}", "-o", "{new}/out.h5ad"], "its folder does not exist"),
        (["probe", "{new}", "{slide}", "-o", "{new}.h5ad"], "no run directory"),
        (["probe", "{run}", "{new}.h5ad", "-o", "{new}2.h5ad"], "there is no such file"),
        (["probe", "{run}", "{corpus}", "-o", "{new}.h5ad"], "a copy of an .h5ad file"),
        (["probe", "{run}", "{suite}", "-o", "{new}.h5ad"], "a copy of an .h5ad file"),
        (
            ["probe", "{run}", "{slide}", "-o", "{new}.h5ad", "--label", "region"],
            "slide1.h5ad: no label 'region'",
        ),
        (["probe", "{run}", "{slide}", "-o", "{new}.h5ad", "--label", "one"], "label 'one' has 'same' alone"),
        (
            ["probe", "{run}", "{slide}", "-o", "{new}.h5ad", "--min-cells", "900"],
            "has no class in 900 cells",
        ),
        (["probe", "{run}", "{slide}", "-o", "{new}.h5ad", "--split.margin", "90"], "slide1.h5ad: margin 90"),
        (["probe", "{run}", "{slide}", "-o", "{new}.h5ad", "--split.by", "slides"], "slides finds one group"),
        (
            ["probe", "{run}", "{slide}", "-o", "{new}.h5ad", "--split.by", "column"],
            "split.column '' is no column",
        ),
        (
            ["probe", "{run}", "{slide}", "-o", "{new}.h5ad", "--class-map", "{map}"],
            "[slide1]: maps 'typo', which the labels lack",
        ),
        (["probe", "{run}", "{other}", "-o", "{new}.h5ad"], "other.h5ad: tiny knows 1 of its 22 genes"),
        (["finetune", "{run}", "{slide}", "{given}"], "given: exists already"),
        (["finetune", "{run}", "{slide}", "{new}", "--annotate", "{slide}"], "slide1.h5ad: exists already"),
        (["finetune", "{run}", "{slide}", "{new}", "--merged", "{run}"], "exists already"),
        (["finetune", "{run}", "{slide}", "{new}", "--fold", "2"], "slide1.h5ad: has no fold 2"),
        (["finetune", "{run}", "{slide}", "{new}", "--epochs", "0"], "epochs is 0"),
        (["finetune", "{run}", "{slide}", "{new}", "--lora.rank", "0"], "rank is 0"),
        (["finetune", "{run}", "{slide}", "{new}", "--base-rate", "1e30"], "the loss of epoch"),
        (["evaluate", "{new}.toml", "{new}"], "cannot be read as TOML"),
        (["evaluate", "{suite}", "{given}"], "is the suite's own folder"),
        (["evaluate", "{suite}", "{corpus}"], "exists already and holds no results of a suite"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, told, finished, corpus_path, slide, tmp_path, capsys):
    given = slide.parent
    adata = anndata.read_h5ad(slide)
    adata.var_names = [name if n < 1 else f"other{n}" for n, name in enumerate(adata.var_names)]
    adata.write_h5ad(given / "other.h5ad")
    (given / "suite.toml").write_text(SUITE)
    (given / "map.toml").write_text('classes = ["a", "b"]\n[slide1.classes]\na = ["type0"]\nb = ["typo"]\n')
    places = {
        "new": tmp_path / "new",
        "slide": slide,
        "corpus": corpus_path,
        "run": finished,
        "other": given / "other.h5ad",
        "suite": given / "suite.toml",
        "map": given / "map.toml",
        "given": given,
    }
    flags = () if words[0] == "evaluate" else (*LABEL, *READING, *SPLIT)
    # What is given twice counts the second time.
    said = [word.format(**places) for word in words]
    assert main([*said[:1], *flags, *said[1:]]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and told in printed.err
    assert printed.err.strip().splitlines()[-1].startswith("scfm: ")
    assert printed.err.count("scfm: ") == 1 and "Traceback" not in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


@pytest.mark.filterwarnings("always::scfm_jax.errors.DataWarning")
def test_a_model_that_knows_few_genes_is_warned_of(finished, slide, tmp_path, capsys):
    adata = anndata.read_h5ad(slide)
    adata.var_names = [name if n < 9 else f"other{n}" for n, name in enumerate(adata.var_names)]
    adata.write_h5ad(slide.with_name("few.h5ad"))
    words = ["finetune", str(finished), str(slide.with_name("few.h5ad")), str(tmp_path / "new")]
    assert main([*words, *LABEL, *READING, *SPLIT, "--fold", "7"]) == 2
    assert "warning: " in (said := capsys.readouterr().err)
    assert "few.h5ad: tiny knows 9 of its 22 genes" in said and "has no fold 7" in said
