"""Folders as Hugging Face keeps models: what the authors' class writes comes in, what we write it loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Geometry, authors
from flax import nnx
from safetensors.torch import load_file

from experiments import tissue_3m
from scfm_jax.cli import main
from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.downstream.demo import simulate_corpus
from scfm_jax.downstream.model import open_model
from scfm_jax.export.tissue import tissue_config
from scfm_jax.export.weights import export_run
from scfm_jax.simulate import SimulationConfig
from scfm_jax.training.train import train

GEOMETRY = Geometry("small", layers=2, heads=2, width=32, hidden=88, bins=10, genes=40)


def load_strictly(folder: Path, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The authors' model by a folder's config, with every tensor of `tensors` and no other."""
    settings = authors("cellspatialfoundation.configuration_cellspatialfoundation")
    modeling = authors("cellspatialfoundation.modeling_cellspatialfoundation")
    config = settings.CellSpatialFoundationConfig.from_pretrained(folder)
    model = modeling.CellSpatialFoundationModel(config)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def tokens(n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and positions (gene, cell) of two rows of 16 tokens."""
    random = np.random.default_rng(0)
    genes = np.stack([np.sort(random.choice(n_genes, 16, replace=False)) for _ in range(2)])
    cells = np.broadcast_to(np.repeat([0, 1], 8), genes.shape)
    return random.uniform(0.1, 5, genes.shape).astype(np.float32), np.stack([genes, cells], -1)


def hidden(model: torch.nn.Module, values: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        places = torch.as_tensor(positions.transpose(0, 2, 1).copy())
        return model(input_ids=torch.as_tensor(values), position_ids=places).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_import_then_export_is_identical(tmp_path: Path, dtype: torch.dtype, safe: bool) -> None:
    theirs = GEOMETRY.build().to(dtype)
    theirs.save_pretrained(tmp_path / "published", safe_serialization=safe)
    assert (tmp_path / "published" / ("model.safetensors" if safe else "pytorch_model.bin")).is_file()
    assert main(["import", str(tmp_path / "published"), str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("published", "again")]
    assert configs[0] == configs[1]
    stated, back = theirs.state_dict(), load_file(tmp_path / "again" / "model.safetensors")
    assert set(back) == set(stated)
    for name, tensor in stated.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    given = tokens(GEOMETRY.genes)
    before, after = load_strictly(tmp_path / "published", stated), load_strictly(tmp_path / "again", back)
    assert torch.equal(hidden(after, *given), hidden(before, *given))


def test_the_authors_class_loads_what_we_trained(tmp_path: Path) -> None:
    """A run of ours, at sizes of ours, gives the same hidden states in the authors' class."""
    simulate_corpus(
        tmp_path,
        SimulationConfig(
            n_slides=2,
            cells_per_slide=300,
            n_genes=40,
            n_triples=4,
            technologies=(("simscope", 36), ("simseq", 36)),
        ),
    )
    recipe, sizes = tissue_3m.recipe(), tissue_config(GEOMETRY.config().to_dict(), 1, "")[0]
    config = replace(
        recipe,
        corpus=str(tmp_path / "corpus"),
        model=replace(recipe.model, encoder=sizes.encoder, decoder=sizes.decoder, bins=10, dtype="float32"),
        split=SplitConfig(held_out=("slide1",)),
        data=DataConfig(sample=SampleConfig(neighbours=2), batch_size=4, window=2, rungs=1),
        optimiser=replace(recipe.optimiser, steps=3, initial_rate=1e-2, peak_rate=1e-2, warmup_steps=0),
        evaluate_cells=16,
    )
    assert train(config, tmp_path / "run") == 3
    export_run(tmp_path / "run", tmp_path / "published")
    model = open_model(tmp_path / "run", checkpoint="best")
    values, positions = tokens(len(model.vocabulary))
    ours: Any = nnx.merge(model.graph, model.parameters).encode(
        positions[..., 0], values, positions.astype(np.float32), np.full(2, 16)
    )
    tensors = load_file(tmp_path / "published" / "model.safetensors")
    theirs = hidden(load_strictly(tmp_path / "published", tensors), values, positions).numpy()
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5


def test_parameters_and_views_of_a_pickle_come_in_as_they_are(tmp_path: Path) -> None:
    theirs = GEOMETRY.build()
    theirs.save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "model.safetensors").unlink()
    turned = torch.arange(12.0).reshape(3, 4).T
    state = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers()), "cls.turned": turned}
    torch.save(state, tmp_path / "published" / "pytorch_model.bin")
    assert main(["import", str(tmp_path / "published"), str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    back = load_file(tmp_path / "again" / "model.safetensors")
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": print}, "is not plain weights"),
        ({"state_dict": {"weight": torch.zeros(1)}}, "holds more than tensors by name"),
        (torch.zeros(3), "holds more than tensors by name"),
        ({3: torch.zeros(3)}, "holds more than tensors by name"),
        ({"weight": torch.zeros(3).to_sparse()}, "has a tensor that is no array"),
    ],
    ids=["code", "nested", "a tensor", "a number", "sparse"],
)
def test_a_pickle_of_more_than_weights_is_one_line(
    tmp_path: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    published = tmp_path / "published"
    GEOMETRY.build().save_pretrained(published)
    (published / "model.safetensors").unlink()
    torch.save(content, published / "pytorch_model.bin")
    assert main(["import", str(published), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"pytorch_model.bin: {message}" in said
    assert not (tmp_path / "run").exists()
