"""Nicheformer against PyTorch's own layers: embeddings, post-norm encoder and linear head, as published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from scfm_jax.data.batch import SentenceBatch
from scfm_jax.downstream.embed import EmbeddingConfig, embed_sentences
from scfm_jax.export.nicheformer import from_published, to_published
from scfm_jax.models.functional import abstract
from scfm_jax.models.nicheformer import Nicheformer, NicheformerConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig, corrupted, masked_genes_loss

PAD, LENGTH, ROWS = 1, 48, 3
LENGTHS = np.array([48, 31, 40])


@dataclass(frozen=True)
class Case:
    name: str
    config: NicheformerConfig
    genes: int


CASES = [
    Case("published", NicheformerConfig(attention="plain"), 20_310),
    Case(
        "small",
        NicheformerConfig(layers=2, heads=4, width=32, hidden=48, positions=64, attention="plain"),
        200,
    ),
    Case(
        "one_head",
        NicheformerConfig(layers=3, heads=1, width=24, hidden=100, positions=50, attention="chunked"),
        97,
    ),
]


class Oracle(torch.nn.Module):
    """What the released code is made of, by its names."""

    def __init__(self, config: NicheformerConfig, genes: int) -> None:
        super().__init__()
        tokens = genes + 30
        layer = torch.nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            config.hidden,
            dropout=0.0,
            batch_first=True,
            layer_norm_eps=1e-12,
        )
        self.embeddings = torch.nn.Embedding(tokens + 5, config.width, padding_idx=PAD)
        self.positional_embedding = torch.nn.Embedding(config.positions, config.width)
        self.encoder = torch.nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.classifier_head = torch.nn.Linear(config.width, tokens)

    def forward(self, tokens: torch.Tensor, padding: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        x = self.embeddings(tokens) + self.positional_embedding(torch.arange(tokens.shape[1]))
        states = []
        for layer in self.encoder.layers:
            x = layer(x, src_key_padding_mask=padding)
            states.append(x)
        return states, self.classifier_head(x)


def oracle(case: Case) -> Oracle:
    torch.manual_seed(0)
    model = Oracle(case.config, case.genes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in name:
                parameter.normal_(1, 0.1)
    return model


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def theirs(case: Case) -> Oracle:
    return oracle(case)


def sentences(case: Case) -> SentenceBatch:
    """Three context tokens and genes, each once."""
    random = np.random.default_rng(1)
    tokens = np.full((ROWS, LENGTH), PAD, np.int32)
    for row, length in enumerate(LENGTHS):
        tokens[row, :3] = 5, 8, 3
        tokens[row, 3:length] = 30 + random.choice(case.genes, length - 3, replace=False)
    return SentenceBatch(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
        segments=np.zeros_like(tokens),
        lengths=LENGTHS,
        places=np.full((ROWS, 1), -1, np.int32),
        cut=np.zeros(ROWS, np.int32),
        index=np.arange(ROWS, dtype=np.uint32),
        draw=np.zeros(ROWS, np.uint32),
        weight=np.ones(ROWS, np.float32),
    )


def ours(case: Case, theirs: Oracle) -> tuple[Any, Any]:
    graph, shapes, _ = abstract(lambda rngs: Nicheformer(case.config, case.genes, rngs=rngs))
    tensors = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    parameters = from_published(tensors, case.config, case.genes)
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(jnp.shape, shapes)
    return graph, jax.tree.map(jnp.asarray, parameters)


def relative(mine: Any, stated: Any) -> float:
    return float(np.linalg.norm(np.asarray(mine) - stated) / np.linalg.norm(stated))


def test_every_layer_and_the_logits(case: Case, theirs: Oracle) -> None:
    batch, (graph, parameters) = sentences(case), ours(case, theirs)
    real = np.arange(LENGTH) < LENGTHS[:, None]
    with torch.no_grad():
        states, logits = theirs(torch.as_tensor(batch.tokens).long(), torch.as_tensor(~real))

    @jax.jit
    def run(parameters: Any) -> tuple[Any, Any]:
        model = nnx.merge(graph, parameters)
        final, kept = model.layers(
            model.embed(batch.tokens, batch.positions, batch.segments), LENGTHS, keep=True
        )
        return kept, model.logits(final)

    kept, scores = run(parameters)
    assert len(states) == case.config.layers
    for mine, stated in zip(kept, states, strict=True):
        assert relative(mine[real], stated.numpy()[real]) < 1e-5
    n_tokens = case.genes + 30
    assert relative(np.asarray(scores)[real][:, :n_tokens], logits.numpy()[real]) < 1e-5
    assert np.isneginf(np.asarray(scores)[..., n_tokens:]).all()


def test_loss_and_gradient_of_every_parameter(case: Case, theirs: Oracle) -> None:
    """The masks are ours and given to both."""
    batch, (graph, parameters) = sentences(case), ours(case, theirs)
    config, key, n_tokens = MaskedGenesConfig(), jax.random.key(3), case.genes + 30
    seen, masked = (np.array(part) for part in corrupted(batch, key, config, n_tokens))
    places = np.full((ROWS, int(masked.sum(1).max())), -1, np.int32)
    for row in range(ROWS):
        found = np.flatnonzero(masked[row])
        places[row, : len(found)] = found
    batch = batch.replace(places=places)
    real = np.arange(LENGTH) < LENGTHS[:, None]
    theirs.zero_grad()
    _, logits = theirs(torch.as_tensor(seen).long(), torch.as_tensor(~real))
    truth = torch.as_tensor(batch.tokens).long()[torch.as_tensor(masked)]
    stated = torch.nn.functional.cross_entropy(logits[torch.as_tensor(masked)], truth)
    stated.backward()

    @jax.jit
    @jax.value_and_grad
    def run(parameters: Any) -> Any:
        sums = masked_genes_loss(nnx.merge(graph, parameters), batch, key, config)
        return sums["loss"] / sums["weight"]

    value, gradient = run(parameters)
    assert abs(float(value) / float(stated) - 1) < 1e-5
    mine = to_published(gradient, case.config, case.genes)
    slopes = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    # PyTorch keeps the padding token's row of the table where it is; attention never reads it here either.
    whole = np.sqrt(sum((slope.astype(np.float64) ** 2).sum() for slope in slopes.values()))
    assert set(mine) == set(slopes)
    for name, slope in slopes.items():
        size = max(np.linalg.norm(slope), 1e-6 * whole)
        assert np.linalg.norm(mine[name] - slope) / size < 1e-4, name


@pytest.mark.parametrize("over", ["genes", "context", "padding"])
def test_pooling(case: Case, theirs: Oracle, over: Any) -> None:
    """Over the genes, over the context too, and as released, over padding up to the length."""
    batch, (graph, parameters) = sentences(case), ours(case, theirs)
    real = np.arange(LENGTH) < LENGTHS[:, None]
    with torch.no_grad():
        states, _ = theirs(torch.as_tensor(batch.tokens).long(), torch.as_tensor(~real))
    chosen = {
        "genes": real & (batch.tokens >= 30),
        "context": real,
        "padding": np.arange(LENGTH) >= 3 + 0 * real,
    }[over]
    stated = (states[-1].numpy() * chosen[..., None]).sum(1) / chosen.sum(1, keepdims=True)
    short = batch.replace(
        **{name: getattr(batch, name)[:, :-1] for name in ("tokens", "positions", "segments")}
    )
    short = short if over == "padding" else batch  # rows come shorter than the longest sentence
    lengths = np.minimum(LENGTHS, short.tokens.shape[1])
    if over == "padding":  # the first row has no room to be shorter
        short = jax.tree.map(lambda x: x[1:], short)
        lengths, stated = lengths[1:], stated[1:]
    mine = embed_sentences(
        nnx.merge(graph, parameters), short.replace(lengths=lengths), EmbeddingConfig(over=over), LENGTH
    )
    assert relative(mine, stated) < 1e-5


def test_tensors_there_and_back(case: Case, theirs: Oracle) -> None:
    _, parameters = ours(case, theirs)
    back = to_published(parameters, case.config, case.genes)
    stated = theirs.state_dict()
    assert set(back) == set(stated)
    for name, tensor in stated.items():
        np.testing.assert_array_equal(back[name], tensor.numpy())
