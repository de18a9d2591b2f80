"""Technology means: what a gene's counts are divided by before a cell's genes are ranked (Nicheformer)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, Float64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.reader import Slide
from scfm_jax.errors import DataWarning, InputError


def usable_means(
    means: Float[np.ndarray, " g"], kind: Literal["exact", "published"]
) -> Float64[np.ndarray, " g"]:
    """Technology means fit to divide by: what is missing is 1; see `RankConfig`."""
    if kind == "published":
        rounded = np.floor(np.nan_to_num(means) + 0.5)
        return np.where(rounded == 0, 1, rounded)
    return np.where(means > 0, means, 1)


def read_means(path: str | Path, n_genes: int) -> Float64[np.ndarray, " g"]:
    """Technology means of a ``.npy`` file, in the order of the vocabulary.

    Raises
    ------
    InputError
        No file of numbers, or of another vocabulary.
    """
    try:
        means = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise InputError(path, f"cannot be read as means ({error})", "give a .npy file of numbers") from error
    if not isinstance(means, np.ndarray):
        raise InputError(path, "holds several arrays", "give a .npy file of technology means")
    if means.shape != (n_genes,) or means.dtype.kind not in "fiu":
        raise InputError(
            path,
            f"holds {means.dtype} of shape {means.shape}, the vocabulary {n_genes:,} genes",
            "give technology means of the vocabulary",
        )
    if np.isinf(means).any():
        raise InputError(path, "holds infinite means", "give technology means, NaN where there is none")
    return means.astype(np.float64)


def means_of_slide(corpus: Corpus, slide: Slide, mean_files: Sequence[str] = ()) -> Float64[np.ndarray, " g"]:
    """Technology means for a slide: the corpus's or, where there are files, its technology's or modality's.

    Parameters
    ----------
    mean_files
        ``name=file.npy``, see `RankConfig`.

    Raises
    ------
    InputError
        Files are given, but none for the slide, or one that cannot be read.

    Warns
    -----
    DataWarning
        The file has no mean for genes that cells of the technology have, or a negative one.
    """
    technology = slide.technology
    if not mean_files:
        return corpus.technology_means(technology)
    files = {name.lower(): file for name, file in (entry.split("=", 1) for entry in mean_files)}
    path = files.get(technology.lower()) or files.get(slide.modality)
    if path is None:
        raise InputError(
            corpus.path,
            f"slide {slide.name!r}: there are no technology means of {technology!r} "
            f"(there are {', '.join(files)})",
            "name the technology as these do, or give its means",
        )
    means = read_means(path, len(corpus.vocabulary))
    own = means[~np.isnan(corpus.technology_means(technology))]
    missing, negative = int(np.isnan(own).sum()), int((own < 0).sum())
    if missing + negative:
        warnings.warn(
            f"{path}: of {len(own):,} genes that cells of {technology!r} have, {missing:,} have no mean and "
            f"{negative:,} a negative one",
            DataWarning,
            stacklevel=2,
        )
    return means
