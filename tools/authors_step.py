"""A training step of the authors' models in PyTorch, for `bench_step.py`; wants what `make parity` does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scfm_jax.data.batch import Batch, SentenceBatch, TissueBatch
from scfm_jax.training.config import RunConfig

PARITY = Path(__file__).parents[1] / "tests" / "parity"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Step = tuple[Callable[[], None], Callable[[], None], Callable[[], int]]


def make_step(config: RunConfig, batch: Batch, n_genes: int) -> Step:
    """The step, what waits for its end, and the peak of memory in bytes."""
    if isinstance(batch, SentenceBatch):
        model, loss = _nicheformer(config, batch, n_genes)
    else:
        model, loss = _tissue(config, batch, n_genes)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=DEVICE.type == "cuda")

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    def finish() -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step, finish, lambda: torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def _parity(name: str) -> Any:
    """A module of the parity tests, which build the authors' models."""
    if str(PARITY) not in sys.path:
        sys.path.insert(0, str(PARITY))
    spec = importlib.util.spec_from_file_location(f"parity_{name}", PARITY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _tensor(x: np.ndarray) -> torch.Tensor:
    tensor = torch.as_tensor(np.ascontiguousarray(x)).to(DEVICE)
    return tensor.bfloat16() if tensor.is_floating_point() else tensor.long()


def _nicheformer(
    config: RunConfig, batch: SentenceBatch, n_genes: int
) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """As released: scores of all positions, the loss of the masked ones."""
    parity = _parity("test_nicheformer")
    model = parity.Oracle(config.nicheformer()[0], n_genes).to(DEVICE).bfloat16()
    length = int(batch.lengths[0])
    tokens, masked = _tensor(batch.tokens[:, :length]), torch.zeros(len(batch.lengths), length, dtype=bool)
    row, column = np.nonzero(batch.places >= 0)
    masked[row, batch.places[row, column]] = True
    masked = masked.to(DEVICE)
    truth, positions = tokens[masked], torch.arange(length, device=DEVICE)

    def loss() -> torch.Tensor:
        x = model.embeddings(tokens) + model.positional_embedding(positions)
        return torch.nn.functional.cross_entropy(
            model.classifier_head(model.encoder(x))[masked].float(), truth
        )

    return model, loss


class _Tissue(torch.nn.Module):
    """The authors' encoder, and their layers in the place of the decoder, which they did not release."""

    def __init__(self, config: RunConfig, n_genes: int, parity: Any) -> None:
        super().__init__()
        wide, narrow = config.tissue()[0].encoder, config.tissue()[0].decoder
        sizes = [
            parity.Geometry("", stack.layers, stack.heads, stack.width, stack.feed_forward, genes=n_genes)
            for stack in (wide, narrow)
        ]
        self.encoder = sizes[0].build()
        modeling = parity.authors("cellspatialfoundation.modeling_cellspatialfoundation")
        settings = sizes[1].config()
        settings.norm_cls = modeling.RnaRMSNorm
        self.decoder_embed = torch.nn.Linear(wide.width, narrow.width)
        self.decoder = modeling.CellSpatialFoundationEncoder(settings)
        self.genes = torch.nn.Embedding(n_genes + 3, wide.width)
        self.zero, self.mask = (torch.nn.Parameter(torch.zeros(wide.width)) for _ in range(2))
        self.norm, self.head = torch.nn.LayerNorm(narrow.width), torch.nn.Linear(narrow.width, 1)

    def forward(
        self,
        values: torch.Tensor,
        positions: torch.Tensor,
        source: torch.Tensor,
        masked: torch.Tensor,
        genes: torch.Tensor,
    ) -> torch.Tensor:
        hidden = self.encoder(input_ids=values, position_ids=positions).last_hidden_state
        at = source.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        x = torch.where((source >= 0)[..., None], hidden.gather(1, at), self.zero)
        x = torch.where(masked[..., None], self.mask, x) + self.genes(genes)
        places = torch.stack([genes, torch.zeros_like(genes)], 1)
        x = self.decoder(self.decoder_embed(x), rotary_pos_emb=places).last_hidden_state
        return self.head(self.norm(x))[..., 0]


def _tissue(config: RunConfig, batch: TissueBatch, n_genes: int) -> tuple[torch.nn.Module, Callable[[], Any]]:
    parity = _parity("conftest")
    model = _Tissue(config, n_genes, parity).to(DEVICE).bfloat16()
    rows, places = batch.decoder_genes.shape
    source = np.full((rows, places), -1)
    row, column = np.nonzero((batch.cells == 0) & (batch.slots >= 0))
    source[row, batch.slots[row, column]] = column
    values = _tensor(np.log1p(batch.counts).astype(np.float32))
    positions = _tensor(np.stack([batch.genes, np.maximum(batch.cells, 0)], 1))
    genes, truth = (
        _tensor(np.maximum(batch.decoder_genes, 0)),
        _tensor(batch.decoder_counts.astype(np.float32)),
    )
    masked = torch.as_tensor(np.random.default_rng(0).random((rows, places)) < 0.1).to(DEVICE)
    from_encoder = _tensor(source)

    def loss() -> torch.Tensor:
        error = (
            model(values, positions, from_encoder, masked, genes).float() - truth.clamp(min=0).log1p().float()
        )
        return (error.square() * masked).sum() / masked.sum()

    return model, loss
