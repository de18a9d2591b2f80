"""The ladder is the best there is, by trying all of them."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from scfm_jax.data.ladder import Ladder, fit_ladder


def padding(rungs: tuple[int, ...], lengths: np.ndarray) -> int:
    return sum(min(rung for rung in rungs if rung >= length) - length for length in lengths)


def least_padding(lengths: np.ndarray, n_rungs: int, multiple: int) -> int:
    top = -(-max(lengths.max(), 1) // multiple) * multiple
    below = range(multiple, top, multiple)
    return min(
        padding((*chosen, top), lengths) for size in range(n_rungs) for chosen in combinations(below, size)
    )


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("n_rungs", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_ladder_pads_less(seed, n_rungs, multiple):
    rng = np.random.default_rng(seed)
    lengths = rng.choice(rng.integers(1, 13 * multiple, 9), 25)
    ladder = fit_ladder(lengths, n_rungs=n_rungs, multiple=multiple, longest=int(lengths.max()))
    assert len(ladder.rungs) <= n_rungs
    assert padding(ladder.rungs, lengths) == least_padding(lengths, n_rungs, multiple)


def test_enough_rungs_leave_no_padding_but_the_multiple():
    lengths = np.array([3, 40, 17, 17, 90])
    assert fit_ladder(lengths, n_rungs=9, multiple=1, longest=90).rungs == (3, 17, 40, 90)
    assert fit_ladder(lengths, n_rungs=9, multiple=8, longest=90).rungs == (8, 24, 40, 96)


@pytest.mark.parametrize("longest", [1, 400, 401, 9_999])
def test_rungs_ascend_in_multiples_and_hold_the_longest(longest):
    lengths = np.random.default_rng(0).integers(1, min(longest, 400) + 1, 200)
    rungs = fit_ladder(lengths, n_rungs=5, multiple=8, longest=longest).rungs
    assert all(rung % 8 == 0 for rung in rungs) and list(rungs) == sorted(set(rungs))
    assert rungs[-1] >= longest
    # Beyond the sample a step is a quarter, so that whatever comes there pads at most a fifth and a multiple.
    beyond = [rung for rung in rungs if rung >= lengths.max()]
    assert all(b <= 1.25 * a + 8 for a, b in pairwise(beyond))


def test_a_rung_holds_what_was_asked_and_no_shorter_one_does():
    ladder = Ladder((8, 24, 40))
    for length in range(1, 41):
        assert ladder.rung(length) == next(rung for rung in (8, 24, 40) if rung >= length)


def test_over_the_longest_is_an_error():
    with pytest.raises(ValueError, match="41 tokens exceed the longest rung, 40"):
        Ladder((8, 24, 40)).rung(41)


def test_empty_rows_fit_the_shortest_rung():
    assert fit_ladder(np.zeros(4, np.int64), n_rungs=3, multiple=8, longest=8).rungs == (8,)
