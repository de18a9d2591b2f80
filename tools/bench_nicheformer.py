"""Nicheformer's speed and memory: a table each, and JSON.

    python tools/bench_nicheformer.py tokens CORPUS
    python tools/bench_nicheformer.py memory
    make parity && .venv-parity/bin/python tools/bench_nicheformer.py step

``tokens``: cells a second that one core turns from a corpus into masked sentences, by file. ``memory``: what
XLA plans for the loss and its gradient of the published model, less what the encoder alone takes, as masked
places grow. ``step``: forward and backward against plain PyTorch, same weights and batch; PyTorch's head sees
all positions, as the released code has it, or the masked ones alone.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from scfm_jax.corpus import Corpus
from scfm_jax.data.batch import SentenceBatch
from scfm_jax.data.ranks import RankConfig
from scfm_jax.models.attention import AttentionName
from scfm_jax.models.functional import Parameters, abstract
from scfm_jax.models.nicheformer import Nicheformer, NicheformerConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig, corrupted, masked_gene_scores

ROOT = Path(__file__).parents[1]
N_GENES, MIB = 20_310, 2**20


@dataclass
class Arguments:
    """Measure tokenising, memory or the step."""

    what: Annotated[Literal["tokens", "memory", "step"], tyro.conf.Positional]
    corpus: Annotated[Path | None, tyro.conf.Positional] = None
    rows: int = 2
    """Sentences of a batch (memory, step)."""
    length: int = 1_500
    """Tokens of a sentence (memory, step)."""
    places: tuple[int, ...] = (32, 64, 128, 256, 512, 1_024)
    """Masked places of a sentence (memory)."""
    attention: AttentionName = "chunked"
    repeats: int = 5
    json: Path | None = None


def tokens(arguments: Arguments) -> dict[str, Any]:
    """Cells a second of processor time, median of repeats; each file's cells in random order."""
    if arguments.corpus is None:
        raise SystemExit("tokens needs a corpus")
    corpus = Corpus.open(arguments.corpus)
    reader = RankConfig(context=("species", "modality")).reader(corpus)
    expressed, result = corpus.column("n_genes"), {}
    mask = MaskedGenesConfig().rates
    print(f"{'file':<48}{'genes a cell':>14}{'cells / s':>12}{'least':>10}{'most':>10}")
    for source in sorted({slide.source for slide in corpus.slides}):
        slides = [slide for slide in corpus.slides if slide.source == source]
        cells = np.concatenate([np.arange(s.start, s.start + s.n_cells) for s in slides])
        cells = np.random.default_rng(0).permutation(cells)[:4_096]
        reader.read(cells[:64])
        speeds = []
        for repeat in range(arguments.repeats):
            started = time.process_time()
            reader.read(cells, draw=repeat, seed=0, rates=mask)
            speeds.append(len(cells) / (time.process_time() - started))
        mean = float(expressed[cells].mean())
        print(f"{source:<48}{mean:14.0f}{np.median(speeds):12,.0f}{min(speeds):10,.0f}{max(speeds):10,.0f}")
        result[source] = {"genes": mean, "cells_per_second": speeds}
    return result


def memory(arguments: Arguments) -> dict[str, Any]:
    """Planned temporary bytes of the loss, by masked places; a slope of 1 is linear."""
    config = NicheformerConfig(attention=arguments.attention, remat="full")
    graph, shapes, _ = abstract(lambda rngs: Nicheformer(config, N_GENES, rngs=rngs))
    n_tokens = N_GENES + 30

    def planned(places: int) -> int:
        """Of the head alone: hidden states in, gradient of them and of the head out."""

        def loss(parameters: Parameters, hidden: jax.Array, where: jax.Array, truth: jax.Array) -> jax.Array:
            model = nnx.merge(graph, parameters)
            scores = jax.nn.log_softmax(model.logits(jnp.take_along_axis(hidden, where[..., None], axis=1)))
            return -jnp.take_along_axis(scores, truth[..., None], axis=-1).sum()

        chosen = jax.ShapeDtypeStruct((arguments.rows, places), jnp.int32)
        hidden = jax.ShapeDtypeStruct((arguments.rows, arguments.length, config.width), jnp.float32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(shapes, hidden, chosen, chosen).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return int(analysis.temp_size_in_bytes)

    result = {places: planned(places) for places in arguments.places}
    print(f"{'masked places':>14}{'planned, MiB':>14}{'logits, MiB':>13}")
    for places, size in result.items():
        logits = 4 * arguments.rows * places * n_tokens
        print(f"{places:>14,}{size / MIB:14.0f}{logits / MIB:13.0f}")
    everywhere = 4 * arguments.rows * arguments.length * n_tokens
    print(f"logits of all {arguments.length:,} positions: {everywhere / MIB:,.0f} MiB")
    slope = float(np.polyfit(np.log(list(result)), np.log(list(result.values())), 1)[0])
    print(f"slope of log memory in log places: {slope:.2f}")
    return {"bytes": result, "slope": slope, "logits_of_all_positions": everywhere}


def step(arguments: Arguments) -> dict[str, Any]:
    """Paired times of loss and gradient, float32."""
    import torch

    path = ROOT / "tests" / "parity" / "test_nicheformer.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("nicheformer_oracle", path)
    assert spec is not None and spec.loader is not None
    parity = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = parity
    spec.loader.exec_module(parity)
    case = parity.Case("published", NicheformerConfig(attention=arguments.attention), N_GENES)
    theirs = parity.oracle(case)
    graph, parameters = parity.ours(case, theirs)
    batch, objective, key = sentences(arguments), MaskedGenesConfig(), jax.random.key(0)
    seen, masked = (np.array(part) for part in corrupted(batch, key, objective, N_GENES + 30))
    places = np.full((arguments.rows, int(masked.sum(1).max())), -1, np.int32)
    for row, found in enumerate(map(np.flatnonzero, masked)):
        places[row, : len(found)] = found
    batch = replace(batch, places=places)

    @jax.jit
    @jax.value_and_grad
    def gradient(parameters: Parameters) -> jax.Array:
        scores = masked_gene_scores(nnx.merge(graph, parameters), batch, key, objective)
        return (scores.entry * scores.surprise).sum() / scores.entry.sum()

    def ours() -> float:
        return float(jax.block_until_ready(gradient(parameters))[0])

    sentence, hidden = torch.as_tensor(seen).long(), torch.as_tensor(masked)
    truth = torch.as_tensor(batch.tokens).long()

    def torch_step(everywhere: bool) -> float:
        theirs.zero_grad(set_to_none=True)
        x = theirs.embeddings(sentence) + theirs.positional_embedding(torch.arange(arguments.length))
        x = theirs.encoder(x)
        logits = theirs.classifier_head(x)[hidden] if everywhere else theirs.classifier_head(x[hidden])
        loss = torch.nn.functional.cross_entropy(logits, truth[hidden])
        loss.backward()
        return float(loss.detach())

    others: dict[str, Callable[[], float]] = {
        "head at all positions (as released)": lambda: torch_step(True),
        "head at masked positions": lambda: torch_step(False),
    }
    agreement = max(abs(ours() / other() - 1) for other in others.values())
    print(f"{arguments.rows} rows of {arguments.length:,} tokens; losses agree to {agreement:.1e}")
    print(f"{'PyTorch':<38}{'ours, s':>10}{'theirs, s':>11}{'ours / theirs':>15}{'least':>8}{'most':>8}")
    result: dict[str, Any] = {"agreement": agreement}
    for name, other in others.items():
        pairs = np.array([(timed(ours), timed(other)) for _ in range(arguments.repeats)])
        ratio, mid = pairs[:, 0] / pairs[:, 1], np.median(pairs, axis=0)
        print(
            f"{name:<38}{mid[0]:10.2f}{mid[1]:11.2f}{np.median(ratio):15.2f}{ratio.min():8.2f}{ratio.max():8.2f}"
        )
        result[name] = {"seconds": pairs.tolist(), "ratio": ratio.tolist()}
    return result


def sentences(arguments: Arguments) -> SentenceBatch:
    """Whole sentences, each gene once."""
    random, shape = np.random.default_rng(0), (arguments.rows, arguments.length)
    tokens = 30 + random.random((arguments.rows, N_GENES)).argsort(1)[:, : arguments.length].astype(np.int32)
    tokens[:, :3] = 5, 8, 4
    number = np.arange(arguments.rows, dtype=np.uint32)
    return SentenceBatch(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(arguments.length, dtype=np.int32), shape),
        segments=np.zeros(shape, np.int32),
        lengths=np.full(arguments.rows, arguments.length, np.int32),
        places=np.full((arguments.rows, 1), -1, np.int32),
        cut=np.zeros((arguments.rows, 2), np.int32),
        index=number,
        draw=np.zeros_like(number),
        weight=np.ones(arguments.rows, np.float32),
    )


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main(arguments: Arguments) -> None:
    result = {"tokens": tokens, "memory": memory, "step": step}[arguments.what](arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
