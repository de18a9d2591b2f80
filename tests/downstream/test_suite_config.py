"""A suite's TOML file: what is read from it, and one line for each thing that can be wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scfm_jax.downstream.folds import FoldsConfig
from scfm_jax.downstream.suite_config import read_suite
from scfm_jax.errors import InputError

SUITE = """
[files.brain]
path = "data/brain.h5ad"
species = "mouse"
technology = "merfish"
labels = ["region"]

[genes]
gene_names = "names.csv"

[tasks.region]
files = ["brain"]
labels = ["region"]
neighbours = [0, 8]
folds = [1]
split = { by = "blocks", margin = 16 }

[models.tissue]
run = "{out}/tissue-{fold}"

[models.tissue.pretraining]
recipe = "recipe.py"
files = ["brain"]
flags = ["--split.fold", "{fold}"]

[methods.lora]
way = "finetune"
of = ["tissue", "untrained"]
seeds = [0, 1, 2]
finetune = { way = "lora", epochs = 3 }
"""


def test_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(SUITE.replace('"data/', '"$SOMEWHERE/'))
    monkeypatch.setenv("SOMEWHERE", "/far")
    assert read_suite(path).files["brain"].path == "/far/brain.h5ad"
    path.write_text(SUITE)
    suite = read_suite(path)
    assert suite.files["brain"].path == str(tmp_path / "data/brain.h5ad")
    assert suite.files["brain"].stem == "brain" and suite.files["brain"].labels == ("region",)
    assert suite.resolve(suite.genes.gene_names) == tmp_path / "names.csv"
    task = suite.tasks["region"]
    assert task.neighbours == (0, 8) and task.folds == (1,) and task.split == FoldsConfig(margin=16)
    assert suite.models["tissue"].pretraining.flags == ("--split.fold", "{fold}")
    method = suite.methods["lora"]
    assert (method.finetune.way, method.finetune.epochs, method.seeds) == ("lora", 3, (0, 1, 2))
    assert method.fits(task) and suite.first_model("region") == "tissue"
    assert set(method.of_one_answer) == {"way", "finetune"}


FINETUNE = 'way = "finetune"\nof = ["tissue", "untrained"]'


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[genes]", "[genes", r"suite.toml: cannot be read as TOML"),
        ("[genes]", "[gene]", r"has no section 'gene'; there are files, genes, tasks"),
        ("files.brain]", "files]", r"files.path is no table; write \[files.path\]"),
        ("tasks.region]", "methods.other]", r"names no tasks; add a table \[tasks.NAME\]"),
        ("[genes]", "[models]\nother = 3\n[genes]", r"models.other is no table"),
        ("tasks.region]", 'tasks."a/b"]', r"tasks.'a/b' cannot be a file's name"),
        ('path = "data/brain.h5ad"', "", r"\[files.brain\]: field 'path' is missing"),
        ('path = "data/brain.h5ad"', "path = 3", r"\[files.brain\]: field 'path' is 3"),
        ("species", "specie", r"\[files.brain\]: unknown field 'specie'"),
        ("gene_names", "gene_name", r"\[genes\]: has no field 'gene_name'"),
        ("folds = [1]", "fold = [1]", r"\[tasks.region\]: has no field 'fold'"),
        ("folds = [1]", 'folds = "1"', r"\[tasks.region\].*folds"),
        ("folds = [1]", 'kind = "niche"', r"\[tasks.region\].*kind"),
        ("margin = 16", "margins = 16", r"\[tasks.region\]: has no field 'split.margins'"),
        (
            'files = ["brain"]\nlabels',
            'files = ["heart"]\nlabels',
            r"'heart' is not there; use some of brain",
        ),
        ('files = ["brain"]\nlabels', "files = []\nlabels", r"has 0 files and 1 labels for classes"),
        ('labels = ["region"]\nneigh', "labels = []\nneigh", r"has 1 files and 0 labels for classes"),
        ("neighbours = [0, 8]", "neighbours = [257]", r"257 neighbours are asked for, and 0 to 256 are"),
        ("neighbours = [0, 8]", "choosing_margin = -1", r"choosing_margin is -1"),
        ("neighbours = [0, 8]", "test_cells = 0", r"test_cells is 0"),
        ('files = ["brain"]\nflags', 'files = ["heart"]\nflags', r"\[models.tissue\]: 'heart' is not there"),
        ('run = "{out}', 'tasks = ["area"]\nrun = "{out}', r"\[models.tissue\]: 'area' is not there"),
        ("seeds = [0, 1, 2]", 'tasks = ["area"]', r"\[methods.lora\]: 'area' is not there"),
        ('"untrained"]', '"other"]', r"'other' is not there; use some of tissue, untrained, expression"),
        ('"untrained"]', '"expression"]', r"\[methods.lora\]: expression cannot be fine-tuned"),
        ('of = ["tissue", "untrained"]', "of = []", r"\[methods.lora\]: names nothing in of"),
        ("epochs = 3", "epochs = 0", r"\[methods.lora\].*epochs is 0"),
        ("seeds = [0, 1, 2]", "seeds = []", r"\[methods.lora\].*seeds is empty"),
        ("seeds = [0, 1, 2]", "neighbours = [300]", r"\[methods.lora\].*300 neighbours are asked for"),
        ("seeds = [0, 1, 2]", "tuned = true", r"\[methods.lora\].*not of finetune"),
        ("seeds = [0, 1, 2]", "neighbourhood = { dropout = 1.0 }", r"\[methods.lora\].*dropout is 1.0"),
        (
            FINETUNE,
            'way = "neighbourhood"\nattend = true\nof = ["tissue"]',
            r"\[methods.lora\].*attend is set where cells are embedded alone",
        ),
        (
            FINETUNE,
            'way = "probe"\nattend = true\nof = ["tissue", "expression"]',
            r"\[methods.lora\].*of names expression, which can neither attend",
        ),
        (
            FINETUNE,
            'way = "imputation"\nof = ["tissue"]\ntasks = ["region"]',
            r"way 'imputation' does not answer task 'region' of kind 'classes'",
        ),
        (
            'run = "{out}',
            'tasks = ["other"]\nrun = "{out}',
            r"\[tasks.region\]: no model is for it; add a model",
        ),
        ('labels = ["region"]\nneigh', 'kind = "imputation"\nneigh', None),
    ],
)
def test_bad_suites(tmp_path: Path, old: str, new: str, problem: str | None) -> None:
    path, text = tmp_path / "suite.toml", SUITE
    if "other" in new and "tasks = " in new:
        text += '\n[tasks.other]\nfiles = ["brain"]\nlabels = ["region"]\n'
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    if problem is None:
        assert not read_suite(path).methods["lora"].fits(read_suite(path).tasks["region"])
        return
    with pytest.raises(InputError, match=problem) as error:
        read_suite(path)
    assert "\n" not in str(error.value) and "suite.toml" in str(error.value)


def test_no_suite(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as TOML"):
        read_suite(tmp_path / "none.toml")
    (tmp_path / "suite.toml").write_text("files = 3")
    with pytest.raises(InputError, match=r"files is no table; write \[files.NAME\]"):
        read_suite(tmp_path / "suite.toml")
