"""A short ladder of static lengths: each rung is one compilation, each gap between rungs is padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Ladder:
    """Ascending static lengths.

    Attributes
    ----------
    rungs
        The lengths, the last of which holds anything that can come.
    """

    rungs: tuple[int, ...]

    def rung(self, length: int) -> int:
        """The shortest rung that holds `length`.

        Raises
        ------
        ValueError
            None does; a token is never cut off to make it fit.
        """
        place = int(np.searchsorted(self.rungs, length))
        if place == len(self.rungs):
            raise ValueError(f"{length} tokens exceed the longest rung, {self.rungs[-1]}")
        return self.rungs[place]

    def reaching(self, longest: int, multiple: int) -> Ladder:
        """The same, going on in steps of a quarter, multiples of `multiple`, until it holds `longest`."""
        rungs = list(self.rungs)
        while rungs[-1] < longest:
            rungs.append(-(-rungs[-1] * 5 // (4 * multiple)) * multiple)
        return Ladder(tuple(rungs))


def fit_ladder(lengths: Int[np.ndarray, " n"], *, n_rungs: int, multiple: int, longest: int) -> Ladder:
    """The ladder that pads a sample of lengths least.

    Parameters
    ----------
    lengths
        Longest row of each batch of a sample.
    n_rungs
        Rungs for lengths like these.
    multiple
        Every rung is a multiple of it.
    longest
        Upper bound of any length. The rungs above the sample (see `Ladder.reaching`) are rarely used.
    """
    rounded, weight = np.unique(-(-np.maximum(lengths, 1) // multiple) * multiple, return_counts=True)
    n_rungs = min(n_rungs, len(rounded))
    # cost[i, j]: rows of distinct lengths i..j-1 all padded to the longest of them.
    count, mass = (np.concatenate([[0], np.cumsum(w)]) for w in (weight, weight * rounded))
    cost = rounded[None, :] * (count[None, 1:] - count[:-1, None]) - (mass[None, 1:] - mass[:-1, None])
    cost = np.where(np.tri(len(rounded), dtype=bool).T, cost, np.inf)
    best, cuts = cost[0], []
    for _ in range(n_rungs - 1):
        through = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        cuts.append(through.argmin(0))
        best = through.min(0)
    end, rungs = len(rounded) - 1, []
    for cut in reversed(cuts):
        rungs.append(int(rounded[end]))
        end = int(cut[end]) - 1
    rungs.append(int(rounded[end]))
    return Ladder(tuple(reversed(rungs))).reaching(longest, multiple)
