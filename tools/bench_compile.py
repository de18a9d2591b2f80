"""How compile time grows with depth: the training step of both families with 12 and with 48 layers.

Layers are scanned, so that it should hardly grow. ``python tools/bench_compile.py`` compiles for this
machine; ``--topology v5p:4x4x4`` for a slice of TPUs (needs libtpu).
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import jax
import tyro

from experiments import nicheformer_49m, tissue_60m
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.scaling.estimate import learning_of
from scfm_jax.scaling.topology import Topology
from scfm_jax.scaling.workload import Cells, make_workload
from scfm_jax.training.config import RunConfig
from scfm_jax.training.mesh import make_mesh
from scfm_jax.training.step import make_program

DEPTHS = (12, 48)


def deep(config: RunConfig, layers: int, batch: int) -> RunConfig:
    """A recipe with another depth (the tissue model's encoder) and a small batch."""
    model = config.model
    if isinstance(model, TissueConfig):
        model = replace(model, encoder=replace(model.encoder, layers=layers), remat="dots")
        sample = replace(config.tissue()[1], decoder="panel")
        config = replace(config, data=replace(config.data, sample=sample))
    else:
        model = replace(model, layers=layers)
    data = replace(config.data, batch_size=batch, virtual_shards=1, length_multiple=128)
    return replace(config, model=model, data=data)


def seconds(config: RunConfig, devices: list[jax.Device]) -> float:
    """Of all cores, to trace, lower and compile the step from nothing; whoever shares the machine aside."""
    jax.clear_caches()
    start = time.process_time()
    work = make_workload(config, Cells())
    program = make_program(config, make_mesh(config.mesh, devices), learning_of(config, work.n_genes))
    program.step.lower(program.like, work.batch(type(config.model)), program.given(0)).compile()
    return time.process_time() - start


def main(topology: str = "", repeats: int = 3, out: Path | None = None) -> None:
    """Print a table, and write it as JSON.

    Parameters
    ----------
    topology
        A slice of TPUs to compile for; this machine if not given.
    repeats
        Times each is compiled, in turn; the table has medians.
    out
        A JSON file.
    """
    jax.config.update("jax_platforms", "cpu")
    devices = Topology.parse(topology).devices if topology else jax.devices()[:1]
    rows = []
    for recipe in (tissue_60m.recipe(), nicheformer_49m.recipe()):
        configs = [deep(recipe, layers, batch=len(devices)) for layers in DEPTHS]
        taken = [[seconds(config, devices) for config in configs] for _ in range(repeats)]
        shallow, far = (median(times) for times in zip(*taken, strict=True))
        rows.append({"recipe": recipe.name, "seconds": [shallow, far], "ratio": far / shallow})
        print(
            f"{recipe.name:<18}{DEPTHS[0]} layers {shallow:.1f} s, {DEPTHS[1]} layers {far:.1f} s: "
            f"{far / shallow:.2f} times",
            flush=True,
        )
    if out:
        out.write_text(json.dumps({"topology": topology or "cpu", "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
