"""The authors' code as the oracle: the wheel `modelgenerator`, installed without its dependencies.

Only three of its modules are imported, from the installed wheel, past its packages' own ``__init__`` files,
which want lightning and peft. ``flash_attn``, which needs a GPU, is stood in for by torch's attention.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers.utils

AUTHORS = "scfm_parity_authors"


def _stand_in_for_flash_attention() -> None:
    def flash_attn_varlen_func(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        query_length: int,
        key_length: int,
        dropout: float,
        *,
        softmax_scale: float,
        causal: bool,
    ) -> torch.Tensor:
        """Rows of equal length, no padding: all that the authors' code asks for."""
        assert query_length == key_length and not causal and dropout == 0
        rows = [x.reshape(-1, query_length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)]
        mixed = torch.nn.functional.scaled_dot_product_attention(*rows, scale=softmax_scale)
        return mixed.transpose(1, 2).reshape(query.shape)

    stand_in, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    stand_in.flash_attn_func = None  # type: ignore[attr-defined]
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    for name in ("index_first_axis", "pad_input", "unpad_input"):
        setattr(padding, name, None)
    sys.modules.update({"flash_attn": stand_in, "flash_attn.bert_padding": padding})
    transformers.utils.is_flash_attn_2_available = lambda: True
    transformers.utils.is_flash_attn_greater_or_equal_2_10 = lambda: True


def _wheel() -> Path:
    spec = importlib.util.find_spec("modelgenerator")
    assert spec is not None and spec.submodule_search_locations, "run these tests with: make parity"
    return Path(spec.submodule_search_locations[0])


@cache
def authors(module: str) -> ModuleType:
    """A module of the wheel's ``huggingface_models`` by its path with dots."""
    _stand_in_for_flash_attention()
    package, _, name = module.rpartition(".")
    inside = f"{AUTHORS}_{package.replace('.', '_')}"
    if inside not in sys.modules:
        parent = ModuleType(inside)
        parent.__path__ = [str(_wheel() / "huggingface_models" / Path(*package.split(".")))]
        sys.modules[inside] = parent
    return importlib.import_module(f"{inside}.{name}")


@cache
def process_input() -> Callable[..., Any]:
    """The authors' ``_process_input``, a function of (self, counts), taken out of the module by its name."""
    names: dict[str, Any] = {"torch": torch, "math": math, "Tensor": torch.Tensor, "Optional": Any}
    wanted = {
        "next_16x": "data/data.py",
        "gather_data": "data/data.py",
        "_process_input": "backbones/backbones.py",
    }
    for name, file in wanted.items():
        found = next(
            node
            for node in ast.walk(ast.parse((_wheel() / file).read_text()))
            if isinstance(node, ast.FunctionDef)
            and node.name == name
            and (name != "_process_input" or "rope2d_use_xy" in ast.unparse(node))
        )
        exec(compile(ast.Module([found], []), name, "exec"), names)
    return names["_process_input"]


def authors_process(counts: np.ndarray, n_genes: int, *, coordinates: bool = False) -> SimpleNamespace:
    """Tokens of rows of counts, [rows, cells x genes], by the authors' function."""
    settings = SimpleNamespace(max_position_embeddings=n_genes, pad_token_id=-2)
    given = SimpleNamespace(config=settings, rope2d_use_xy=coordinates, sep_value=-10_000)
    names = ("dense", "values", "labels", "attention_mask", "positions", "first", "second", "cells")
    return SimpleNamespace(**dict(zip(names, process_input()(given, torch.as_tensor(counts)), strict=True)))


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model to compare."""

    name: str
    layers: int
    heads: int
    width: int
    hidden: int
    bins: int = 100
    norm: str = "RMSNorm"
    bias: bool = True
    alpha: float = 1.0
    genes: int = 400

    def config(self) -> Any:
        module = authors("cellspatialfoundation.configuration_cellspatialfoundation")
        return module.CellSpatialFoundationConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.hidden,
            max_position_embeddings=self.genes,
            bin_num=self.bins,
            bin_alpha=self.alpha,
            normalization_type=self.norm,
            add_linear_bias=self.bias,
            _use_flash_attention_2=True,
        )

    def build(self, seed: int = 0) -> torch.nn.Module:
        """The authors' model with random weights, biases and norms too."""
        module = authors("cellspatialfoundation.modeling_cellspatialfoundation")
        return randomised(module.CellSpatialFoundationModel(self.config()).eval(), seed)


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter away from its initial value, so that none can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(name.endswith("weight") + 0.1 * noise)
            elif parameter.shape[1] == 1:  # of the value embedding: a scalar to bins
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model


GEOMETRIES = [
    Geometry("3m", layers=4, heads=2, width=128, hidden=344, genes=19_264),
    Geometry("60m", layers=12, heads=8, width=512, hidden=1_368, genes=19_264),
    Geometry("three_heads", layers=2, heads=3, width=48, hidden=100, bins=17, alpha=0.7),
    Geometry("layer_norm", layers=3, heads=2, width=32, hidden=88, bins=10, norm="LayerNorm"),
    Geometry("no_bias", layers=2, heads=1, width=64, hidden=64, bins=5, bias=False),
]


@pytest.fixture(params=GEOMETRIES, ids=lambda geometry: geometry.name)
def geometry(request: pytest.FixtureRequest) -> Geometry:
    return request.param
