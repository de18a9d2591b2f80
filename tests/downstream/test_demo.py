"""The demo, whole, on a tissue and a model too small to learn anything."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import tissue_demo
from scfm_jax.corpus import Corpus
from scfm_jax.downstream.demo import run_demo
from scfm_jax.downstream.model import open_model
from scfm_jax.errors import InputError
from scfm_jax.simulate import SimulationConfig
from scfm_jax.training.config import RunConfig
from scfm_jax.training.metrics import read_metrics

TISSUE = SimulationConfig(
    n_slides=4,
    cells_per_slide=200,
    n_genes=30,
    n_triples=2,
    technologies=(("simscope", 26), ("simseq", 24)),
    depth=60,
)


def small(config: RunConfig) -> RunConfig:
    tiny = replace(config.model.encoder, layers=1, width=16)
    return replace(
        config,
        model=replace(config.model, encoder=tiny, decoder=tiny, bins=8),
        split=replace(config.split, blocks=4),
        data=replace(config.data, window=2, rungs=1, length_multiple=256),
        optimiser=replace(config.optimiser, steps=2, warmup_steps=1),
        evaluate_every=1,
        evaluate_cells=8,
    )


def test_demo_leaves_a_run_with_a_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    page = run_demo(out, small(tissue_demo.alone()), small(tissue_demo.recipe()), TISSUE)
    text = page.read_text()
    assert page.parent == out
    figures = {path.name for path in (out / "figures").glob("*.png")}
    assert len(figures) == 3 and text.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=.(?!data:)", text)  # one page that holds all it shows
    for row in (
        "embedding",
        "own expression",
        "own + mean of 8 neighbours",
        "weighted gene mean",
        "the model",
    ):
        assert f"<td>{row}</td>" in text
    for folder, neighbours in ((out / "alone", 0), (out, 8)):
        assert open_model(folder).config.data.sample.neighbours == neighbours
        steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
        assert steps == [1, 2]
    assert json.loads((out / "config.json").read_text())["config"]["initial_weights"] == str(out / "alone")
    slides = Corpus.open(out / "corpus").slides
    assert [slide.technology for slide in slides] == ["simscope", "simseq"] * 2
    with pytest.raises(InputError, match="exists already"):
        run_demo(out, small(tissue_demo.alone()), small(tissue_demo.recipe()), TISSUE)
