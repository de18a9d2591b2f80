"""Which cells stand around a centre, and whose expression they show: the neighbours, and two controls.

What neighbours are worth is measured against neighbours that lack one thing: without the nearest, whose
transcripts spill over the border of a segmented cell, or with their composition kept and everything else of
them taken from elsewhere in the slide.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64

from scfm_jax.corpus.reader import Corpus
from scfm_jax.errors import InputError


class Context:
    """The cells around a centre.

    Parameters
    ----------
    corpus
        Open corpus.
    k
        Neighbours of a centre.
    skip_nearest
        The nearest so many are left out, and the next `k` are taken.
    exchanged_within
        Labels. Each neighbour shows the expression of another cell of its slide with the same classes: the
        next in a random cycle of these cells, which the slide's name draws, or the one after where that is
        the centre: no centre is shown as its own neighbour, nor any cell twice. It may be a cell that the
        split holds out, as unlabelled context. A missing label is a class too; a neighbour that is alone in
        its class, but for the centre, shows itself. Memory is 4 bytes a cell of the slides that were read.

    Raises
    ------
    InputError
        A label that the corpus lacks; with no neighbours nothing is asked of it.
    """

    def __init__(
        self, corpus: Corpus, k: int, *, skip_nearest: int = 0, exchanged_within: Sequence[str] = ()
    ) -> None:
        self.corpus, self.k, self.skip_nearest = corpus, k, skip_nearest if k else 0
        self._labels = tuple(exchanged_within) if k else ()
        for name in self._labels:
            if name not in corpus.label_names:
                there = ", ".join(corpus.label_names) or "none: build the corpus with --labels"
                problem = f"exchanged_within names {name!r}, no label of the corpus"
                raise InputError(corpus.path, problem, f"use one of {there}")
        self._next: dict[int, Int32[np.ndarray, " of_slide"]] = {}

    def members(
        self, centres: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, "n c"], Int64[np.ndarray, "n c"]]:
        """Centres and their neighbours, c = k + 1, nearest first, -1 where there are fewer.

        Returns
        -------
        The cells that stand there, and those whose expression they show: the same array, unless exchanged.

        Raises
        ------
        InputError
            More neighbours than the corpus stores.
        """
        near = self.corpus.neighbours(centres, self.skip_nearest + self.k)[:, self.skip_nearest :]
        places = np.concatenate([centres[:, None], near], axis=1)
        if not self._labels:
            return places, places
        shown, slides = places.copy(), self.corpus.slide_of(centres)
        for slide in np.unique(slides).tolist():
            rows, start = np.flatnonzero(slides == slide), self.corpus.slides[slide].start
            following = self._following(slide)
            centre, real = places[rows, :1] - start, near[rows] >= 0
            other = following[np.where(real, near[rows] - start, 0)]
            other = np.where(other == centre, following[centre], other)
            shown[rows, 1:] = np.where(real, other + start, -1)
        return places, shown

    def _following(self, slide: int) -> Int32[np.ndarray, " of_slide"]:
        """The next cell in the cycle of each cell of a slide, numbered within the slide."""
        if slide not in self._next:  # two threads may both make it, and make the same
            rows = np.arange(*self.corpus.slide_starts[slide : slide + 2])
            classes = [self.corpus.labels(label, rows)[0] for label in self._labels]
            random = np.random.default_rng([*f"exchange {self.corpus.slides[slide].name}".encode()])
            self._next[slide] = random_cycles(np.stack(classes), random)
        return self._next[slide]


def random_cycles(
    classes: Int32[np.ndarray, "labels n"], random: np.random.Generator
) -> Int32[np.ndarray, " n"]:
    """What follows each of n things in a random cycle of all that are alike in every label."""
    n = classes.shape[1]
    order = np.lexsort((random.permutation(n), *classes))
    changes = (np.diff(classes[:, order]) != 0).any(axis=0)
    first, last = (np.flatnonzero(edge) for edge in (np.append(True, changes), np.append(changes, True)))
    following = np.empty(n, np.int32)
    following[order[:-1]] = order[1:]
    following[order[last]] = order[first]
    return following
