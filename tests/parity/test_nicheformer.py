"""Nicheformer against PyTorch's own layers: embeddings, post-norm encoder and linear head, as published."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file

from scfm_jax.cli import main
from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.batch import SentenceBatch
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.ranks import RankConfig
from scfm_jax.downstream.demo import simulate_corpus
from scfm_jax.downstream.embed import EmbeddingConfig, embed_sentences
from scfm_jax.downstream.model import open_model
from scfm_jax.export.nicheformer import from_published, to_published
from scfm_jax.export.weights import export_run
from scfm_jax.models.functional import abstract, initialise
from scfm_jax.models.nicheformer import Nicheformer, NicheformerConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig, corrupted, masked_genes_loss
from scfm_jax.simulate import SimulationConfig
from scfm_jax.training.config import OptimiserConfig, RunConfig
from scfm_jax.training.train import train

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
        cut=np.zeros((ROWS, 2), np.int32),
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
    assert abs(float(value) / stated.item() - 1) < 1e-5
    mine = to_published(gradient, case.config, case.genes)
    slopes = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    # PyTorch keeps the padding token's row of the table where it is; attention never reads it here either.
    whole = np.sqrt(sum((slope.astype(np.float64) ** 2).sum() for slope in slopes.values()))
    assert set(mine) == set(slopes)
    for name, slope in slopes.items():
        size = max(np.linalg.norm(slope), 1e-6 * whole)
        assert np.linalg.norm(mine[name] - slope) / size < 1e-4, name


def test_initial_weights_spread_as_torch_s() -> None:
    """As the release: Xavier-normal for Linear, PyTorch's own for the joint projection of inputs."""
    config = NicheformerConfig(layers=2, heads=4, width=96, hidden=160, positions=64)
    theirs = Oracle(config, 300)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_normal_(module.weight)
            torch.nn.init.zeros_(module.bias)
    mine = initialise(lambda rngs: Nicheformer(config, 300, rngs=rngs), jax.random.key(0))
    # PyTorch copies one layer: take its first; all of ours are drawn apart.
    for name, tensor in to_published(mine, config, 300).items():
        stated = theirs.state_dict()[name].numpy()
        if stated.std() == 0:
            np.testing.assert_array_equal(tensor, stated, err_msg=name)
        else:
            assert abs(tensor.std() / stated.std() - 1) < 0.05, name
    assert not to_published(mine, config, 300)["embeddings.weight"][PAD].any()


def test_whole_sentences_of_the_published_length() -> None:
    """1,500 tokens and a shorter row, 16 heads, attention in chunks."""
    case = Case("whole", NicheformerConfig(layers=2, attention="chunked"), 20_310)
    theirs, lengths = oracle(case), np.array([1_500, 900])
    graph, parameters = ours(case, theirs)
    random = np.random.default_rng(0)
    tokens = 30 + np.stack([random.choice(case.genes, 1_500, replace=False) for _ in lengths])
    real = np.arange(1_500) < lengths[:, None]
    tokens = np.where(real, tokens, PAD)
    positions = np.broadcast_to(np.arange(1_500), tokens.shape)
    with torch.no_grad():
        states, _ = theirs(torch.as_tensor(tokens), torch.as_tensor(~real))
    hidden = nnx.merge(graph, parameters).encode(tokens, positions, np.zeros_like(tokens), lengths)
    assert relative(np.asarray(hidden)[real], states[-1].numpy()[real]) < 1e-5


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


class Prototype(Oracle):
    """With the layer that the released classes copy the encoder's layers from, and never run."""

    def __init__(self, config: NicheformerConfig, genes: int) -> None:
        super().__init__(config, genes)
        self.encoder_layer = torch.nn.TransformerEncoderLayer(
            config.width, config.heads, config.hidden, dropout=0.0, batch_first=True, layer_norm_eps=1e-12
        )


class LightningOracle(Prototype):
    """What the Lightning checkpoint holds, with its heads without a loss."""

    def __init__(self, config: NicheformerConfig, genes: int) -> None:
        super().__init__(config, genes)
        self.pooler_head = torch.nn.Linear(config.width, config.width)
        self.cls_head = torch.nn.Linear(config.width, 164)


class FolderOracle(torch.nn.Module):
    """What the Hugging Face folder holds: the base model inside, the head outside."""

    def __init__(self, config: NicheformerConfig, genes: int) -> None:
        super().__init__()
        self.nicheformer = Prototype(config, genes)
        self.classifier_head = self.nicheformer.classifier_head
        del self.nicheformer.classifier_head


def hyper_parameters(case: Case) -> dict[str, Any]:
    config = case.config
    return {
        "dim_model": config.width,
        "nheads": config.heads,
        "dim_feedforward": config.hidden,
        "nlayers": config.layers,
        "dropout": 0.0,
        "batch_first": True,
        "masking_p": 0.15,
        "n_tokens": case.genes + 30,
        "context_length": config.positions,
        "lr": 7e-4,
        "warmup": 100_000,
        "batch_size": 9,
        "max_epochs": 30_661_140,
        "cls_classes": 164,
        "supervised_task": None,
        "learnable_pe": True,
        "specie": True,
        "assay": True,
        "modality": True,
        "contrastive": False,
    }


def write_checkpoint(path: Path, case: Case, model: torch.nn.Module) -> None:
    """As Lightning writes one, with the state of an optimiser."""
    content = {
        "epoch": 0,
        "global_step": 265_000,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": model.state_dict(),
        "hyper_parameters": hyper_parameters(case),
        "optimizer_states": [torch.optim.AdamW(model.parameters()).state_dict()],
        # The released schedule computes its rates with NumPy.
        "lr_schedulers": [{"_last_lr": [np.float64(7e-4)], "last_epoch": np.int64(265_000)}],
    }
    torch.save(content, path)


def logits_of(model: Any, batch: SentenceBatch) -> np.ndarray:
    """By torch, of any of the oracles."""
    base = getattr(model, "nicheformer", model)
    x = base.embeddings(torch.as_tensor(batch.tokens).long())
    x = x + base.positional_embedding(torch.arange(LENGTH))
    padding = torch.as_tensor(np.arange(LENGTH) >= LENGTHS[:, None])
    for layer in base.encoder.layers:
        x = layer(x, src_key_padding_mask=padding)
    return model.classifier_head(x).detach().numpy()


def test_a_checkpoint_comes_in_and_goes_out_in_both_forms(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = LightningOracle(case.config, case.genes)
    write_checkpoint(tmp_path / "nicheformer.ckpt", case, theirs)
    assert main(["import", str(tmp_path / "nicheformer.ckpt"), str(tmp_path / "run")]) == 0
    # The same form: every tensor and hyperparameter as it came.
    out = tmp_path / "out.ckpt"
    done = export_run(tmp_path / "run", out, form="lightning")
    back = torch.load(out, weights_only=True)
    assert back["hyper_parameters"] == hyper_parameters(case) and back["global_step"] == 265_000
    stated = theirs.state_dict()
    assert set(back["state_dict"]) == set(stated)
    for name, tensor in stated.items():
        assert torch.equal(back["state_dict"][name], tensor), name
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert done.parameters + done.unused == count
    if case.name == "published":
        assert count == 49_302_040
    # The other form: the heads that its class lacks stay behind.
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "folder")]) == 0
    folder = FolderOracle(case.config, case.genes)
    folder.load_state_dict(load_file(tmp_path / "folder" / "model.safetensors"), strict=True)
    batch = sentences(case)
    np.testing.assert_array_equal(logits_of(folder, batch), logits_of(theirs, batch))
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    own = hyper_parameters(case)
    assert {name: config[name] for name in own if name in config} == {
        name: value for name, value in own.items() if name in config
    }
    assert config["model_type"] == "nicheformer"
    # And from the folder back to a checkpoint, with zeros in the heads that nobody uses.
    assert main(["import", str(tmp_path / "folder"), str(tmp_path / "again")]) == 0
    assert main(["export", str(tmp_path / "again"), str(tmp_path / "b.ckpt"), "--format", "lightning"]) == 0
    fresh = LightningOracle(case.config, case.genes)
    fresh.load_state_dict(torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"], strict=True)
    np.testing.assert_array_equal(logits_of(fresh, batch), logits_of(theirs, batch))


def test_a_model_trained_here_is_loaded_strictly(tmp_path: Path) -> None:
    simulate_corpus(
        tmp_path / "simulated",
        SimulationConfig(
            n_slides=2,
            cells_per_slide=80,
            n_genes=30,
            n_triples=2,
            technologies=(("simscope", 25), ("simseq", 25)),
        ),
    )
    corpus = Corpus.open(tmp_path / "simulated" / "corpus")
    assays = tuple(sorted({slide.technology for slide in corpus.slides}))
    case = Case(
        "trained",
        NicheformerConfig(layers=2, heads=2, width=16, hidden=24, positions=LENGTH, attention="plain"),
        len(corpus.vocabulary),
    )
    config = RunConfig(
        name="trained",
        corpus=corpus.path,
        model=case.config,
        split=SplitConfig(held_out=(corpus.slides[-1].name,)),
        data=DataConfig(
            sample=RankConfig(length=LENGTH, extra_assays=assays), batch_size=8, window=2, rungs=1
        ),
        objective=MaskedGenesConfig(),
        optimiser=OptimiserConfig(steps=3, warmup_steps=1),
    )
    assert train(config, tmp_path / "run") == 3
    export_run(tmp_path / "run", tmp_path / "folder")
    export_run(tmp_path / "run", tmp_path / "run.ckpt", form="lightning")
    folder, checkpoint = FolderOracle(case.config, case.genes), LightningOracle(case.config, case.genes)
    folder.load_state_dict(load_file(tmp_path / "folder" / "model.safetensors"), strict=True)
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    checkpoint.load_state_dict(content["state_dict"], strict=True)
    assert content["hyper_parameters"].keys() == hyper_parameters(case).keys()
    model = open_model(tmp_path / "run")
    cells = np.arange(ROWS)
    read = model.config.nicheformer()[1].reader(corpus).read(cells)
    batch = read.collate(cells, LENGTH, 1, ROWS)
    module = nnx.merge(model.graph, model.parameters)
    hidden = module.encode(batch.tokens, batch.positions, batch.segments, batch.lengths)
    mine = np.asarray(module.logits(hidden))[..., : case.genes + 30]
    real = np.arange(LENGTH) < batch.lengths[:, None]
    padding = torch.as_tensor(~real)
    for theirs in (folder, checkpoint):
        base = getattr(theirs, "nicheformer", theirs)
        x = base.embeddings(torch.as_tensor(batch.tokens).long()) + base.positional_embedding.weight
        for layer in base.encoder.layers:
            x = layer(x, src_key_padding_mask=padding)
        assert relative(mine[real], theirs.classifier_head(x).detach().numpy()[real]) < 1e-5


class Bomb:
    """Executes code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["code", "no state", "torn", "a list"])
def test_bad_checkpoints_are_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, case = tmp_path / "nicheformer.ckpt", CASES[1]
    write_checkpoint(path, case, LightningOracle(case.config, case.genes))
    content = torch.load(path, weights_only=False)
    if name == "code":
        torch.save({**content, "callbacks": Bomb(tmp_path / "executed")}, path)
        message = "is not plain weights (it holds getattr, which is no plain value)"
    elif name == "no state":
        torch.save({"hyper_parameters": content["hyper_parameters"]}, path)
        message = "has no state_dict"
    elif name == "torn":
        path.write_bytes(path.read_bytes()[:5_000])
        message = "is not plain weights"
    else:
        torch.save([1, 2], path)
        message = "has no state_dict"
    assert main(["import", str(path), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["nicheformer.ckpt"]
