"""Slides added to a corpus, removed from it, and corpora merged: cells stay where they are."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from scfm_jax.cli import main
from scfm_jax.corpus import Corpus, add_sources, build_corpus, merge_corpora, remove_slides, verify_corpus
from scfm_jax.errors import InputError


@pytest.fixture
def path(tissue, write, tmp_path):
    build_corpus(tmp_path / "corpus", [write(tissue, labels=("type",))], n_neighbours=9)
    return tmp_path / "corpus"


def files(path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}


def same_cells(one: Corpus, first: np.ndarray, other: Corpus, second: np.ndarray) -> None:
    for field in ("genes", "counts", "offsets"):
        np.testing.assert_array_equal(
            getattr(one.cells(first), field), getattr(other.cells(second), field), err_msg=field
        )
    np.testing.assert_array_equal(one.distances(first, 5), other.distances(second, 5))
    names, more = (np.array(corpus.labels("type")[1]) for corpus in (one, other))
    codes, others = (c.labels("type", i)[0] for c, i in ((one, first), (other, second)))
    np.testing.assert_array_equal(
        np.where(codes < 0, "", names[codes]), np.where(others < 0, "", more[others])
    )


def test_added_slides_come_last_and_touch_nothing(tissue, write, tmp_path, path):
    before, hash_before = files(path / "slides"), Corpus.open(path).hash
    more = write(tissue[:100], "more", labels=("type",))
    report = add_sources(path, [more])
    corpus = Corpus.open(path)
    assert [slide.name for slide in corpus.slides] == ["tissue/s1", "tissue/s2", "more/s1", "more/s2"]
    assert report["n_cells"] == corpus.n_cells == 400 and len(report["files"]) == 2
    assert before.items() <= files(path / "slides").items() and corpus.hash != hash_before
    assert verify_corpus(path) == [] and corpus.manifest["provenance"]["history"][-1]["what"] == "add"
    build_corpus(tmp_path / "at once", [write(tissue, labels=("type",)), more], n_neighbours=9)
    assert Corpus.open(tmp_path / "at once").hash == corpus.hash
    np.testing.assert_array_equal(
        corpus.technology_means("sim"), Corpus.open(tmp_path / "at once").technology_means("sim")
    )


def test_what_is_there_already_is_not_done_again(tissue, write, path):
    source, more = write(tissue, labels=("type",)), write(tissue, "more", labels=("type",))
    # The file was written again: only its time differs, and so it is another request.
    with pytest.raises(InputError, match="it exists already; remove it, choose another name, or add to it"):
        build_corpus(path, [source], n_neighbours=9)
    report = add_sources(path, [more])
    before = files(path)
    assert add_sources(path, [more]) == report and files(path) == before


def test_what_was_removed_can_be_added_again(tissue, write, path):
    more = write(tissue, "more", labels=("type",))
    add_sources(path, [more])
    hash_before = Corpus.open(path).hash
    remove_slides(path, ["more/s1", "more/s2"])
    add_sources(path, [more])
    assert Corpus.open(path).hash == hash_before and verify_corpus(path) == []


def test_a_build_that_is_done_does_nothing(tissue, write, tmp_path):
    source = write(tissue)
    report = build_corpus(tmp_path / "out", [source])
    before = files(tmp_path / "out")
    assert build_corpus(tmp_path / "out", [source]) == report and files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("name", "fields", "problem"),
    [
        ("tissue", {}, "slide 'tissue/s1' would come from this corpus too"),
        ("other", {"layer": "no"}, "layer 'no'"),
    ],
)
def test_what_cannot_be_added_changes_nothing(tissue, write, path, name, fields, problem):
    before = files(path)
    with pytest.raises(InputError, match=problem):
        add_sources(path, [write(tissue, name, **fields)])
    assert files(path) == before and verify_corpus(path) == []


def test_an_addition_that_was_killed_leaves_the_corpus_whole(tissue, write, path):
    source = write(tissue, "more", labels=("type",))
    program = """
import os, sys
from scfm_jax.corpus import Source, add_sources, build
build.assemble = lambda *a, **k: os._exit(9)
add_sources(sys.argv[1], [Source(sys.argv[2], "human", "sim", section="section", labels=("type",))])
"""
    hash_before = Corpus.open(path).hash
    killed = subprocess.run([sys.executable, "-c", program, str(path), source.path], check=False)
    assert killed.returncode == 9 and Corpus.open(path).hash == hash_before and verify_corpus(path) == []
    written = files(path / "slides")
    add_sources(path, [source])
    assert files(path / "slides") == written and len(Corpus.open(path).slides) == 4


def test_removed_slides_are_gone_and_the_others_stay(path):
    whole = Corpus.open(path)
    second = np.arange(whole.slides[1].start, whole.n_cells)
    kept = [whole.cells(second), whole.column("source_row", second)]
    folders = sorted((path / "slides").iterdir())
    report = remove_slides(path, ["tissue/s1"])
    left = Corpus.open(path)
    assert [slide.name for slide in left.slides] == ["tissue/s2"] and report["n_slides"] == 1
    assert report["files"][0]["slides"] == ["tissue/s2"] and len(
        list((path / "slides").iterdir())
    ) == 1 < len(folders)
    np.testing.assert_array_equal(left.cells(np.arange(left.n_cells)).counts, kept[0].counts)
    np.testing.assert_array_equal(left.column("source_row"), kept[1])
    assert verify_corpus(path) == []
    for names, problem in (
        (["tissue/s9"], "has no slide 'tissue/s9'"),
        (["tissue/s2"], "no slide would be left"),
    ):
        with pytest.raises(InputError, match=problem):
            remove_slides(path, names)


def test_merged_corpora_point_to_their_slides(tissue, write, tmp_path, path):
    vocabulary = Corpus.open(path).vocabulary
    second = tmp_path / "deeper" / "second"
    build_corpus(
        second,
        [write(tissue[50:200], "second", labels=("type",), technology="other")],
        vocabulary=vocabulary,
        n_neighbours=12,
    )
    report = merge_corpora(tmp_path / "both", [path, second])
    assert not (tmp_path / "both" / "slides").exists() and verify_corpus(tmp_path / "both") == []
    both, one, other = (Corpus.open(p) for p in (tmp_path / "both", path, second))
    assert report["n_cells"] == both.n_cells == one.n_cells + other.n_cells and both.n_neighbours == 9
    same_cells(both, np.arange(one.n_cells), one, np.arange(one.n_cells))
    same_cells(both, one.n_cells + np.arange(other.n_cells), other, np.arange(other.n_cells))
    np.testing.assert_array_equal(both.technology_means("other"), other.technology_means("other"))
    mixed = np.random.default_rng(0).permutation(both.n_cells)
    near = both.neighbours(mixed, 9)
    assert (both.slide_of(near.ravel()).reshape(near.shape) == both.slide_of(mixed)[:, None]).all()
    # Both parts may move together.
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "moved"))
    assert verify_corpus(moved / "both") == [] and Corpus.open(moved / "both").hash == both.hash
    moved.rename(tmp_path)


def test_a_merged_corpus_can_lose_and_gain_slides_of_its_own(tissue, write, tmp_path, path):
    vocabulary = Corpus.open(path).vocabulary
    build_corpus(tmp_path / "second", [write(tissue, "second")], vocabulary=vocabulary, n_neighbours=9)
    merge_corpora(tmp_path / "both", [path, tmp_path / "second"])
    remove_slides(tmp_path / "both", ["second/s1"])
    add_sources(tmp_path / "both", [write(tissue, "third")])
    names = [slide.name for slide in Corpus.open(tmp_path / "both").slides]
    assert names == ["tissue/s1", "tissue/s2", "second/s2", "third/s1", "third/s2"]
    for corpus in ("both", "second", "corpus"):
        assert verify_corpus(tmp_path / corpus) == []


def test_corpora_that_do_not_fit_are_told_apart(tissue, write, tmp_path, path):
    build_corpus(tmp_path / "few", [write(tissue[:, :20].copy(), "few")])
    build_corpus(tmp_path / "strict", [write(tissue, "strict")], min_counts=5)
    for paths, problem in (
        ([path, tmp_path / "few"], "few: its vocabulary is not that of"),
        ([path, tmp_path / "strict"], "strict: its min_counts is not that of"),
        ([path, path], "slide 'tissue/s1' is in"),
        ([path], "1 corpora are given"),
        ([path, tmp_path / "none"], r"no manifest.json there"),
    ):
        with pytest.raises(InputError, match=problem):
            merge_corpora(tmp_path / "out", paths)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="it exists already"):
        merge_corpora(path, [path, tmp_path / "few"])


def test_the_words_of_the_command_line(tissue, write, tmp_path, path, capsys):
    more = write(tissue, "more").path
    flags = ["--species", "human", "--technology", "sim", "--section", "section"]
    assert main(["corpus", "add", str(path), more, *flags]) == 0
    assert "600 cells of 40 genes in 4 slides" in capsys.readouterr().out
    assert main(["corpus", "remove", str(path), "more/s1", "more/s2"]) == 0
    assert "300 cells of 40 genes in 2 slides" in capsys.readouterr().out
    assert (
        main(["corpus", "build", str(tmp_path / "b"), more, *flags, "--codec", "zstd", "--workers", "2"]) == 0
    )
    assert main(["corpus", "merge", str(tmp_path / "c"), str(path), str(tmp_path / "b")]) == 0
    assert "600 cells of 40 genes in 4 slides" in capsys.readouterr().out
    assert main(["corpus", "verify", str(tmp_path / "c")]) == 0
    assert main(["corpus", "merge", str(tmp_path / "d"), str(path)]) == 2
    assert "name two or more to merge" in capsys.readouterr().err


def flip_label(path) -> None:
    slide = next((path / "slides").glob("tissue_s2-*")) / "slide.json"
    slide.write_bytes(slide.read_bytes().replace(b'"NK"', b'"NJ"'))


def test_damage_is_never_made_part_of_a_new_manifest(tissue, write, tmp_path, path):
    more = write(tissue, "more")
    flip_label(path)
    before = files(path)
    told = r"slides/tissue_s2-\w+/slide.json: it was changed since it was written"
    for change in (
        lambda: remove_slides(path, ["tissue/s1"]),
        lambda: add_sources(path, [more]),
        lambda: merge_corpora(tmp_path / "both", [path, other(tissue, write, tmp_path, path)]),
        lambda: Corpus.open(path).labels("type"),
    ):
        with pytest.raises(InputError, match=told):
            change()
    assert before.items() <= files(path).items() and len(verify_corpus(path)) == 1


def other(tissue, write, tmp_path, path):
    out = tmp_path / "second"
    vocabulary = Corpus.open(path).vocabulary
    build_corpus(out, [write(tissue, "second")], vocabulary=vocabulary, n_neighbours=9)
    return out
