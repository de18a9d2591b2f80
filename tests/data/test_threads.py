"""Parts on several cores: their order, their errors, and that no result depends on how many there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scfm_jax.data import threads
from scfm_jax.data.masks import MaskRates
from scfm_jax.data.ranks import RankConfig, TokenMask
from scfm_jax.data.threads import equal_parts, in_parts
from scfm_jax.data.tokens import SampleConfig


@pytest.fixture(params=[1, 3])
def cores(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(threads, "CORES", request.param)
    return request.param


def test_results_are_in_the_order_of_the_parts_also_from_within(cores: int) -> None:
    def inner(part: int) -> list[int]:
        return in_parts(lambda number: part * number, range(4))

    assert in_parts(inner, range(20)) == [[part * number for number in range(4)] for part in range(20)]
    assert in_parts(inner, []) == []


def test_an_error_of_a_part_is_raised(cores: int) -> None:
    with pytest.raises(ZeroDivisionError):
        in_parts(lambda number: 1 // number, [2, 1, 0, 3])


@pytest.mark.parametrize("sizes", [[], [0], [5], [0, 0, 0], [1] * 10, [100, 1, 1, 1], [1, 1, 100]])
def test_parts_are_all_things_once(cores: int, monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    monkeypatch.setattr(threads, "_PART", 3)
    runs = equal_parts(np.array(sizes, np.int64))
    assert [n for run in runs for n in range(run.start, run.stop)] == list(range(len(sizes)))
    assert all(sum(sizes[run]) <= 3 or run.stop - run.start == 1 or max(sizes[run]) > 3 for run in runs)


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (SampleConfig(neighbours=3), MaskRates(0.4, 0.1)),
        (SampleConfig(neighbours=3, panel_limit=42), MaskRates(0.4, 0.1)),
        (RankConfig(extra_assays=("sim",), niche_neighbours=3, length=30), TokenMask(0.3, context=True)),
    ],
    ids=["panel", "limit", "ranks"],
)
def test_what_is_read_depends_on_neither_cores_nor_parts(
    known: Any, cores: int, monkeypatch: pytest.MonkeyPatch, config: Any, rates: Any
) -> None:
    cells = np.random.default_rng(0).permutation(known.corpus.n_cells)[:150]
    reader = config.reader(known.corpus)

    def batch() -> Any:
        read = reader.read(cells, draw=5, seed=3, rates=rates)
        return read.collate(np.arange(len(cells)), *(int(n) for n in read.lengths.max(0)), len(cells))

    whole = batch()
    monkeypatch.setattr(threads, "_PART", 100)
    for name, values in whole.items():
        np.testing.assert_array_equal(batch()[name], values)
