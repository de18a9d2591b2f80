"""A suite from end to end, on the tests' tiny tissue and model: rows, resuming, what counts as learnt from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from scfm_jax.downstream.suite import run_suite

pytestmark = [
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.filterwarnings("ignore::scfm_jax.errors.DataWarning"),  # few blocks
]

FILES = """
[files.slide0]
path = "slide0.h5ad"
species = "human"
technology = "simscope"
labels = ["cell_type", "domain"]
um_per_unit = 1.0

[files.slide1]
path = "slide1.h5ad"
species = "human"
technology = "simseq"
labels = ["cell_type", "domain"]
um_per_unit = 1.0
"""
DOMAIN = """
[tasks.domain]
files = ["slide0", "slide1"]
labels = ["domain"]
min_cells = 5
min_blocks = 2
neighbours = [2]
means = [2, 4]
choosing_margin = 4
split = { by = "slides", blocks = 4 }
"""


@pytest.fixture
def write(tmp_path: Path, corpus_path: Path, finished: Path) -> Callable[[str], Path]:
    """Write a suite beside the two slides that the model `tiny` was trained on."""
    for number in range(2):
        (tmp_path / f"slide{number}.h5ad").symlink_to(corpus_path.parent / f"slide{number}.h5ad")
    (tmp_path / "tiny").symlink_to(finished)

    def write(text: str) -> Path:
        path = tmp_path / "suite.toml"
        path.write_text(FILES + text)
        return path

    return write


MODELS = """
[models.tiny]
run = "tiny"

[methods.probe]
way = "probe"
of = ["tiny", "untrained"]
attend = true

[methods.head]
way = "neighbourhood"
of = ["tiny", "expression"]
neighbourhood = { epochs = 2, width = 8 }

[methods.tuned]
way = "finetune"
of = ["tiny"]
finetune = { epochs = 1, way = "head" }
folds = [1]
"""


def test_rows_of_a_suite(write, tmp_path):
    out = tmp_path / "out"
    said: list[str] = []
    page = run_suite(write(DOMAIN + MODELS), out, report=said.append)
    print("\n".join(said))
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    print(len(rows))


KINDS = """
[tasks.mixed]
kind = "mixing"
files = ["slide0", "slide1"]
labels = ["cell_type"]
min_cells = 5
min_blocks = 1
neighbours = [2]
means = []
split = { blocks = 3 }

[tasks.masked]
kind = "imputation"
files = ["slide0"]
neighbours = [0, 2]
test_cells = 40
split = { blocks = 4, n_folds = 2, margin = 2, min_kept = 0.05 }
folds = [0]

[tasks.crowd]
kind = "density"
files = ["slide0"]
radius = 30.0
neighbours = [2]
means = []
choosing_margin = 2
split = { blocks = 4, n_folds = 2, margin = 2, min_kept = 0.05 }
folds = [0]

[tasks.around]
kind = "composition"
files = ["slide0"]
labels = ["cell_type"]
min_cells = 5
min_blocks = 1
radius = 60.0
neighbours = [2]
means = []
choosing_margin = 2
split = { blocks = 4, n_folds = 2, margin = 2, min_kept = 0.05 }
folds = [0]

[models.tiny]
run = "tiny"

[methods.plain]
way = "embedding"
of = ["tiny"]

[methods.probe]
way = "probe"
of = ["expression"]

[methods.masking]
way = "imputation"
of = ["tiny", "untrained"]
"""


def test_other_kinds(write, tmp_path):
    out = tmp_path / "out"
    said: list[str] = []
    page = run_suite(write(KINDS), out, report=said.append)
    print("\n".join(said))
