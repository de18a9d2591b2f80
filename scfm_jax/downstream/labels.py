"""Labels of cells as codes: what counts as missing, which classes are too small, which become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Int, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.downstream.class_maps import ClassMap
from scfm_jax.errors import InputError

MISSING = ("nan", "None", "NA")


@dataclass(frozen=True, eq=False)
class Labels:
    """One label of every cell.

    Attributes
    ----------
    codes
        Place in `classes`, -1 where a cell has no class.
    classes
        Names: sorted, or in the order of the class map.
    left_out
        Cells of each class that a limit or a class map left out.
    missing
        Cells without a label, or with one that counts as none.
    """

    codes: Int64[np.ndarray, " n"]
    classes: list[str]
    left_out: dict[str, int]
    missing: int

    def among(self, classes: Sequence[str]) -> Labels:
        """The same labels as codes of `classes`; what is none of them is left out.

        Two files get the same codes so: give both the classes that they share.
        """
        place = {name: code for code, name in enumerate(classes)}
        to = np.array([*(place.get(name, -1) for name in self.classes), -1], np.int64)
        counts = np.bincount(self.codes[self.codes >= 0], minlength=len(self.classes)).tolist()
        gone = {name: n for name, n in zip(self.classes, counts) if n and name not in place}
        return Labels(to[self.codes], list(classes), self.left_out | gone, self.missing)


def read_labels(
    source: Corpus | anndata.AnnData | pd.DataFrame,
    column: str,
    *,
    missing: Sequence[str] = MISSING,
    min_cells: int = 0,
    min_blocks: int = 0,
    block: Int[np.ndarray, " n"] | None = None,
    class_map: ClassMap | None = None,
    where: str = "obs",
) -> Labels:
    """Read a label of every cell of a corpus, or of every row of ``obs``.

    Names in `missing` go first, then the class map merges, and the limits look at what it made.

    Parameters
    ----------
    source
        A corpus built with the label, an AnnData, or its ``obs``.
    column
        Name of the label.
    missing
        Names that count as no label, beside a real NaN; add ``"Ambiguous"`` where a file has it.
    min_cells, min_blocks
        A class in fewer cells, or in fewer blocks, is left out.
    block
        Spatial block of every cell, which `min_blocks` needs.
    class_map
        What becomes of each class.
    where
        The file that ``obs`` came from, for messages; a corpus names itself.

    Raises
    ------
    InputError
        A column that is not there, one class only, none left after the limits, limits on blocks without
        blocks, or a map that does not fit the labels.
    """
    where, names, codes = _raw(source, column, where)
    if min_blocks and block is None:
        raise InputError(
            where, f"min_blocks is {min_blocks}, and no block is given", "give every cell's block"
        )
    counts = dict(zip(names, np.bincount(codes[codes >= 0], minlength=len(names)).tolist(), strict=True))
    to: dict[str, str | None] = {name: name for name in names}
    classes, left_out = sorted(set(names) - set(missing)), {}
    if class_map is not None:
        class_map.check(names, missing=missing)
        to, classes = class_map.to, list(class_map.classes)
        left_out = {name: counts[name] for name, gone in to.items() if gone is None and name not in missing}
    place = {name: code for code, name in enumerate(classes)}
    coded = np.array([-1 if name in missing else place.get(to[name] or "", -1) for name in names] + [-1])
    n_missing = int((codes < 0).sum()) + sum(counts[name] for name in names if name in missing)
    found = np.bincount(coded[codes][coded[codes] >= 0], minlength=len(classes))
    if (found > 0).sum() < 2:
        said = " and ".join(repr(name) for name, n in zip(classes, found) if n) or "no class"
        raise InputError(where, f"label {column!r} has {said} alone", "give a label with two classes or more")
    kept = [name for name, n in zip(classes, found) if n]
    labels = Labels(coded[codes], classes, left_out, n_missing).among(kept)
    return _limited(labels, where, column, min_cells, min_blocks, block)


def _limited(
    labels: Labels,
    where: str,
    column: str,
    min_cells: int,
    min_blocks: int,
    block: Int[np.ndarray, " n"] | None,
) -> Labels:
    there = labels.codes >= 0
    cells = np.bincount(labels.codes[there])
    fits = cells >= min_cells
    if block is not None:
        pairs = np.unique(np.stack([labels.codes[there], block[there]]), axis=1)
        fits &= np.bincount(pairs[0], minlength=len(cells)) >= min_blocks
    kept = [name for name, enough in zip(labels.classes, fits) if enough]
    if len(kept) < 2:
        left = repr(kept[0]) + " alone" if kept else "no class"
        raise InputError(
            where,
            f"label {column!r} has {left} in {min_cells} cells and {min_blocks} blocks or more",
            "lower min_cells or min_blocks",
        )
    return labels.among(kept)


def _raw(
    source: Corpus | anndata.AnnData | pd.DataFrame, column: str, where: str
) -> tuple[str, list[str], Int64[np.ndarray, " n"]]:
    """Where it is, the names that cells have, sorted, and each cell's; -1 is a real NaN."""
    if isinstance(source, Corpus):
        codes, classes = source.labels(column)
        where, values = source.path, pd.Series(pd.Categorical.from_codes(codes, pd.Index(classes)))
    else:
        obs = source if isinstance(source, pd.DataFrame) else source.obs
        if column not in obs:
            there = ", ".join(map(str, obs.columns)) or "no column"
            raise InputError(where, f"no label {column!r}", f"use one of {there}")
        values = obs[column]
    coded, found = pd.factorize(values.astype(object).where(values.notna(), None), sort=False)
    texts = [str(name) for name in found]
    names = sorted(set(texts))
    to = np.array([*(names.index(text) for text in texts), -1], np.int64)
    return where, names, to[coded]
