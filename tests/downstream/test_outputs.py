"""Outputs: whole or not at all, beside whatever lies there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from scfm_jax.downstream.outputs import check_new, written_whole
from scfm_jax.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["law.json", "a" * 252, "\u00e9" * 127])
def test_what_lies_beside_an_output_is_left_alone(tmp_path: Path, name: str) -> None:
    others = tmp_path / "law.json.partial"
    others.mkdir()
    (others / "kept").write_text("by another")
    out = tmp_path / name
    check_new(out)
    assert names(tmp_path) == ["law.json.partial"]
    with written_whole(out) as partial, written_whole(out) as of_another:
        partial.write_text("first")
        of_another.write_text("second")
    assert out.read_text() == "first"  # which was ended last
    assert names(tmp_path) == sorted([name, "law.json.partial"]) and names(others) == ["kept"]


def test_a_folder_becomes_the_output(tmp_path: Path) -> None:
    with written_whole(tmp_path / "figures") as partial:
        partial.mkdir()
        (partial / "one.png").touch()
    assert names(tmp_path) == ["figures"] and names(tmp_path / "figures") == ["one.png"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_nothing_and_is_one_line(tmp_path: Path, folder: bool) -> None:
    told = r"out: cannot be written: No space left on device; name another place"
    with pytest.raises(InputError, match=told), written_whole(tmp_path / "out") as partial:
        partial.mkdir() if folder else partial.touch()
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyError), written_whole(tmp_path / "out") as partial:
        partial.mkdir() if folder else partial.touch()
        raise KeyError("a mistake of ours")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("there", "there: exists already; name another output or remove it"),
        ("link", "link: exists already"),
        ("none/out", "none/out: its folder does not exist; make it first"),
        ("a" * 256, "a: cannot be written: File name too long; name another place"),
        ("a" * 256 + "/out", "a/out: cannot be written: File name too long"),
    ],
)
def test_where_no_output_can_be(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match=told):
        check_new(tmp_path / name)
    assert names(tmp_path) == ["link", "there"]
