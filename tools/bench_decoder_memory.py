"""Memory of the full decoder as its length grows: what XLA plans for forward and backward, no weights made.

    python tools/bench_decoder_memory.py [--lengths 2408 4816 9633 19266] --json OUT.json

The decoder of AIDO.Tissue-3M over one cell, float32: ``plain`` attention holds the scores of all pairs,
``chunked`` those of one chunk of queries. A slope is that of log memory in log length: 1 is linear.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments import tissue_3m
from scfm_jax.models.attention import AttentionName
from scfm_jax.models.functional import abstract
from scfm_jax.models.stack import StackConfig
from scfm_jax.models.transformer import Transformer

GIB = 2**30


@dataclass
class Arguments:
    """Bytes of temporary memory of a training step of the decoder's stack."""

    lengths: tuple[int, ...] = (2_408, 4_816, 9_633, 19_266)
    rows: int = 1
    """Cells of a batch."""
    json: Path | None = None


def temporary_bytes(attention: AttentionName, rows: int, length: int) -> int:
    """Of the loss and gradient of the decoder's stack, as XLA compiles it for this platform."""
    config = tissue_3m.recipe().tissue()[0].decoder

    def build(rngs: nnx.Rngs) -> Transformer:
        return Transformer(config, init_std=0.02, compute=StackConfig(jnp.float32), rngs=rngs)

    graph, shapes, _ = abstract(build)

    def loss(parameters: Any, x: jax.Array, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        stack = nnx.merge(graph, parameters)
        return (stack(x, positions, lengths, implementation=attention) ** 2).mean()

    inputs = (
        jax.ShapeDtypeStruct((rows, length, config.width), jnp.float32),
        jax.ShapeDtypeStruct((rows, length, 2), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    planned = jax.jit(jax.grad(loss)).lower(shapes, *inputs).compile().memory_analysis()
    assert planned is not None
    return int(planned.temp_size_in_bytes)


def main(arguments: Arguments) -> None:
    names = get_args(AttentionName)
    print(f"{'length':>8}" + "".join(f"{name + ', GiB':>16}" for name in names))
    taken: dict[str, list[int]] = {name: [] for name in names}
    for length in arguments.lengths:
        for name in names:
            taken[name].append(temporary_bytes(name, arguments.rows, length))
        print(f"{length:>8,}" + "".join(f"{taken[name][-1] / GIB:16.2f}" for name in names))
    slopes = {
        name: float(np.polyfit(np.log(arguments.lengths), np.log(sizes), 1)[0])
        for name, sizes in taken.items()
    }
    print(f"{'slope':>8}" + "".join(f"{slopes[name]:16.2f}" for name in names))
    if arguments.json:
        result = {"lengths": arguments.lengths, "rows": arguments.rows, "bytes": taken, "slopes": slopes}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
