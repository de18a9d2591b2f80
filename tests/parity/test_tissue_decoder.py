"""The decoder against the wiring of scFoundation's masked autoencoder around the authors' stacks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import Geometry, authors, randomised
from flax import nnx

from scfm_jax.export.tissue import stack_from_published, stack_to_published
from scfm_jax.models.functional import abstract
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.models.transformer import TransformerConfig

N_GENES, ROWS, EXPRESSED = 30, 3, 16  # 30 genes and 2 depth tokens: a multiple of 16
PLACES = N_GENES + 2
ENCODER = Geometry("encoder", layers=2, heads=2, width=32, hidden=88, genes=N_GENES)
DECODER = Geometry("decoder", layers=1, heads=2, width=16, hidden=48, genes=N_GENES)
CONFIG = TissueConfig(
    encoder=TransformerConfig(layers=2, heads=2, width=32, hidden=88),
    decoder=TransformerConfig(layers=1, heads=2, width=16, hidden=48),
    bins=20,
    attention="plain",
)


class Stack(torch.nn.Module):
    """The authors' encoder behind the call of scFoundation's."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        modeling = authors("cellspatialfoundation.modeling_cellspatialfoundation")
        config = geometry.config()
        config.norm_cls = modeling.RnaRMSNorm
        self.inner = modeling.CellSpatialFoundationEncoder(config)
        self.positions: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        assert not padding_mask.any()
        return self.inner(x, rotary_pos_emb=self.positions).last_hidden_state


def autoencoder() -> torch.nn.Module:
    model = authors("scfoundation.pretrainmodels.mae_autobin").MaeAutobin(
        num_tokens=1,
        max_seq_len=PLACES,
        embed_dim=ENCODER.width,
        decoder_embed_dim=DECODER.width,
        bin_num=20,
        pad_token_id=-2,
        mask_token_id=-1,
    )
    model.encoder, model.decoder = Stack(ENCODER), Stack(DECODER)
    return randomised(model.eval(), 0)


def samples() -> dict[str, np.ndarray]:
    """Centre cells alone: `EXPRESSED` visible genes each, the depth tokens among them, and masked ones."""
    random = np.random.default_rng(0)
    order = np.stack([random.permutation(N_GENES) for _ in range(ROWS)])
    depth = np.tile([N_GENES, N_GENES + 1], (ROWS, 1))
    genes = np.concatenate([np.sort(order[:, : EXPRESSED - 2], axis=1), depth], axis=1)
    masked = np.zeros((ROWS, PLACES), bool)
    np.put_along_axis(masked, order[:, EXPRESSED - 2 : EXPRESSED + 5], True, axis=1)
    values = random.uniform(0.1, 5, genes.shape).astype(np.float32)
    return {"genes": genes, "values": values, "masked": masked}


def run_theirs(model: torch.nn.Module, given: dict[str, np.ndarray]) -> torch.Tensor:
    genes = torch.as_tensor(given["genes"])
    visible = torch.zeros(ROWS, PLACES, dtype=torch.bool)
    visible[torch.arange(ROWS)[:, None], genes] = True
    every = torch.arange(PLACES).repeat(ROWS, 1)
    for stack, places in ((model.encoder, genes), (model.decoder, every)):
        stack.positions = torch.stack([places, torch.zeros_like(places)], 1)
    return model(
        x=torch.as_tensor(given["values"]),
        padding_label=torch.zeros(genes.shape, dtype=torch.bool),
        encoder_position_gene_ids=genes,
        encoder_labels=visible,
        decoder_data=torch.where(torch.as_tensor(given["masked"]), -1.0, 0.0),
        mask_gene_name=False,
        mask_labels=None,
        decoder_position_gene_ids=every,
        decoder_data_padding_labels=torch.zeros(ROWS, PLACES, dtype=torch.bool),
    )


def ours(model: torch.nn.Module) -> tuple[Any, Any]:
    graph, shapes, _ = abstract(lambda rngs: TissueModel(CONFIG, N_GENES, rngs=rngs))
    return graph, named(dict(model.named_parameters()), shapes)


def named(tensors: dict[str, torch.Tensor], shapes: Any) -> Any:
    """scFoundation's parameters by our names."""
    there = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    table = np.zeros(shapes["gene_embedding"]["table"].shape, np.float32)
    table[: PLACES + 1] = there["pos_emb.weight"]

    def inside(stack: str) -> dict[str, np.ndarray]:
        start = f"{stack}.inner."
        return {name.removeprefix(start): x for name, x in there.items() if name.startswith(start)}

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": there[f"{name}.weight"].T, "bias": there[f"{name}.bias"]}

    return {
        "gene_embedding": {"table": table},
        "value_embedding": {
            "scale": there["token_emb.mlp.weight"].T,
            "shift": there["token_emb.mlp.bias"],
            "mix": there["token_emb.mlp2.weight"].T,
            "mix_bias": there["token_emb.mlp2.bias"],
            "table": there["token_emb.emb.weight"],
            "mask": there["token_emb.emb_mask.weight"][0],
            "pad": there["token_emb.emb_pad.weight"][0],
        },
        "encoder": stack_from_published(inside("encoder"), CONFIG.encoder),
        "decoder_embed": linear("decoder_embed"),
        "decoder": stack_from_published(inside("decoder"), CONFIG.decoder),
        "decoder_norm": {"scale": there["norm.weight"], "bias": there["norm.bias"]},
        "head": linear("to_final"),
    }


def decode(model: TissueModel, given: dict[str, np.ndarray], places: np.ndarray) -> jax.Array:
    """Encode the visible tokens, decode the genes in `places` [b, p]."""
    zeros = np.zeros_like(given["genes"])
    positions = np.stack([given["genes"], zeros], -1).astype(np.float32)
    hidden = model.encode(given["genes"], given["values"], positions, np.full(ROWS, EXPRESSED))
    slots = np.full(given["genes"].shape, -1)
    for row in range(ROWS):
        place_of = {gene: place for place, gene in enumerate(places[row].tolist())}
        slots[row] = [place_of.get(gene, -1) for gene in given["genes"][row].tolist()]
    return model.decode(
        hidden,
        jnp.asarray(slots),
        jnp.asarray(places),
        jnp.asarray(np.take_along_axis(given["masked"], places, axis=1)),
        np.stack([places, np.zeros_like(places)], -1).astype(np.float32),
        np.full(ROWS, places.shape[1]),
    )


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    return autoencoder()


def test_forward(theirs: torch.nn.Module) -> None:
    given, (graph, parameters) = samples(), ours(theirs)
    with torch.no_grad():
        stated = run_theirs(theirs, given).numpy()
    mine = decode(nnx.merge(graph, parameters), given, np.tile(np.arange(PLACES), (ROWS, 1)))
    assert np.linalg.norm(mine - stated) / np.linalg.norm(stated) < 1e-5


def test_gradients(theirs: torch.nn.Module) -> None:
    given, (graph, parameters) = samples(), ours(theirs)
    upstream = np.random.default_rng(1).normal(size=(ROWS, PLACES)).astype(np.float32)
    theirs.zero_grad()
    (run_theirs(theirs, given) * torch.as_tensor(upstream)).sum().backward()
    places = np.tile(np.arange(PLACES), (ROWS, 1))
    mine = jax.grad(lambda p: (decode(nnx.merge(graph, p), given, places) * upstream).sum())(
        jax.tree.map(jnp.asarray, parameters)
    )
    slopes = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in theirs.named_parameters()
    }
    stated = named(slopes, abstract(lambda rngs: TissueModel(CONFIG, N_GENES, rngs=rngs))[1])
    whole = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(stated)))
    assert jax.tree.structure(mine) == jax.tree.structure(stated)
    for (path, found), leaf in zip(jax.tree.leaves_with_path(mine), jax.tree.leaves(stated), strict=True):
        size = max(np.linalg.norm(leaf), 1e-6 * whole)
        assert np.linalg.norm(found - leaf) / size < 1e-4, jax.tree_util.keystr(path)


def test_a_panel_of_the_whole_vocabulary_is_the_full_decoder(theirs: torch.nn.Module) -> None:
    """The panel decoder is the same function of fewer places: over all, in any order, it is the full one."""
    given, (graph, parameters) = samples(), ours(theirs)
    model = nnx.merge(graph, parameters)
    full = np.asarray(decode(model, given, np.tile(np.arange(PLACES), (ROWS, 1))))
    order = np.random.default_rng(2).permutation(PLACES)
    panel = np.asarray(decode(model, given, np.tile(order, (ROWS, 1))))
    np.testing.assert_allclose(panel, full[:, order], atol=2e-5)


def test_chunked_attention_decodes_the_same(theirs: torch.nn.Module) -> None:
    given, (graph, parameters) = samples(), ours(theirs)
    model = nnx.merge(graph, parameters)
    places = np.tile(np.arange(PLACES), (ROWS, 1))
    plain = np.asarray(decode(model, given, places))
    model.attention = "chunked"
    np.testing.assert_allclose(decode(model, given, places), plain, atol=2e-5)


def test_stack_round_trip(theirs: torch.nn.Module) -> None:
    config = CONFIG.encoder
    tensors = {name: x.detach().numpy() for name, x in theirs.encoder.inner.named_parameters()}
    back = stack_to_published(stack_from_published(tensors, config), config)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
