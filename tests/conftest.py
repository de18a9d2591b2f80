"""One tiny corpus and one finished run, for the tests of training, of the command and of what follows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from scfm_jax.corpus import Source, build_corpus
from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.ranks import RankConfig
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.objectives.column_masking import ColumnMaskingConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig
from scfm_jax.simulate import SimulationConfig, simulate
from scfm_jax.training.config import OptimiserConfig, RunConfig
from scfm_jax.training.train import train

# The command keeps compilations in the user's cache, which the tests neither use nor fill.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

# Every row of tokens and of decoded genes fits into this one length, so that a run compiles two functions.
ONE_LENGTH = 96


@pytest.fixture(scope="module")
def compile_fast() -> Iterator[None]:
    """For models so small that compiling takes longer than running."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def make_corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    def make_corpus(seed: int) -> Path:
        folder = tmp_path_factory.mktemp("tissue")
        slides = simulate(
            SimulationConfig(
                n_slides=2,
                cells_per_slide=160,
                n_genes=24,
                n_triples=2,
                technologies=(("simscope", 22), ("simseq", 22)),
                depth=60,
                seed=seed,
            )
        )
        sources = []
        for number, slide in enumerate(slides):
            path = folder / f"slide{number}.h5ad"
            slide.write_h5ad(path)
            technology = str(slide.obs["technology"].iloc[0])
            sources.append(Source(path=str(path), species="human", technology=technology, um_per_unit=1.0))
        build_corpus(folder / "corpus", sources, n_neighbours=4)
        return folder / "corpus"

    return make_corpus


@pytest.fixture(scope="session")
def corpus_path(make_corpus: Callable[[int], Path]) -> Path:
    return make_corpus(0)


@pytest.fixture(scope="session")
def config(corpus_path: Path) -> RunConfig:
    return RunConfig(
        name="tiny",
        corpus=str(corpus_path),
        model=TissueConfig(
            encoder=TransformerConfig(layers=2, heads=2, width=16),
            decoder=TransformerConfig(layers=1, heads=2, width=16),
            bins=8,
            init_std=0.1,
            value_init="spread",
            attention="plain",
        ),
        split=SplitConfig(held_out=("slide1*",), margin=4),
        data=DataConfig(
            sample=SampleConfig(neighbours=2), batch_size=8, window=2, rungs=1, length_multiple=ONE_LENGTH
        ),
        objective=ColumnMaskingConfig(normalise="visible", target_sum="median", depth_floor=None),
        # Some gradients are zero but for rounding (of key biases that no rotary position turns): with a small
        # epsilon Adam would make whole steps of them.
        optimiser=OptimiserConfig(steps=6, warmup_steps=2, initial_rate=1e-3, peak_rate=1e-2, epsilon=1e-3),
        evaluate_every=2,
        evaluate_cells=12,
        checkpoint_every=1,
        log_every=1,
    )


@pytest.fixture(scope="session")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train(config, folder) == 6
    return folder


@pytest.fixture(scope="session")
def ranks(config: RunConfig) -> RunConfig:
    """Nicheformer with a niche, in the same loop."""
    sample = RankConfig(length=20, extra_assays=("simscope", "simseq"), niche_neighbours=3, niche_length=10)
    return replace(
        config,
        name="ranks",
        model=NicheformerConfig(
            layers=2, heads=2, width=16, hidden=24, positions=20, niche=True, attention="plain"
        ),
        data=replace(config.data, sample=sample),
        objective=MaskedGenesConfig(rate=0.3),
    )


@pytest.fixture(scope="session")
def run_with_niche(ranks: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ranks"
    assert train(ranks, folder) == 6
    return folder


@pytest.fixture(scope="session")
def ranks_off(ranks: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Nicheformer as published: without a niche."""
    model, sample, _ = ranks.nicheformer()
    config = replace(
        ranks,
        model=replace(model, niche=False),
        data=replace(ranks.data, sample=replace(sample, niche_neighbours=0)),
        optimiser=replace(ranks.optimiser, steps=2),
    )
    folder = tmp_path_factory.mktemp("runs") / "ranks_off"
    assert train(config, folder) == 2
    return folder
