from __future__ import annotations

import pytest

from scfm_jax.corpus import Source, read_sources
from scfm_jax.errors import InputError

GOOD = """
[[source]]
path = "a/one.h5ad"
species = "mouse"
technology = "merfish"
section = "slice"
labels = ["cell_type", "region"]
coordinates = ["cx", "cy"]
um_per_unit = 1
max_radius = 80.5

[[source]]
path = "/data/two.h5ad"
species = "human"
technology = "chromium"
spatial = false
"""


def test_every_field_is_read_and_paths_start_from_the_file(tmp_path):
    (tmp_path / "sources.toml").write_text(GOOD)
    first, second = read_sources(tmp_path / "sources.toml")
    assert first == Source(
        path=str(tmp_path / "a/one.h5ad"),
        species="mouse",
        technology="merfish",
        section="slice",
        labels=("cell_type", "region"),
        coordinates=("cx", "cy"),
        um_per_unit=1,
        max_radius=80.5,
    )
    assert second == Source("/data/two.h5ad", "human", "chromium", spatial=False)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[source]", "cannot be read as TOML"),
        ("", "holds nothing"),
        ("[defaults]\nspecies = 'human'", "holds defaults"),
        ("[[source]]\npath = 'x'\nspecies = 'human'", "'technology' is missing"),
        ("[[source]]\npath = 'x'\nspecie = 'human'", "unknown field 'specie'"),
        (GOOD + "labels = 'type'", "'labels' is 'type'"),
        (GOOD + "um_per_unit = '1'", "'um_per_unit' is '1'"),
        (GOOD + "um_per_unit = true", "'um_per_unit' is True"),
        (GOOD + "um_per_unit = 0", "um_per_unit is 0"),
        (GOOD + "max_radius = 5", "um_per_unit is not known"),
        (GOOD + "table = 1", "'table' is 1"),
        (GOOD + "name = ' '", "name is ' '"),
        (GOOD + "coordinates = ['x']", "'coordinates' is ['x']"),
        (GOOD.replace("spatial = false", "spatial = 'no'"), "'spatial' is 'no'"),
    ],
)
def test_bad_sources_are_told_in_one_line(tmp_path, text, problem):
    path = tmp_path / "sources.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_sources(path)
    assert problem in str(error.value) and "\n" not in str(error.value) and error.value.mend


def test_missing_sources_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.toml: it cannot be read"):
        read_sources(tmp_path / "nowhere.toml")
