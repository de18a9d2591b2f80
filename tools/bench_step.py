"""The training step on this machine's accelerator, beside the authors' models in PyTorch: a table, and JSON.

    python tools/bench_step.py                          # every case, each in a process of its own
    python tools/bench_step.py tissue_60m_panel --model.remat none --rows 32
    python tools/bench_step.py --authors                # PyTorch too (needs what `make parity` installs)

Ours is the step that `scfm train` runs (`make_program`): loss, gradient, clipping and optimiser, in bfloat16
with float32 parameters. Theirs are the authors' modules with PyTorch's fused attention and AdamW, weights and
activations in bfloat16, which is faster than the mixed precision that they trained with. Utilisation is model
FLOPs (`models/flops.py`) over the dense bf16 peak, with real and with padded tokens.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from step_batches import Measured, sentence_batch, tissue_batch

from scfm_jax.data.masks import MaskRates
from scfm_jax.models.flops import training_flops
from scfm_jax.training.config import MeshConfig, RunConfig, load_recipe, override
from scfm_jax.training.hardware import accelerator_of
from scfm_jax.training.mesh import batch_sharding, make_mesh
from scfm_jax.training.step import make_program
from scfm_jax.training.task import attention_of, make_learning

ROOT = Path(__file__).parents[1]
TISSUE_GENES, SENTENCE_GENES = 19_264, 20_310


@dataclass(frozen=True)
class Case:
    """A recipe and a batch: rows, and whether the decoder goes over the whole vocabulary."""

    recipe: str
    rows: int
    whole_vocabulary: bool = False


CASES = {
    "tissue_60m_panel": Case("tissue_60m", 32),
    "tissue_60m_vocabulary": Case("tissue_60m", 8, whole_vocabulary=True),
    "nicheformer_49m": Case("nicheformer_49m", 96),
    "tissue_1b_panel": Case("tissue_1b", 8),
}


@dataclass
class Arguments:
    """Measure the training step; more flags change the recipe, as for scfm train."""

    cases: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(CASES)
    rows: int | None = None
    """Samples of a step, in place of each case's own."""
    neighbours: int = 32
    expressed: int = 150
    panel: int = 377
    length: int = 1_500
    steps: int = 10
    """Steps that are timed together."""
    repeats: int = 5
    authors: bool = False
    """Run the authors' models too."""
    side: Literal["", "ours", "authors"] = ""
    """Run one case in this process, and print its figures as JSON."""
    profile: Path | None = None
    """Write a trace of one repeat there."""
    json: Path | None = None


def batch_of(case: Case, config: RunConfig, arguments: Arguments) -> tuple[Measured, int]:
    """A batch and the number of genes."""
    rows = arguments.rows or case.rows
    if case.recipe.startswith("nicheformer"):
        rate = config.nicheformer()[2].rate
        return sentence_batch(
            rows, n_genes=SENTENCE_GENES, length=arguments.length, rate=rate
        ), SENTENCE_GENES
    rates: MaskRates = config.tissue()[2].rates
    measured = tissue_batch(
        rows,
        n_genes=TISSUE_GENES,
        neighbours=arguments.neighbours,
        expressed=arguments.expressed,
        panel=arguments.panel,
        whole_vocabulary=case.whole_vocabulary,
        rates=rates,
    )
    return measured, TISSUE_GENES


def ours(name: str, arguments: Arguments, flags: list[str]) -> dict[str, Any]:
    """Seconds of our step, five times over."""
    case = CASES[name]
    config = override(load_recipe(ROOT / "experiments" / f"{case.recipe}.py"), flags, name)
    measured, n_genes = batch_of(case, config, arguments)
    data = dataclasses.replace(config.data, batch_size=len(measured.batch.weight), virtual_shards=1)
    # One device, whatever pod the recipe is for.
    config = dataclasses.replace(config, data=data, mesh=MeshConfig())
    mesh = make_mesh(config.mesh)
    learning = make_learning(config, n_genes, np.array([1 << 30]), np.zeros(1, np.int64))
    program = make_program(config, mesh, learning)
    batch = jax.device_put(measured.batch, batch_sharding(mesh))
    state, given = program.fresh(), program.given(0)
    began = time.perf_counter()
    step = program.step.lower(state, batch, given).compile()
    compiled = time.perf_counter() - began

    def steps(number: int) -> tuple[float, dict[str, Any]]:
        nonlocal state
        began = time.perf_counter()
        for _ in range(number):
            state, sums = step(state, batch, given)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / number, jax.device_get(sums)

    _, sums = steps(3)
    if float(sums["tokens"]) != measured.real.tokens or not np.isfinite(sums["loss"]):
        raise SystemExit(f"{name}: {sums['tokens']} tokens, loss {sums['loss']}: not the batch that was made")
    seconds = [steps(arguments.steps)[0] for _ in range(arguments.repeats)]
    if arguments.profile:
        with jax.profiler.trace(str(arguments.profile / name)):
            steps(3)
    device = jax.devices()[0]
    return {
        **described(measured, seconds),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.shapes)),
        "attention": attention_of(config, device.platform),
        "remat": config.model.remat,
        "device": device.device_kind,
        "compile_seconds": compiled,
        "peak_gib": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        **utilisation(config, n_genes, measured, seconds),
    }


def theirs(name: str, arguments: Arguments, flags: list[str]) -> dict[str, Any]:
    """Seconds of the authors' step in PyTorch, five times over."""
    from authors_step import make_step

    case = CASES[name]
    config = override(load_recipe(ROOT / "experiments" / f"{case.recipe}.py"), flags, name)
    measured, n_genes = batch_of(case, config, arguments)
    step, finish, peak = make_step(config, measured.batch, n_genes)
    for _ in range(3):
        step()
    seconds = []
    for _ in range(arguments.repeats):
        finish()
        began = time.perf_counter()
        for _ in range(arguments.steps):
            step()
        finish()
        seconds.append((time.perf_counter() - began) / arguments.steps)
    return {
        **described(measured, seconds),
        "attention": "PyTorch's fused",
        "peak_gib": peak() / 2**30,
        **utilisation(config, n_genes, measured, seconds),
    }


def described(measured: Measured, seconds: list[float]) -> dict[str, Any]:
    median = float(np.median(seconds))
    return {
        "rows": len(measured.batch.weight),
        "lengths": measured.batch.static_lengths,
        "real_share": measured.real.tokens / measured.padded.tokens,
        "seconds": seconds,
        "tokens_per_second": measured.real.tokens / median,
    }


def utilisation(config: RunConfig, n_genes: int, measured: Measured, seconds: list[float]) -> dict[str, Any]:
    """Model FLOP/s over real and over padded tokens, and their share of the peak where that is known."""
    accelerator = accelerator_of(jax.devices()[0].device_kind)
    found: dict[str, Any] = {}
    for kind, load in (("real", measured.real), ("padded", measured.padded)):
        speed = training_flops(config.model, n_genes, load) / float(np.median(seconds))
        found[f"{kind}_tflops"] = speed / 1e12
        found[f"{kind}_mfu"] = None if accelerator is None else speed / accelerator.peak_flops
    return found


def shown(name: str, side: str, row: dict[str, Any]) -> str:
    seconds = np.array(row["seconds"]) * 1e3
    mfu = [f"{row[f'{kind}_mfu']:.1%}" if row[f"{kind}_mfu"] else "-" for kind in ("real", "padded")]
    return (
        f"{name:<24}{side:<8}{row['attention']:<18}{row.get('remat', '-'):<8}{row['rows']:>5}"
        f"{np.median(seconds):10.1f} ({seconds.min():.1f}-{seconds.max():.1f})"
        f"{row['tokens_per_second']:14,.0f}{mfu[0]:>8}{mfu[1]:>8}{row['peak_gib']:8.1f}"
    )


def main(arguments: Arguments, flags: list[str]) -> None:
    if arguments.side:
        run = {"ours": ours, "authors": theirs}[arguments.side]
        print("RESULT", json.dumps(run(arguments.cases[0], arguments, flags)))
        return
    result: dict[str, Any] = {}
    print(
        f"{'case':<24}{'side':<8}{'attention':<18}{'remat':<8}{'rows':>5}{'ms a step':>18}"
        f"{'real tokens/s':>20}{'MFU':>8}{'padded':>8}{'GiB':>8}",
        flush=True,
    )
    for name in arguments.cases:
        for side in ("ours", "authors") if arguments.authors and "1b" not in name else ("ours",):
            own = [f"--side={side}", f"--steps={arguments.steps}", f"--repeats={arguments.repeats}"]
            for field in ("rows", "neighbours", "expressed", "panel", "length", "profile"):
                value = getattr(arguments, field)
                own += [] if value is None else [f"--{field}={value}"]
            words = [sys.executable, __file__, name, *own, *(flags if side == "ours" else [])]
            done = subprocess.run(words, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
            if not lines:
                print(f"{name:<24}{side:<8}failed: {done.stderr.strip()[-1500:]}", flush=True)
                continue
            row = result[f"{name} {side}"] = json.loads(lines[-1].removeprefix("RESULT"))
            print(shown(name, side, row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*tyro.cli(Arguments, return_unknown_args=True))
