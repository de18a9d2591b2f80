"""Our encoder against the authors', same weights and batch, on this machine in one run: a table, and JSON.

    make parity && .venv-parity/bin/python tools/bench_parity_speed.py --json OUT.json

Two comparisons, paired, five repeats: forward and backward of the encoder from tokens; and the same from raw
counts, where the authors' code builds dense rows of (k + 1) x 19,266 values and ours reads sparse ones.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from flax import nnx

from scfm_jax.data.batch import TissueBatch
from scfm_jax.export.tissue import from_published, tissue_config
from scfm_jax.models.attention import AttentionName
from scfm_jax.models.functional import abstract
from scfm_jax.models.tissue import DEPTH_TOKENS, TissueModel
from scfm_jax.objectives.column_masking import ColumnMaskingConfig, Visible, encode, visible_tokens

ROOT = Path(__file__).parents[1]


@dataclass
class Arguments:
    """Paired times of our step and the authors'."""

    rows: int = 4
    """Samples of a batch."""
    neighbours: int = 16
    expressed: int = 150
    """Genes of a cell."""
    repeats: int = 5
    attention: AttentionName = "chunked"
    json: Path | None = None


def oracle() -> Any:
    """The parity tests' way to the authors' code."""
    spec = importlib.util.spec_from_file_location("parity_oracle", ROOT / "tests" / "parity" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity_oracle"] = module
    spec.loader.exec_module(module)
    return module


def sparse_counts(arguments: Arguments, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Genes and counts [rows, cells, expressed] of random cells, genes ascending."""
    random = np.random.default_rng(0)
    shape = (arguments.rows, arguments.neighbours + 1, arguments.expressed)
    order = random.random((*shape[:2], n_genes)).argpartition(arguments.expressed, axis=-1)
    genes = np.sort(order[..., : arguments.expressed], axis=-1).astype(np.int32)
    return genes, random.geometric(0.4, shape).astype(np.int32)


def collated(genes: np.ndarray, counts: np.ndarray, n_genes: int) -> TissueBatch:
    """The batch that the loader sends: two depth tokens after the genes of each cell, nothing to decode."""
    rows, cells, expressed = genes.shape
    depth = np.broadcast_to(np.arange(n_genes, n_genes + DEPTH_TOKENS, dtype=np.int32), (rows, cells, 2))
    number = np.broadcast_to(np.arange(cells, dtype=np.int32)[:, None], (rows, cells, expressed + 2))
    flat = np.concatenate([genes, depth], -1).reshape(rows, -1)
    nothing = np.full((rows, 1), -1, np.int32)
    return TissueBatch(
        genes=flat,
        counts=np.concatenate([counts, np.zeros_like(depth)], -1).reshape(rows, -1),
        cells=number.reshape(rows, -1),
        slots=np.full_like(flat, -1),
        totals=counts.sum(-1, dtype=np.int32),
        offsets=np.zeros((rows, cells, 2), np.float32),
        target_sum=np.ones(rows, np.float32),
        decoder_genes=nothing,
        decoder_counts=nothing,
        index=np.zeros(rows, np.uint32),
        draw=np.zeros(rows, np.uint32),
        weight=np.ones(rows, np.float32),
    )


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main(arguments: Arguments) -> None:
    parity = oracle()
    geometry = parity.GEOMETRIES[0]
    n_genes = geometry.genes
    theirs = geometry.build()
    config, _ = tissue_config(geometry.config().to_dict(), 1, "config.json")
    config = replace(config, attention=arguments.attention)
    graph, shapes, _ = abstract(lambda rngs: TissueModel(config, n_genes, rngs=rngs))
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    parameters = {**zeros, **jax.tree.map(jnp.asarray, from_published(tensors, config))}
    raw = sparse_counts(arguments, n_genes)
    batch, objective = collated(*raw, n_genes), ColumnMaskingConfig()

    @jax.jit
    def made(batch: TissueBatch) -> dict[str, jax.Array]:
        return vars(visible_tokens(batch, None, objective, n_genes))

    given = Visible(**made(batch))
    genes, values, cells = (np.asarray(part) for part in (given.genes, given.values, given.cells))

    @jax.jit
    def step(parameters: Any, tokens: dict[str, jax.Array]) -> Any:
        def loss(parameters: Any) -> jax.Array:
            hidden = encode(nnx.merge(graph, parameters), batch, Visible(**tokens), coordinates=False)
            return (hidden**2).mean()

        return jax.value_and_grad(loss)(parameters)

    def ours_from_tokens() -> float:
        return float(jax.block_until_ready(step(parameters, vars(given)))[0])

    def ours_from_counts() -> float:
        return float(jax.block_until_ready(step(parameters, made(collated(*raw, n_genes))))[0])

    def theirs_step(values: torch.Tensor, positions: torch.Tensor) -> float:
        theirs.zero_grad(set_to_none=True)
        loss = theirs(input_ids=values, position_ids=positions).last_hidden_state.square().mean()
        loss.backward()
        return float(loss)

    def theirs_from_tokens() -> float:
        positions = torch.as_tensor(np.stack([genes, cells], 1)).long()
        return theirs_step(torch.as_tensor(values), positions)

    def theirs_from_counts() -> float:
        dense = np.zeros((*raw[0].shape[:2], n_genes), np.int64)
        np.put_along_axis(dense, raw[0], raw[1], axis=-1)
        made = parity.authors_process(dense.reshape(arguments.rows, -1), n_genes)
        return theirs_step(made.values, made.positions.long())

    agreement = abs(ours_from_tokens() / theirs_from_tokens() - 1)
    print(f"{arguments.rows} rows of {genes.shape[1]:,} tokens; losses agree to {agreement:.1e}")
    result: dict[str, Any] = {"tokens": int(genes.size), "agreement": agreement}
    print(f"{'from':<8}{'ours, s':>10}{'theirs, s':>11}{'ours / theirs':>15}{'least':>8}{'most':>8}")
    for name, mine, other in (
        ("tokens", ours_from_tokens, theirs_from_tokens),
        ("counts", ours_from_counts, theirs_from_counts),
    ):
        mine(), other()
        pairs = np.array([(timed(mine), timed(other)) for _ in range(arguments.repeats)])
        ratio = pairs[:, 0] / pairs[:, 1]
        mid = np.median(pairs, axis=0)
        print(
            f"{name:<8}{mid[0]:10.3f}{mid[1]:11.3f}{np.median(ratio):15.2f}{ratio.min():8.2f}{ratio.max():8.2f}"
        )
        result[name] = {"seconds": pairs.tolist(), "ratio": ratio.tolist()}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
