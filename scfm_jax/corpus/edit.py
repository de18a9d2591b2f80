"""Changing which slides a corpus holds, without rewriting a cell: merge corpora, remove slides."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scfm_jax.corpus.assemble import assemble, event
from scfm_jax.corpus.building import only_build
from scfm_jax.corpus.place import Place
from scfm_jax.corpus.reader import Corpus
from scfm_jax.errors import InputError


def merge_corpora(out: str | Path, paths: Sequence[str | Path]) -> dict[str, Any]:
    """Make one corpus of several: a manifest that points to their slides, whose cells stay where they are.

    Parameters
    ----------
    out
        The new corpus. It needs its parts: one that is moved or deleted is missed.
    paths
        Two or more corpora of one vocabulary and one least number of counts. Their slides follow one another
        in this order. Where they store different numbers of neighbours, the fewest hold for all.

    Returns
    -------
    The report of the new corpus.

    Raises
    ------
    InputError
        Corpora that do not fit together, a slide that several have, or ``out`` exists.
    """
    place = Place(out)
    if len(paths) < 2:
        raise InputError(place, f"{len(paths)} corpora are given", "name two or more to merge")
    if place.names() or (place.is_local and place.path.exists()):
        raise InputError(place, "it exists already", "remove it or choose another name")
    corpora = [Corpus.open(path, cache_bytes=0) for path in paths]
    first = corpora[0]
    owner: dict[str, str] = {}
    for corpus in corpora:
        for field, mend in (
            ("vocabulary", "build them with one --vocabulary"),
            ("min_counts", "build them with one --min-counts"),
        ):
            if corpus.manifest[field] != first.manifest[field]:
                raise InputError(corpus.path, f"its {field} is not that of {first.path}", mend)
        for slide in corpus.slides:
            if slide.name in owner:
                mend = "remove it from one of them"
                raise InputError(corpus.path, f"slide {slide.name!r} is in {owner[slide.name]} too", mend)
            owner[slide.name] = corpus.path
    settings = {name: first.manifest[name] for name in ("vocabulary", "min_counts")}
    settings["n_neighbours"] = min(corpus.n_neighbours for corpus in corpora)
    with only_build(place):
        return assemble(
            place,
            {
                _seen_from(place, Place(corpus.path) / record["folder"]): record["checksum"]
                for corpus in corpora
                for record in corpus.manifest["slides"]
            },
            first.vocabulary,
            settings,
            [file for corpus in corpora for file in corpus.report["files"]],
            [event("merge", corpora=[{"path": c.path, "hash": c.hash} for c in corpora])],
        )


def remove_slides(path: str | Path, names: Sequence[str]) -> dict[str, Any]:
    """Remove slides from a corpus, and then their files where they are its own.

    Parameters
    ----------
    path
        The corpus. Cells after the removed ones move up: it has a new hash.
    names
        Of slides.

    Returns
    -------
    The report of what is left.

    Raises
    ------
    InputError
        A name that no slide has, or nothing would be left.
    """
    place = Place(path)
    Corpus.open(path, cache_bytes=0)  # before anything is made there
    with only_build(place):
        corpus = Corpus.open(path, cache_bytes=0)
        records, there = corpus.manifest["slides"], [slide.name for slide in corpus.slides]
        for name in names:
            if name not in there:
                raise InputError(path, f"has no slide {name!r}", f"the slides are {', '.join(there)}")
        left = [record for record in records if record["name"] not in names]
        if not names or not left:
            problem = "no slide would be left" if names else "nothing to remove"
            raise InputError(path, problem, "name fewer")
        files = json.loads(json.dumps(corpus.report["files"]))
        for file in files:
            file["slides"] = [name for name in file["slides"] if name not in names]
        return assemble(
            place,
            {record["folder"]: record["checksum"] for record in left},
            corpus.vocabulary,
            {name: corpus.manifest[name] for name in ("vocabulary", "min_counts", "n_neighbours")},
            files,
            [*corpus.manifest["provenance"]["history"], event("remove", slides=list(names))],
        )


def _seen_from(place: Place, slide: Place) -> str:
    """How ``place`` names a slide elsewhere: relative where both are local, so that both may be moved."""
    if slide.is_local and not place.is_local:
        raise InputError(place, f"is in a bucket, {slide} is not", "copy that corpus to a bucket first")
    return os.path.relpath(slide.path, place.path) if slide.is_local else str(slide)
