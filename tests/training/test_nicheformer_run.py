"""Nicheformer trained, resumed and opened: what a family of its own must do in the same loop."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from flax import nnx

from scfm_jax.corpus import Corpus, Source
from scfm_jax.downstream.embed import EmbeddingConfig, embed_cells, embed_file
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.errors import DataWarning, InputError
from scfm_jax.training.config import RunConfig, override
from scfm_jax.training.metrics import CLOCKED, read_metrics
from scfm_jax.training.run import read_run
from scfm_jax.training.train import train


@pytest.fixture(scope="module")
def model(run_with_niche: Path) -> TrainedModel:
    return open_model(run_with_niche)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in CLOCKED} for row in rows]


def test_its_rows_and_config(run_with_niche: Path, ranks: RunConfig) -> None:
    held_out = [row for row in rows_of(run_with_niche) if "held_out_loss" in row]
    assert [row["step"] for row in held_out] == [2, 4, 6]
    assert all(np.isfinite(row["held_out_loss"]) for row in held_out)
    assert all(0 <= row["held_out_top1_error"] <= 1 for row in held_out)
    assert held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]
    assert read_run(run_with_niche)[0] == ranks


def test_resumed_it_goes_on_bit_for_bit(ranks: RunConfig, run_with_niche: Path, tmp_path: Path) -> None:
    first = dataclasses.replace(ranks, optimiser=dataclasses.replace(ranks.optimiser, steps=6))
    stopped = dataclasses.replace(first, evaluate_every=2)

    shutil.copytree(run_with_niche, tmp_path / "again")
    for step in (5, 6):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step), ignore_errors=True)
    assert train(stopped, tmp_path / "again", resume=True) == 6
    assert rows_of(tmp_path / "again") == rows_of(run_with_niche)


@pytest.mark.parametrize("over", ["genes", "context"])
@pytest.mark.parametrize("layer", [None, 0])
def test_embeddings_of_a_file(
    model: TrainedModel, corpus_path: Path, tmp_path: Path, over: Any, layer: int | None
) -> None:
    """Ranked against the means that the run was trained with, whatever the file's own are."""
    source = Source(str(corpus_path.parent / "slide1.h5ad"), "human", "simseq", um_per_unit=1.0)
    config = EmbeddingConfig("mean", over, layer)
    embed_file(model, source, tmp_path / "out.h5ad", config=config)
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    corpus = Corpus.open(corpus_path)
    cells = np.flatnonzero(corpus.slide_of(np.arange(corpus.n_cells)) == 1)
    direct = embed_cells(model, corpus, cells, config=config)
    np.testing.assert_allclose(
        out.obsm["X_nicheformer"][corpus.column("source_row", cells)], direct, atol=1e-5
    )
    assert np.unique(direct.round(5), axis=0).shape[0] == len(cells)
    assert out.uns["X_nicheformer"]["over"] == over and out.uns["X_nicheformer"]["dtype"] == "float32"


@pytest.mark.parametrize("over", ["genes", "context", "padding"])
def test_poolings_of_whole_sentences(ranks_off: Path, corpus_path: Path, over: Any) -> None:
    """Cells as long as the longest sentence, which a batch must not outgrow."""
    model, corpus = open_model(ranks_off), Corpus.open(corpus_path)
    _, sample, _ = model.config.nicheformer()
    cut = sample.reader(corpus).read(np.arange(corpus.n_cells)).cut[:, 0]
    cells = np.sort(np.concatenate([np.flatnonzero(cut)[:4], np.flatnonzero(cut == 0)[:20]]))
    assert cut[cells].any()
    read = sample.reader(corpus).read(cells)
    embedded = embed_cells(model, corpus, cells, config=EmbeddingConfig(over=over))
    module = nnx.merge(model.graph, model.parameters)
    for row in range(len(cells)):
        batch = read.collate(np.array([row]), sample.length, 1, 1)
        hidden = module.encode(batch.tokens, batch.positions, batch.segments, batch.lengths)[0]
        length, context = int(batch.lengths[0]), len(sample.context)
        if over == "padding":  # positions go on through the padding
            padded = batch.replace(positions=np.arange(sample.length)[None])
            hidden = module.encode(padded.tokens, padded.positions, padded.segments, padded.lengths)[0]
        span = {
            "genes": slice(context, length),
            "context": slice(0, length),
            "padding": slice(context, sample.length),
        }
        np.testing.assert_allclose(embedded[row], hidden[span[over]].mean(0), atol=2e-5)


def test_layers_count_from_the_end_too(run_with_niche: Path, corpus_path: Path) -> None:
    model, corpus = open_model(run_with_niche), Corpus.open(corpus_path)
    first, last, second, plain = (
        embed_cells(model, corpus, np.arange(5), config=EmbeddingConfig(layer=layer))
        for layer in (-2, -1, 0, None)
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(last, plain)


def test_a_resumed_run_keeps_its_means(ranks: RunConfig, run_with_niche: Path, tmp_path: Path) -> None:
    shutil.copytree(run_with_niche, tmp_path / "run")
    means = tmp_path / "run" / "technology_means" / "simseq.npy"
    np.save(means, np.load(means) + 1)
    with pytest.raises(InputError, match="was started with other technology means"):
        train(ranks, tmp_path / "run", resume=True)


def test_weights_of_other_sentences_are_a_warning(
    ranks: RunConfig, run_with_niche: Path, tmp_path: Path
) -> None:
    other = override(
        ranks,
        [
            "--initial_weights",
            str(run_with_niche),
            "--data.sample.means",
            "published",
            "--optimiser.steps",
            "1",
        ],
        "flags",
    )
    with pytest.warns(DataWarning, match=r"was trained with data.sample.means exact"):
        train(other, tmp_path / "run")


def test_the_means_of_the_run_are_the_corpus_s(run_with_niche: Path, corpus_path: Path) -> None:
    corpus = Corpus.open(corpus_path)
    for technology in ("simscope", "simseq"):
        stored = np.load(run_with_niche / "technology_means" / f"{technology}.npy")
        np.testing.assert_array_equal(stored, corpus.technology_means(technology))


def test_what_does_not_go_together_is_an_error(
    ranks: RunConfig, config: RunConfig, model: TrainedModel, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="NicheformerConfig does not go with SampleConfig"):
        dataclasses.replace(ranks, data=config.data)
    with pytest.raises(InputError, match=r"sentences of 20 tokens, model.positions is 8"):
        train(override(ranks, ["--model.positions", "8"], "flags"), tmp_path / "short")
    with pytest.raises(InputError, match=r"model.niche is on, data.sample reads no niche"):
        train(override(ranks, ["--data.sample.niche_neighbours", "0"], "flags"), tmp_path / "on")
    with pytest.raises(InputError, match=r"model.niche is off"):
        train(override(ranks, ["--model.niche", "false"], "flags"), tmp_path / "off")
    with pytest.raises(InputError, match=r"the assay 'simseq' has no token"):
        train(override(ranks, ["--data.sample.extra_assays", "simscope"], "flags"), tmp_path / "assay")
    assert not list(tmp_path.iterdir())
    corpus = Corpus.open(ranks.corpus)
    with pytest.raises(InputError, match="has no layer 2"):
        embed_cells(model, corpus, np.arange(3), config=EmbeddingConfig(layer=2))
    with pytest.raises(InputError, match="reads niches"):
        embed_cells(model, corpus, np.arange(3), config=EmbeddingConfig(over="padding"))
    with pytest.raises(InputError, match="pools the last layer over genes alone"):
        embed_cells(open_model(finished), corpus, np.arange(3), config=EmbeddingConfig(over="context"))


def test_a_config_of_either_family_is_read_back(ranks: RunConfig, config: RunConfig) -> None:
    from scfm_jax.training.config import from_dict

    for whole in (ranks, config):
        plain = json.loads(json.dumps(dataclasses.asdict(whole)))
        assert from_dict(RunConfig, plain, "test") == whole
    with pytest.raises(InputError, match=r"has no field 'model.laters'; did you mean 'layers'"):
        override(ranks, ["--model.laters", "3"], "flags")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("data.sample.niche_length", "-1", "data.sample: niche_length is -1, not a number from 1"),
        ("data.sample.niche_radius", "-5", "niche_radius is -5"),
        ("data.sample.mean_files", "foo", "mean_files cannot be read: 'foo'"),
        ("data.sample.extra_assays", "merfish", "'merfish' has a token already"),
        ("data.sample.extra_assays", "a,a", "'a' has a token already"),
        ("data.sample.context", "species,species", "context names a field twice"),
        ("objective.rate", "0", "objective: rate is 0"),
        ("objective.rate", "2", "objective: rate is 2"),
        ("objective.random_share", "0.9", "are no shares of 1"),
        ("model.heads", "0", "model: heads is 0"),
        ("model.layers", "0", "model: layers is 0"),
        ("optimiser.steps", "-1", "optimiser: steps is -1"),
        ("optimiser.accumulation", "0", "optimiser: accumulation is 0"),
        ("optimiser.warmup_steps", "-1", "optimiser: warmup_steps is -1"),
        ("optimiser.peak_rate", "-1", "optimiser: peak_rate is -1"),
        ("data.batch_size", "0", "data: batch_size is 0"),
        ("data.window", "0", "data: window is 0"),
        ("data.rungs", "0", "data: rungs is 0"),
        ("log_every", "0", "log_every is 0"),
    ],
)
def test_numbers_out_of_range(ranks: RunConfig, flag: str, value: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        override(ranks, [f"--{flag}", value], "flags")
