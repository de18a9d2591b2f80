from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scfm_jax.corpus import Corpus, build_corpus, verify_corpus
from scfm_jax.corpus.manifest import SCHEMA, canonical_json, write_manifest
from scfm_jax.corpus.place import Place
from scfm_jax.errors import InputError


@pytest.fixture
def corpus_path(tissue, write, tmp_path) -> Path:
    build_corpus(tmp_path / "out", [write(tissue, labels=("type",))])
    assert verify_corpus(tmp_path / "out") == []
    return tmp_path / "out"


def files_of(corpus: Path) -> list[Path]:
    return sorted(path for path in corpus.rglob("*") if path.is_file())


def flip(path: Path, at: int) -> bytes:
    before = path.read_bytes()
    changed = bytearray(before)
    changed[at] ^= 1 << (at % 8)
    path.write_bytes(bytes(changed))
    return before


def test_a_flipped_bit_anywhere_is_found_and_named(corpus_path):
    rng = np.random.default_rng(0)
    slides = {
        record["folder"]: record["name"]
        for record in json.loads((corpus_path / "manifest.json").read_bytes())["slides"]
    }
    files = files_of(corpus_path)
    assert 4 * len(files) >= 200
    for path in files:
        for at in rng.integers(0, path.stat().st_size, 4).tolist():
            before = flip(path, at)
            problems = verify_corpus(corpus_path)
            path.write_bytes(before)
            assert len(problems) == 1 and str(path) in problems[0]
            for folder, name in slides.items():
                assert (name in problems[0]) == path.is_relative_to(corpus_path / folder)
    assert verify_corpus(corpus_path) == []


def test_truncated_and_missing_files_are_found(corpus_path):
    for path in files_of(corpus_path):
        if path.name == "manifest.json":
            continue
        before = path.read_bytes()
        path.write_bytes(before[:-1])
        (changed,) = verify_corpus(corpus_path)
        path.unlink()
        (missing,) = verify_corpus(corpus_path)
        path.write_bytes(before)
        assert str(path) in changed and "changed" in changed
        assert str(path) in missing and "missing" in missing


@pytest.mark.parametrize("array", ["entries", "nnz"])
def test_a_damaged_or_lost_chunk_is_an_error_when_it_is_read(corpus_path, array):
    (shard,) = (
        path for path in next((corpus_path / "slides").iterdir()).glob(f"{array}/c/**/*") if path.is_file()
    )
    before = flip(shard, 30)
    damaged = rf"slides/tissue_s\d-\w+/{array}: slide 'tissue/s\d' cannot be read"
    with pytest.raises(InputError, match=damaged):
        Corpus.open(corpus_path).cells(np.arange(300))
    shard.write_bytes(before)
    assert len(Corpus.open(corpus_path).cells(np.arange(300)).offsets) == 301
    shard.unlink()
    with pytest.raises(InputError, match=damaged):
        Corpus.open(corpus_path).cells(np.arange(300))


def everything(path: Path) -> list[np.ndarray]:
    """All that training and evaluation may read."""
    corpus = Corpus.open(path)
    index = np.arange(corpus.n_cells)
    cells = corpus.cells(index)
    columns = [
        corpus.column(name) for name in ("x", "y", "total_matched", "total_raw", "source_row", "n_genes")
    ]
    return [
        cells.genes,
        cells.counts,
        cells.offsets,
        *columns,
        corpus.column("x", index),
        corpus.neighbours(index, corpus.n_neighbours),
        corpus.labels("type")[0],
        corpus.technology_means("sim"),
    ]


@pytest.mark.parametrize("change", ["flip", "truncate"])
def test_damage_is_an_error_that_names_it_or_changes_nothing_that_is_read(corpus_path, change):
    expected = everything(corpus_path)
    rng, errors = np.random.default_rng(1), 0
    shards = [path for path in files_of(corpus_path / "slides") if path.parent.name in ("c", "0")]
    assert len(shards) >= 20
    for number in range(200):
        path = shards[number % len(shards)]
        at = int(rng.integers(path.stat().st_size))
        before = path.read_bytes()
        flip(path, at) if change == "flip" else path.write_bytes(before[:at])
        _, folder, array, *_ = path.relative_to(corpus_path).parts
        slide = json.loads((corpus_path / "slides" / folder / "slide.json").read_bytes())
        try:
            found = everything(corpus_path)
        except InputError as error:
            errors += 1
            assert slide["record"]["name"] in str(error) and array in str(error)
        else:
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)
        path.write_bytes(before)
    assert errors > 150


def test_a_changed_manifest_does_not_open(corpus_path):
    manifest = json.loads((corpus_path / "manifest.json").read_bytes())
    manifest["slides"][0]["n_cells"] -= 1
    (corpus_path / "manifest.json").write_bytes(canonical_json(manifest))
    with pytest.raises(InputError, match="hash does not fit"):
        Corpus.open(corpus_path)


def test_a_newer_schema_is_an_error(corpus_path):
    manifest = json.loads((corpus_path / "manifest.json").read_bytes())
    newer = manifest | {"schema": SCHEMA + 1, "what this version cannot know": 1}
    write_manifest(Place(corpus_path), newer)
    told = rf"schema is {SCHEMA + 1}, this scfm_jax reads up to {SCHEMA}; upgrade"
    for read in (Corpus.open, verify_corpus):
        with pytest.raises(InputError, match=told):
            read(corpus_path)


def test_what_is_no_corpus_is_an_error(tmp_path):
    (tmp_path / "half" / "building" / "finished").mkdir(parents=True)
    (tmp_path / "half" / "building" / "finished" / "one.json").write_text("{}")
    for name, mend in (("nothing", "scfm corpus build"), ("half", "run it again")):
        for read in (Corpus.open, verify_corpus):
            with pytest.raises(InputError, match=mend):
                read(tmp_path / name)
