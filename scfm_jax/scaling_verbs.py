"""The verb ``scfm plan``, thin."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from scfm_jax.scaling.plan import Plan

# Flags of the verb itself; all others override the recipe.
OWN_FLAGS = ("--topology", "--batch", "--expressed", "--panel", "--vocabulary", "--json", "--no-json")


def plan(
    recipe: Positional[Annotated[Path, arg(metavar="RECIPE.py")]],
    /,
    topology: str,
    batch: int = 0,
    expressed: int = 150,
    panel: int = 377,
    vocabulary: int = 0,
    json: bool = False,
    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = (),
) -> int:
    """Say what a step of a recipe takes on a pod: memory, FLOPs, network, and the share of peak they allow.

    For TPUs the step that `scfm train` runs is compiled for the topology, on any Linux machine (extra: tpu).
    For GPUs all is reckoned from shapes. Any field of the recipe is a flag: --mesh.fsdp 8. Exit status 1
    where it does not fit.

    Parameters
    ----------
    recipe
        A Python file with a function recipe(); see experiments/.
    topology
        v5p:8x8x8, v4:8x8x8, v5e:16x16, v6e:16x16 (chips along each axis of the torus), or h100:32x8 (hosts x
        GPUs; also a100, h200, b200).
    batch
        Samples of a step. If 0 the recipe's, raised where some devices would have none.
    expressed
        Genes of a cell that are not zero (tissue): they are its tokens.
    panel
        Genes that a slide measured, where the recipe decodes the panel (tissue).
    vocabulary
        Genes of the vocabulary. If 0 the published 19,264 (tissue) or 20,310 (Nicheformer).
    json
        Print the plan as JSON.
    """
    import dataclasses

    import jax

    from scfm_jax.console import print_json
    from scfm_jax.errors import InputError
    from scfm_jax.scaling.plan import make_plan
    from scfm_jax.scaling.topology import Topology
    from scfm_jax.scaling.workload import Cells
    from scfm_jax.training.config import load_recipe, override

    if batch < 0:
        raise InputError("--batch", f"{batch} is no number of samples", "give 1 or more")
    # A plan needs no device: where there is a TPU, it is left to those who train on it.
    jax.config.update("jax_platforms", "cpu")
    config = override(load_recipe(recipe), overrides, str(recipe))
    cells = Cells(expressed=expressed, panel=panel, vocabulary=vocabulary)
    made = make_plan(config, Topology.parse(topology), cells, batch=batch)
    if json:
        print_json(dataclasses.asdict(made) | {"fits": made.fits})
    else:
        print("\n".join(_lines(made, recipe, overrides)))
    return 0 if made.fits else 1


def _lines(plan: Plan, recipe: Path, overrides: tuple[str, ...]) -> list[str]:
    """The plan for a reader."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    parts = f" in {plan.microbatches} microbatches" if plan.microbatches > 1 else ""
    how = "compiled for the topology" if plan.compiled else "reckoned from shapes"
    rows = [
        ("recipe", f"{plan.recipe}: {plan.parameters:,} parameters"),
        ("topology", f"{plan.topology}: {plan.chips:,} chips of {_hosts(plan.hosts)}; {how}"),
        ("mesh", mesh),
        ("batch", f"{plan.batch:,} samples{parts}, {plan.lengths[0]:,} and {plan.lengths[1]:,} long"),
        ("kernels", f"attention {plan.attention}, remat {plan.remat}"),
        *(("changed", change) for change in plan.changes),
        ("", ""),
        ("a chip", ""),
        ("  parameters", _gib(plan.parameter_bytes)),
        ("  optimiser", _gib(plan.optimiser_bytes)),
        ("  activations", f"{_gib(plan.activation_bytes)}, with gradients and buffers"),
        (
            "  in all",
            f"{_gib(plan.total_bytes)} of {_gib(plan.memory)}: {plan.total_bytes / plan.memory:.0%}",
        ),
        ("", ""),
        ("a step", f"{plan.flops:.3g} model FLOPs, {plan.tokens:,} tokens"),
    ]
    if plan.fits and plan.memory_seconds is not None and plan.network_seconds is not None:
        rows += [
            *(
                (
                    f"  {each.kind}",
                    f"{each.count:,} over {each.over}: {_megabytes(each.sent)} from a chip, "
                    f"{_milliseconds(each.seconds)}",
                )
                for each in plan.traffic
            ),
            ("  compute", _milliseconds(plan.compute_seconds)),
            ("  memory", _milliseconds(plan.memory_seconds)),
            ("  network", _milliseconds(plan.network_seconds)),
            ("  limit", f"{plan.limit}: at most {plan.share_of_peak:.0%} of peak"),
            ("", ""),
            ("to train", _command(recipe, overrides, plan.flags)),
        ]
    else:
        rows += [("", ""), ("DOES NOT FIT", ""), *(("  try", mend) for mend in plan.mends)]
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{value}".rstrip() for name, value in rows]


def _hosts(number: int) -> str:
    return "one host" if number == 1 else f"{number:,} hosts"


def _gib(number: float) -> str:
    return f"{number / 2**30:,.2f} GiB"


def _megabytes(number: float) -> str:
    return f"{number / 1e6:,.1f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


def _command(recipe: Path, overrides: Sequence[str], flags: Sequence[str]) -> str:
    """What trains as was planned; the corpus is named where the flags name none."""
    named = any(flag.split("=")[0] == "--corpus" for flag in overrides)
    corpus = [] if named else ["--corpus", "CORPUS"]
    command = shlex.join(["scfm", "train", str(recipe), "RUN", *corpus, *overrides])
    return " ".join([command, *flags])


VERBS: dict[str, Callable[..., Any]] = {"plan": plan}
