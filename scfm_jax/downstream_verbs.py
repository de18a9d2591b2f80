"""The verbs ``scfm probe``, ``scfm finetune`` and ``scfm evaluate``, each thin."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from scfm_jax.compilations import cache_compilations
from scfm_jax.console import Bar, print_json
from scfm_jax.errors import InputError
from scfm_jax.flags import GeneTables, Labelling, Reading, Split, Tuning

_TITLES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "ece": "ECE"}


def probe(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    file: Positional[Annotated[Path, arg(metavar="FILE.h5ad")]],
    /,
    output: Annotated[Path, arg(aliases=["-o"])],
    labelling: Annotated[Labelling, arg(name="")],
    split: Annotated[Split, arg(name="split")],
    reading: Annotated[Reading, arg(name="")],
    tables: Annotated[GeneTables, arg(name="")],
    way: Literal["probe", "mean", "neighbourhood"] = "probe",
    key_added: Annotated[str | None, arg(metavar="KEY")] = None,
    checkpoint: Literal["best", "last"] = "best",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Predict a label from a run's embeddings, score it beside the same of expression, and keep it in a copy.

    Parameters
    ----------
    run
        A run directory.
    file
        AnnData with raw counts and the label (.h5ad).
    output
        The new h5ad file: predictions in obs, probabilities in obsm, scores in uns.
    way
        probe: logistic regression on the embedding of a cell among its neighbours. mean: on that of the cell
        alone, beside the mean of its neighbours'. neighbourhood: a small network over the embedding of the
        cell alone and those of its neighbours.
    key_added
        Key in obs and uns; LABEL_WAY if not given.
    checkpoint
        The best by held-out loss, or the last.
    seed
        Of what is drawn.
    json
        Print the scores as JSON.
    """
    from scfm_jax.downstream.annotate import open_file, probe_cells
    from scfm_jax.downstream.model import open_model
    from scfm_jax.downstream.outputs import check_new, written_whole

    check_new(output)
    cache_compilations()
    model, key = open_model(run, checkpoint=checkpoint), key_added or f"{labelling.label}_{way}"
    config = labelling.read(file, model, split)
    with (
        open_file(reading.source(file), tables.read(), config, key) as cells,
        Bar("embedding", quiet=json) as bar,
    ):
        record = probe_cells(cells, model, key, way=way, seed=seed, progress=bar.update, report=bar.say)
        with written_whole(output) as partial:
            cells.adata.write_h5ad(partial)
    if json:
        print_json({**record, "key": key})
        return
    _print_scores(file, record, f"{way}, k = {record['neighbours']}")
    _say_keys(output, key)


def finetune(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    file: Positional[Annotated[Path, arg(metavar="FILE.h5ad")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    /,
    labelling: Annotated[Labelling, arg(name="")],
    split: Annotated[Split, arg(name="split")],
    tuning: Annotated[Tuning, arg(name="")],
    reading: Annotated[Reading, arg(name="")],
    tables: Annotated[GeneTables, arg(name="")],
    fold: int = 0,
    annotate: Annotated[Path | None, arg(metavar="FILE.h5ad")] = None,
    merged: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    key_added: Annotated[str | None, arg(metavar="KEY")] = None,
    checkpoint: Literal["best", "last"] = "best",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Train a run on a label, on the training cells of one fold, and score its test cells.

    Parameters
    ----------
    run
        A run directory.
    file
        AnnData with raw counts and the label (.h5ad).
    out
        The new folder: what was trained, and scores.json.
    fold
        The fold whose cells are held out, by number.
    annotate
        A new h5ad file: the file with predictions of the test cells and of cells without a label.
    merged
        A new run directory with the trained weights, without the head: for scfm embed and scfm export.
    key_added
        Key in obs and uns of that file; LABEL_WAY if not given.
    checkpoint
        The best by held-out loss, or the last.
    seed
        Of what is drawn.
    json
        Print the scores as JSON.
    """
    from scfm_jax.downstream.annotate import finetune_cells, open_file
    from scfm_jax.downstream.model import open_model
    from scfm_jax.downstream.outputs import check_new, written_whole

    for path in filter(None, (out, annotate, merged)):
        check_new(path)
    cache_compilations()
    model, key = open_model(run, checkpoint=checkpoint), key_added or f"{labelling.label}_{tuning.way}"
    config, settings = labelling.read(file, model, split), tuning.read()
    with (
        open_file(reading.source(file), tables.read(), config, key) as cells,
        Bar("fine-tuning", quiet=json) as bar,
    ):
        tuned, record = finetune_cells(
            cells, model, key, settings, fold=fold, seed=seed, progress=_Epochs(bar), report=bar.say
        )
        # All is written before anything gets its name.
        with ExitStack() as written:
            folder = written.enter_context(written_whole(out))
            tuned.save(folder, run)
            with (folder / "scores.json").open("w") as scores:
                print_json(record, scores)
            if annotate:
                cells.adata.write_h5ad(written.enter_context(written_whole(annotate)))
            if merged:
                tuned.write_merged_run(written.enter_context(written_whole(merged)))
    if json:
        print_json({**record, "key": key})
        return
    _print_scores(file, record, f"{tuning.way}, k = {record['neighbours']}")
    print(
        f"{record['trained_parameters']:,} parameters trained (the model has "
        f"{record['model_parameters']:,}); {record['stored_bytes']:,} bytes stored, "
        f"{record['optimiser_bytes']:,} held by the optimiser: {out}"
    )
    if merged:
        print(f"merged into a run: {merged}")
    if annotate:
        _say_keys(annotate, key)


def evaluate(
    suite: Positional[Annotated[Path, arg(metavar="SUITE.toml")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    /,
    tasks: tuple[str, ...] = (),
    json: bool = False,
) -> None:
    """Compare models with baselines on the tasks of a suite, and write a report; goes on where it stopped.

    Parameters
    ----------
    suite
        A TOML file of files, tasks, models and methods.
    out
        The folder of results and report.html; a new one, or that of an earlier call.
    tasks
        Some of the suite's tasks; all if not given. Processes with different ones may share the folder.
    json
        Print the rows of results.jsonl as JSON.
    """
    import json as json_lines

    from scfm_jax.downstream.suite import COPY, RESULTS, run_suite

    if suite.resolve().parent == out.resolve():
        raise InputError(out, "is the suite's own folder", "name another folder")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / COPY).exists())):
        raise InputError(out, "exists already and holds no results of a suite", "name another folder")
    cache_compilations()
    with Bar("evaluating", quiet=json) as bar:
        page = run_suite(suite, out, tasks=tasks, report=bar.say)
    if json:
        print_json([json_lines.loads(line) for line in (out / RESULTS).read_text().splitlines()])
        return
    print(f"the report: {page}")


VERBS: dict[str, Callable[..., Any]] = {"probe": probe, "finetune": finetune, "evaluate": evaluate}


class _Epochs:
    """Steps to a bar, and a line for each epoch."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._said = bar, ""

    def __call__(self, done: int, total: int, note: str) -> None:
        self._bar.update(done, total, note)
        if note and note != self._said:
            self._bar.say(note)
        self._said = note


def _print_scores(file: Path, record: dict[str, Any], method: str) -> None:
    """A table of the scores, and what they are of."""
    print(
        f"{record['label']} of {file.name}: {len(record['classes'])} classes, "
        f"{record['cells_scored']:,} cells scored in {_folds(record)}"
    )
    rows = [
        (method, record["scores"], ""),
        (record["baseline"]["name"], record["baseline"]["scores"], ""),
        ("difference", record["difference"], "+"),
    ]
    width = max(len(name) for name, _, _ in rows) + 2
    print(" " * width + "".join(f"{title:<28}" for title in _TITLES.values()).rstrip())
    for name, scores, sign in rows:
        print(f"{name:<{width}}" + "".join(f"{_interval(scores[key], sign):<28}" for key in _TITLES).rstrip())
    for name, n in zip(record["left_out"], record["left_out_cells"], strict=True):
        print(f"left out: {name} ({n:,} cells)")
    if record["cells_without_label"] or record["cells_unknown"]:
        print(
            f"{record['cells_without_label']:,} cells without a label that counts; "
            f"{record['cells_unknown']:,} without a count of a gene that the model knows"
        )


def _folds(record: dict[str, Any]) -> str:
    n = len(record["folds"])
    return f"{n} fold{'s' if n > 1 else ''} ({record['split']})"


def _interval(found: dict[str, float], sign: str) -> str:
    value, low, high = (f"{found[end]:{sign}.3f}" for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _say_keys(path: Path, key: str) -> None:
    print(f'{path}: obs["{key}"], obs["{key}_fold"], obsm["{key}_probabilities"], uns["{key}"]')
