"""What one kind of run gains over another: held-out losses of pairs of runs, file by file.

The runs of a pair are judged on the same cells and masked genes, so that their difference is known far better
than either loss, whose error is mostly that of the tissue, common to both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.downstream.metrics import CellSums
from scfm_jax.errors import InputError
from scfm_jax.scaling.held_out import HeldOutErrors, paired_loss, places_by_source
from scfm_jax.scaling.sweep import test_of
from scfm_jax.scaling.sweep_run import SweepFolder
from scfm_jax.training.run import read_run

ALL = "all"


@dataclass(frozen=True)
class Gain:
    """What runs gain over their references on the cells of a file.

    Attributes
    ----------
    runs
        The pattern that names the runs.
    file
        Source file of the cells, or ``all``.
    pairs
        How many pairs of runs.
    reference, loss
        Pooled losses of the references and of the runs, the mean over pairs.
    gain
        1 - loss / reference.
    low, high
        95% interval of `gain` by a bootstrap over blocks of tissue; the runs stay as they are.
    spread
        Standard deviation of the gain between pairs; None for one.
    """

    runs: str
    file: str
    pairs: int
    reference: float
    loss: float
    gain: float
    low: float
    high: float
    spread: float | None


def pairs_of(folder: SweepFolder, of: str, than: str) -> list[tuple[str, str]]:
    """Names of runs that are done and match `of`, each with its reference.

    Parameters
    ----------
    folder
        Of a sweep.
    of
        A name, with at most one ``*``.
    than
        That of the reference, where ``*`` stands for what it stood for in `of`.

    Raises
    ------
    InputError
        Two ``*``, or one in `than` alone; no run of that name, or a reference that is not done.
    """
    if of.count("*") > 1 or than.count("*") > of.count("*"):
        raise InputError(f"{of} than {than}", "has more * than can be told apart", "give each one *, or none")
    done = folder.names()
    pattern = re.compile(re.escape(of).replace(r"\*", "(.+)"))
    found = [match for name in done if (match := pattern.fullmatch(name))]
    if not found:
        raise InputError(folder.path, f"no run that is done is named {of}", _names(done))
    pairs = [(match[0], than.replace("*", match[match.re.groups])) for match in found]
    for name, reference in pairs:
        if reference not in done:
            raise InputError(
                folder.path, f"run {reference}, which {name} is held against, is not done", _names(done)
            )
    return pairs


def gains(
    folder: SweepFolder,
    of: Sequence[str],
    than: str,
    *,
    corpus: Path | None = None,
    part: str = "loss",
    draws: int = 1000,
    seed: int = 0,
) -> list[Gain]:
    """What the runs of each pattern of `of` gain over those named `than`: on all cells, then file by file.

    Parameters
    ----------
    folder, of, than
        As in `pairs_of`; the runs of a pattern are taken together.
    corpus
        Where the corpus lies, if not where it lay when the runs were trained.
    part
        Of `HeldOutErrors.parts`.
    draws, seed
        Of the bootstrap.

    Raises
    ------
    InputError
        No pattern; as `pairs_of` and `paired_loss`; another corpus than that of the runs; a part that they
        lack.
    """
    if not of:
        raise InputError("--of", "names no runs", "give at least one name")
    named = {pattern: pairs_of(folder, pattern, than) for pattern in of}
    loaded = {
        pattern: [tuple(_errors(folder, name, part) for name in pair) for pair in pairs]
        for pattern, pairs in named.items()
    }
    # All runs of a folder are judged by the same cells.
    config = read_run(folder.run(named[of[0]][0][0]))[0]
    opened = Corpus.open(corpus or config.corpus)
    first = loaded[of[0]][0][0]
    if opened.hash != first.corpus:
        raise InputError(
            opened.path, "is another corpus than the runs were judged on", "name that with --corpus"
        )
    block = split_cells(opened, test_of(config.split)).block[first.cells].astype(np.int64)
    places = {ALL: np.arange(len(first.cells)), **places_by_source(opened, first.cells)}
    return [
        _gain(pattern, file, pairs, at, block, part=part, draws=draws, seed=seed)
        for pattern, pairs in loaded.items()
        for file, at in places.items()
    ]


def _gain(
    of: str,
    file: str,
    pairs: Sequence[tuple[HeldOutErrors, ...]],
    at: Int64[np.ndarray, " m"],
    block: Int64[np.ndarray, " n"],
    *,
    part: str,
    draws: int,
    seed: int,
) -> Gain:
    taken = [(run.take(at), reference.take(at)) for run, reference in pairs]
    alone = [1 - paired_loss(*pair, block[at], part=part, draws=1).ratio for pair in taken]
    run, reference = (_summed([pair[side] for pair in taken], part) for side in (0, 1))
    found = paired_loss(run, reference, block[at], part=part, draws=draws, seed=seed)
    return Gain(
        runs=of,
        file=file,
        pairs=len(pairs),
        reference=reference.parts[part].mean,
        loss=run.parts[part].mean,
        gain=1 - found.ratio,
        low=1 - found.ratio_high,
        high=1 - found.ratio_low,
        spread=float(np.std(alone, ddof=1)) if len(alone) > 1 else None,
    )


def _summed(errors: Sequence[HeldOutErrors], part: str) -> HeldOutErrors:
    """Of several runs, which all have the same masked genes."""
    total, weight = (
        np.sum(sums, axis=0) for sums in zip(*(each.parts[part] for each in errors), strict=True)
    )
    return replace(errors[0], parts={part: CellSums(total, weight)})


def _errors(folder: SweepFolder, name: str, part: str) -> HeldOutErrors:
    errors = HeldOutErrors.load(folder.errors(name))
    if part not in errors.parts:
        raise InputError(folder.errors(name), f"holds no {part}", f"give one of {', '.join(errors.parts)}")
    return errors


def _names(done: Sequence[str]) -> str:
    return f"done are {', '.join(done)}" if done else "run the sweep first"
