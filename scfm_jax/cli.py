"""The command ``scfm``: one function a verb, each thin."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from scfm_jax import corpus_verbs, downstream_verbs, scaling_law_verbs, scaling_verbs, sweep_verbs
from scfm_jax.compilations import cache_compilations
from scfm_jax.console import print_build, print_json
from scfm_jax.errors import DataWarning, InputError
from scfm_jax.flags import GeneTables, Reading


def train(
    recipe: Positional[Annotated[Path, arg(metavar="RECIPE.py")]],
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    /,
    resume: bool = False,
    distributed: Annotated[str | None, arg(metavar="HOW")] = None,
    profile: Annotated[str | None, arg(metavar="START:STOP")] = None,
    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = (),
) -> None:
    """Pretrain a model. Any field of the recipe is a flag: --corpus PATH --optimiser.steps 500.

    Parameters
    ----------
    recipe
        A Python file with a function recipe(); see experiments/.
    run
        The run directory to write.
    resume
        Go on from the newest checkpoint of the run directory, on any number of hosts and devices.
    distributed
        How several hosts find each other: auto (as SLURM, Open MPI, GKE and TPU VMs say),
        ADDRESS:PORT,COUNT,NUMBER, or off. If not given, auto where a launcher started several processes.
    profile
        START:STOP, the first and the last step to trace, into profile/ of the run directory.
    """
    from scfm_jax.console import TrainingBar
    from scfm_jax.training.clock import parse_steps
    from scfm_jax.training.config import load_recipe, override
    from scfm_jax.training.hosts import is_primary, joined
    from scfm_jax.training.train import train

    config = override(load_recipe(recipe), overrides, str(recipe))
    if not config.corpus:
        raise InputError(recipe, "names no corpus", "add --corpus PATH")
    cache_compilations()
    steps = parse_steps(profile) if profile else None
    with joined(distributed):
        with TrainingBar(config.optimiser.steps, quiet=not is_primary()) as bar:
            done = train(config, run, resume=resume, profile=steps, report=bar.report)
        speaks = is_primary()
    if not speaks:
        return
    if done < config.optimiser.steps:
        print(f"stopped and saved at step {done:,}: the same command with --resume goes on")
    else:
        print(f"trained {done:,} steps: {run}")


def embed(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    file: Positional[Annotated[Path, arg(metavar="FILE.h5ad")]],
    /,
    output: Annotated[Path, arg(aliases=["-o"])],
    reading: Annotated[Reading, arg(name="")],
    tables: Annotated[GeneTables, arg(name="")],
    pooling: Literal["mean", "max"] = "mean",
    over: Literal["genes", "context", "padding"] = "genes",
    hidden_layer: Annotated[int | None, arg(metavar="LAYER")] = None,
    key_added: Annotated[str | None, arg(metavar="KEY")] = None,
    checkpoint: Literal["best", "last"] = "best",
    json: bool = False,
) -> None:
    """Write an h5ad file with the embedding of every cell in obsm, and how it was made in uns.

    Parameters
    ----------
    run
        A run directory.
    file
        AnnData with raw counts.
    output
        The new h5ad file.
    pooling
        Over the gene tokens of the cell itself.
    over
        Nicheformer: its context tokens too, or its genes and padding, as the released code pools.
    hidden_layer
        Nicheformer: of which layer, counted from 0, or from the end as -1; the last if not given.
    key_added
        Key in obsm and uns; X_tissue or X_nicheformer if not given.
    checkpoint
        The best by held-out loss, or the last.
    json
        Print what was done as JSON.
    """
    from scfm_jax.console import Bar
    from scfm_jax.downstream.embed import EmbeddingConfig, embed_file
    from scfm_jax.downstream.model import open_model

    cache_compilations()
    model = open_model(run, checkpoint=checkpoint)
    with Bar("embedding", quiet=json) as bar:
        record = embed_file(
            model,
            reading.source(file),
            output,
            config=EmbeddingConfig(pooling, over, hidden_layer),
            key_added=key_added,
            progress=bar.update,
            **tables.read(),
        )
    if json:
        print_json(record)
        return
    print_build(record.pop("build"))
    print(
        f"{record['cells_embedded']:,} cells embedded "
        f"({record['cells_without_counts']:,} without counts are NaN): "
        f'{output}, obsm["{record["key"]}"]'
    )


def import_weights(
    weights: Positional[Annotated[Path, arg(metavar="WEIGHTS")]],
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    /,
    recipe: Annotated[Path | None, arg(metavar="RECIPE.py")] = None,
    vocabulary: Annotated[Path | None, arg(metavar="FILE")] = None,
    gene_names: Annotated[Path | None, arg(metavar="FILE")] = None,
    technology_means: Annotated[tuple[str, ...], arg(metavar="NAME=FILE ...")] = (),
) -> None:
    """Make a run directory from published weights (AIDO.Tissue, Nicheformer).

    Parameters
    ----------
    weights
        A Hugging Face folder (config.json and model.safetensors, or pytorch_model.bin), or Nicheformer's
        Lightning checkpoint.
    run
        The run directory to write. Train on from it with --initial_weights.
    recipe
        What the weights are for; experiments/tissue_3m.py or nicheformer_49m.py if not given. The weights
        decide the sizes.
    vocabulary
        The genes of the weights, in their order (.tsv, .csv, .json, or the var of an .h5ad); those of the
        folder's vocab.json if not given. Without either the run can only be exported.
    gene_names
        Ensembl id and symbol, .csv or .tsv.
    technology_means
        Nicheformer: the .npy file of each technology that cells are to be ranked against.
    """
    from scfm_jax import genes
    from scfm_jax.export.weights import family_of, import_run
    from scfm_jax.training.config import load_recipe

    names = genes.read_gene_names(gene_names) if gene_names else None
    known = genes.Vocabulary.read(vocabulary, gene_names=names) if vocabulary else None
    means: dict[str, Path] = {}
    for entry in technology_means:
        name, _, file = entry.partition("=")
        if not name or "/" in name or not file or name in means:
            raise InputError(
                "import", f"cannot read {entry!r} (technology-means)", "write NAME=FILE, each name once"
            )
        means[name] = Path(file)
    family = family_of(weights)
    default = importlib.import_module(f"experiments.{family.recipe}")
    imported = import_run(
        weights,
        run,
        load_recipe(recipe) if recipe else default.recipe(),
        known,
        gene_names=names,
        technology_means=means,
    )
    print(f"{imported:,} parameters of {family.title} imported: {run}")


def export_weights(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    /,
    format: Literal["published", "lightning", "stablehlo"] = "published",
    licence: str = "unknown",
) -> None:
    """Write a run's weights as the authors' code reads them, or its embedding as a function of its own.

    Parameters
    ----------
    run
        A run directory.
    out
        A new folder (a model card goes with it), or for lightning a new file.
    format
        published: config.json and model.safetensors. lightning: Nicheformer's checkpoint. stablehlo: the
        embedding, serialised by jax.export.
    licence
        An SPDX identifier for the model card.
    """
    if format == "stablehlo":
        from scfm_jax.export.stablehlo import export_embedding

        print(f"{export_embedding(run, out, licence=licence):,} parameters exported: {out}")
        return
    from scfm_jax.export.weights import export_run

    done = export_run(run, out, form="lightning" if format == "lightning" else "folder", licence=licence)
    beside = f", and {done.unused:,} that the authors' class holds and does not use" if done.unused else ""
    print(f"{done.parameters:,} parameters exported{beside}: {out}")


def demo(out: Positional[Annotated[Path | None, arg(metavar="[OUT]")]] = None, /) -> None:
    """Simulate a tissue, pretrain on it, embed and score held-out cells, write a report. Takes minutes.

    Parameters
    ----------
    out
        A new folder; if not given, runs/demo, or the first of runs/demo-2, runs/demo-3, ... that is free.
    """
    from experiments import tissue_demo
    from scfm_jax.downstream.demo import run_demo

    cache_compilations()
    numbered = (Path(f"runs/demo-{number}") for number in itertools.count(2))
    free = (path for path in itertools.chain([Path("runs/demo")], numbered) if not path.exists())
    page = run_demo(out or next(free), tissue_demo.alone(), tissue_demo.recipe())
    print(f"the report: {page}")


_VERBS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    **corpus_verbs.VERBS,
    "train": train,
    **scaling_verbs.VERBS,
    **sweep_verbs.VERBS,
    **scaling_law_verbs.VERBS,
    "embed": embed,
    **downstream_verbs.VERBS,
    "import": import_weights,
    "export": export_weights,
}


# Of the verbs whose other flags override a recipe.
_OWN_FLAGS: dict[Callable[..., Any], tuple[str, ...]] = {
    train: ("--resume", "--no-resume"),
    scaling_verbs.plan: scaling_verbs.OWN_FLAGS,
    sweep_verbs.run: sweep_verbs.OWN_FLAGS,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 where a check found something, 2 for bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.showwarning = _show_warning
    name = next((name for name in _VERBS if words[: len(name.split())] == name.split()), None)
    if name is None:
        return _without_verb(words)
    verb, words = _VERBS[name], words[len(name.split()) :]
    if verb in _OWN_FLAGS:
        words, flags = _split_overrides(words, _OWN_FLAGS[verb])
        verb = functools.partial(verb, overrides=tuple(flags))
    try:
        return (
            tyro.cli(
                verb,
                prog=f"scfm {name}",
                description=(_VERBS[name].__doc__ or "").split("\n\n")[0],
                args=words,
            )
            or 0
        )
    except InputError as error:
        print(f"scfm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scfm: interrupted", file=sys.stderr)
        return 130


def _without_verb(words: Sequence[str]) -> int:
    """Say which verbs there are, or which begin with a word such as corpus, where no whole verb is given."""
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in _VERBS) else ""
    rest = words[1:] if group else words
    if not rest or rest[0] in ("-h", "--help"):
        print(_usage(group))
        return 0
    print(f"scfm: no verb {' '.join(words[:2])!r}; {_usage(group)}", file=sys.stderr)
    return 2


def _usage(group: str = "") -> str:
    begin = f"{group} " if group else ""
    verbs = {name: verb for name, verb in _VERBS.items() if name.startswith(begin)}
    width = max(map(len, verbs))
    lines = [f"  {name:<{width}} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in verbs.items()]
    return "\n".join([f"usage: scfm {begin}VERB ... (scfm {begin}VERB --help says more)", "", *lines])


def _split_overrides(words: list[str], its_own: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags of the verb itself, and those that override the recipe with their values."""
    own, flags, rest = [], [], iter(words)
    for word in rest:
        if not word.startswith("--") or word.partition("=")[0] in (*its_own, "--help"):
            own.append(word)
            continue
        if word.partition("=")[0] in ("--distributed", "--profile"):
            own.extend([word] if "=" in word else [word, *itertools.islice(rest, 1)])
            continue
        flags.append(word)
        if "=" not in word:
            value = next(rest, None)
            flags.extend([] if value is None else [value])
    return own, flags


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    if issubclass(category, DataWarning):
        print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
