"""A chunk that is damaged or lost in the middle of a run is one line that names it, never other counts."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from scfm_jax.cli import main
from scfm_jax.corpus import verify_corpus
from scfm_jax.errors import InputError
from scfm_jax.training.config import RunConfig
from scfm_jax.training.train import train


@pytest.mark.parametrize("array", ["entries", "neighbours", "x", "total_matched", "nnz"])
def test_training_stops_at_a_damaged_chunk(
    config: RunConfig, corpus_path: Path, tmp_path: Path, array: str
) -> None:
    shutil.copytree(corpus_path, tmp_path / "corpus")
    (shard,) = (tmp_path / "corpus" / "slides").glob(
        f"slide0-*/{array}/c/*" if array not in ("entries", "neighbours") else f"slide0-*/{array}/c/0/0"
    )
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 4
    shard.write_bytes(bytes(data))
    broken = dataclasses.replace(config, corpus=str(tmp_path / "corpus"))
    with pytest.raises(
        InputError, match=rf"slides/slide0-\w+/{array}: slide 'slide0' cannot be read"
    ) as error:
        train(broken, tmp_path / "run")
    assert "\n" not in str(error.value) and "scfm corpus verify" in error.value.mend
    (problem,) = verify_corpus(tmp_path / "corpus")
    assert f"{array}/" in problem and "(slide slide0): changed since it was written" in problem


def test_the_command_says_it_in_one_line(
    corpus_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(corpus_path, tmp_path / "corpus")
    (shard,) = (tmp_path / "corpus" / "slides").glob("slide0-*/entries/c/0/0")
    shard.unlink()
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from experiments.tissue_demo import recipe as demo\n"
        "import dataclasses\n"
        "def recipe():\n"
        "    config = demo()\n"
        f"    return dataclasses.replace(config, corpus={str(tmp_path / 'corpus')!r})\n"
    )
    flags = ["--split.held-out", "slide1", "--data.sample.neighbours", "2"]
    assert main(["train", str(recipe), str(tmp_path / "run"), *flags]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("scfm: ") and "entries: slide 'slide0' cannot be read" in line
