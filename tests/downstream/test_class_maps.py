"""Class maps: the format, its errors, and the files that come with the recipes."""

from __future__ import annotations

import os
from pathlib import Path

import anndata
import numpy as np
import pytest

from scfm_jax.downstream.class_maps import read_class_map, shared_classes
from scfm_jax.downstream.labels import read_labels
from scfm_jax.errors import InputError

ROOT = Path(__file__).parents[2]
MAPS = ROOT / "experiments" / "class_maps"
DATA = Path(os.environ.get("SCFM_DATA", ROOT / "../shared/data"))
SIDES = [
    ("brain", "cosmx_mouse_brain", None, None),
    ("brain", "merfish", "merfish_mouse_hypothalamus", "cell_type"),
    ("brain_and_embryo", "merfish", "merfish_mouse_hypothalamus", "cell_type"),
    ("brain_and_embryo", "seqfish", "seqfish_mouse_embryo2", "cell_type"),
    ("tumour", "cosmx_lung", "cosmx_human_nsclc_lung5_rep3", "Level2"),
    ("tumour", "xenium_breast", "xenium_human_breast_10k", "cell_type"),
]
GOOD = """
classes = ["X", "Y", "Z"]
[one]
left_out = ["?"]
[one.classes]
X = ["x1", "x2"]
Y = ["y"]
[two.classes]
Y = ["why"]
X = ["ex"]
Z = ["zed"]
[three.classes]
Z = ["z"]
X = ["x"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "map.toml").write_text(GOOD)
    return tmp_path / "map.toml"


def test_what_becomes_of_each_class(path):
    side = read_class_map(path, "one")
    assert side.to == {"x1": "X", "x2": "X", "y": "Y", "?": None}
    assert (side.classes, side.reached) == (("X", "Y", "Z"), ("X", "Y"))
    assert shared_classes(side, read_class_map(path, "two")) == ["X", "Y"]
    with pytest.raises(InputError, match="has no side 'four'; use one of its sides: one, two, three"):
        read_class_map(path, "four")
    with pytest.raises(InputError, match=r"share 'X'; give maps with two"):
        shared_classes(side, read_class_map(path, "three"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[one]", "[one", "cannot be read as TOML"),
        ("classes = [", "klasses = [", "field 'classes' is None; give a list"),
        ("[one.classes]", "[uno.classes]", "has no table of classes"),
        ('"X", "Y"', '"X"', "'Y' is none of the shared classes"),
        ('["y"]', '["x1"]', "'x1' is named twice"),
        ('["?"]', '["y"]', "'y' is named twice"),
        ('["y"]', '"y"', "field 'Y' is 'y'; give a list"),
        ('["y"]', '["y", "y"]', "field 'Y' names a class twice"),
        ("left_out", "leftout", "unknown field 'leftout'"),
        ("[one.classes]", "[one.other]", "has no table of classes"),
    ],
)
def test_bad_maps_are_one_line_that_names_the_file(path, old, new, message):
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        read_class_map(path, "one")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_published_map_has_the_published_sizes():
    classes = {side: read_class_map(MAPS / "brain.toml", side) for side in ("cosmx_mouse_brain", "merfish")}
    assert {side: len(of.to) for side, of in classes.items()} == {"cosmx_mouse_brain": 49, "merfish": 16}
    assert len(shared_classes(*classes.values())) == 8
    subtypes = list(classes["cosmx_mouse_brain"].to.values())
    # The table of the study's own README.
    assert [subtypes.count(name) for name in ("Astrocyte", "Inhibitory", "Oligodendrocyte")] == [2, 10, 5]


@pytest.mark.parametrize(("name", "side", "file", "column"), SIDES)
def test_every_map_that_comes_along_fits_its_file(name, side, file, column):
    class_map = read_class_map(MAPS / f"{name}.toml", side)
    assert set(class_map.to.values()) - {None} == set(class_map.classes)
    if file is None:
        return
    if not (DATA / f"{file}.h5ad").exists():
        pytest.skip(f"needs {file}.h5ad")
    obs = anndata.read_h5ad(DATA / f"{file}.h5ad", backed="r").obs
    labels = read_labels(obs, column, class_map=class_map)
    stated = obs[column].astype(object).map(class_map.to).value_counts()
    assert labels.classes == list(class_map.classes)
    assert np.bincount(labels.codes[labels.codes >= 0]).tolist() == [stated[name] for name in labels.classes]


def test_no_map_is_without_a_test():
    assert {path.stem for path in MAPS.glob("*.toml")} == {name for name, *_ in SIDES}
