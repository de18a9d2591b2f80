"""Fine-tuning on a simulated tissue: every way learns, and stores, merges and opens what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import f1_score, r2_score

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import SplitConfig, split_cells
from scfm_jax.data.technology_means import means_of_slide
from scfm_jax.downstream.choosing import held_out_blocks, neighbour_rows
from scfm_jax.downstream.embed import EmbeddingConfig, embed_cells
from scfm_jax.downstream.finetune import finetune
from scfm_jax.downstream.finetuned import FinetuneConfig, FineTuned, open_finetuned
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.downstream.targets import cell_losses, drawn, loss_targets, score
from scfm_jax.errors import InputError
from scfm_jax.export.weights import export_run
from scfm_jax.models.functional import count_parameters, initialise
from scfm_jax.models.heads import HeadConfig
from scfm_jax.models.lora import LoraConfig
from scfm_jax.training.config import RunConfig
from scfm_jax.training.run import save_technology_means, write_weights
from scfm_jax.training.task import model_builder

pytestmark = pytest.mark.usefixtures("compile_fast")

FAST = FinetuneConfig(epochs=8, patience=8, batch_size=16, base_rate=2e-2, head_rate=2e-2)


@dataclass
class Tissue:
    """The corpus with the type of each cell, and its cells split by blocks."""

    corpus: Corpus
    codes: np.ndarray
    block: np.ndarray
    train: np.ndarray
    test: np.ndarray

    def choosing(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the training cells that are fitted, and that choose the epoch, with seed 0."""
        near = neighbour_rows(self.train, self.corpus.neighbours(self.train, self.corpus.n_neighbours))
        return held_out_blocks(self.block[self.train], near, 0, labels=self.codes[self.train])

    def finetune(self, model: TrainedModel, config: FinetuneConfig, targets: Any = None, **more: Any) -> Any:
        targets = self.codes if targets is None else targets
        cells = self.train
        return finetune(model, self.corpus, cells, targets[cells], self.block[cells], config, **more)


@pytest.fixture(scope="module")
def tissue(corpus_path: Path) -> Tissue:
    corpus = Corpus.open(corpus_path)
    split = split_cells(corpus, SplitConfig(blocks=4, n_folds=4, margin=0))
    types = [
        anndata.read_h5ad(corpus_path.parent / f"slide{number}.h5ad")
        .obs["cell_type"]
        .to_numpy()[corpus.column("source_row", np.arange(slide.start, slide.start + slide.n_cells))]
        for number, slide in enumerate(corpus.slides)
    ]
    codes = np.unique(np.concatenate(types), return_inverse=True)[1]
    return Tissue(corpus, codes, split.block, split.train, split.test)


def write_run(folder: Path, config: RunConfig, corpus: Corpus) -> Path:
    """A run directory of weights from the seed."""
    build = model_builder(config, len(corpus.vocabulary))
    parameters = jax.jit(lambda: initialise(build, jax.random.key(0)))()
    folder.mkdir()
    save_technology_means(
        folder, {slide.technology: means_of_slide(corpus, slide, ()) for slide in corpus.slides}
    )
    write_weights(folder, config, corpus.vocabulary, len(corpus.vocabulary), parameters)
    return folder


@pytest.fixture(scope="module")
def run(config: RunConfig, tissue: Tissue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("base") / "run", config, tissue.corpus)


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return open_model(run)


@pytest.fixture(scope="module")
def tuned(model: TrainedModel, tissue: Tissue) -> Callable[[str], FineTuned]:
    known: dict[str, FineTuned] = {}

    def tuned(way: Any) -> FineTuned:
        if way not in known:
            known[way] = tissue.finetune(model, replace(FAST, way=way))
        return known[way]

    return tuned


@pytest.mark.parametrize("way", ["head", "lora", "full"])
def test_each_way_learns_and_changes_what_it_should(
    way: str, tuned: Callable[[str], FineTuned], model: TrainedModel, run: Path, tissue: Tissue
) -> None:
    result = tuned(way)
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < losses[0] - 0.1
    said = result.predict(tissue.corpus, tissue.test)
    assert said.shape == (len(tissue.test), 6) and said.dtype == np.float32
    np.testing.assert_allclose(said.sum(1), 1, rtol=1e-5)
    truth = tissue.codes[tissue.test]
    # A sixth by chance.
    assert f1_score(truth, said.argmax(1), average="macro") > (0.3 if way == "head" else 0.5)

    assert model.hash == open_model(run).hash
    assert result.merged().keys() == model.parameters.keys()
    changed = {
        name
        for name, part in result.merged().items()
        if any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (part, model.parameters[name]))))
    }
    expected = {
        "head": set(),
        "lora": {"encoder"},
        "full": {"encoder", "gene_embedding", "value_embedding"},
    }
    assert changed == expected[way]


@pytest.mark.parametrize("way", ["head", "lora", "full"])
def test_only_what_is_trained_is_stored_and_optimised(
    way: str, tuned: Callable[[str], FineTuned], model: TrainedModel, run: Path, tmp_path: Path
) -> None:
    result = tuned(way)
    head, adapters = 16 * 6 + 6, 2 * 4 * 8 * (16 + 16)
    encoding = sum(
        count_parameters(model.parameters[name]) for name in ("encoder", "gene_embedding", "value_embedding")
    )
    wanted = head + {"head": 0, "lora": adapters, "full": encoding}[way]
    assert result.trained_parameters == wanted
    # Two moments a number, and one counter a part.
    assert result.optimiser_bytes == 2 * 4 * wanted + 8
    result.save(tmp_path / "tuned", run)
    tensors = load_file(tmp_path / "tuned" / "weights.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == result.stored_bytes == 4 * wanted
    record = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert record["trained_parameters"] == wanted
    assert record["model_parameters"] == count_parameters(model.parameters)
    assert sorted(path.name for path in (tmp_path / "tuned").iterdir()) == [
        "finetune.json",
        "weights.safetensors",
    ]


@pytest.mark.parametrize("way", ["head", "lora", "full"])
def test_what_is_opened_says_the_same(
    way: str, tuned: Callable[[str], FineTuned], run: Path, tissue: Tissue, tmp_path: Path
) -> None:
    result = tuned(way)
    result.save(tmp_path / "tuned", run)
    again = open_finetuned(tmp_path / "tuned")
    assert (again.config, again.kind, again.history) == (result.config, result.kind, result.history)
    np.testing.assert_array_equal(
        again.predict(tissue.corpus, tissue.test), result.predict(tissue.corpus, tissue.test)
    )
    with pytest.raises(InputError, match="cannot be made"):
        result.save(tmp_path / "tuned", run)


def test_another_base_and_damaged_files_are_refused(
    tuned: Callable[[str], FineTuned], model: TrainedModel, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tuned"
    tuned("lora").save(folder, run)
    other = jax.tree.map(lambda leaf: leaf + 1e-3, model.parameters)
    with pytest.raises(InputError, match=r"finetune.json: was trained on other weights"):
        open_finetuned(folder, replace(model, parameters=other))
    with pytest.raises(InputError, match="holds no fine-tuned model"):
        open_finetuned(run)
    for name, content in (("finetune.json", "{"), ("finetune.json", "{}"), ("weights.safetensors", "x")):
        shutil.copytree(folder, tmp_path / "damaged")
        (tmp_path / "damaged" / name).write_text(content)
        with pytest.raises(InputError, match="holds no fine-tuned model"):
            open_finetuned(tmp_path / "damaged")
        shutil.rmtree(tmp_path / "damaged")


def test_a_merged_run_is_the_adapted_model(
    tuned: Callable[[str], FineTuned], model: TrainedModel, tissue: Tissue, tmp_path: Path
) -> None:
    result = tuned("lora")
    result.write_merged_run(tmp_path / "run")
    merged = open_model(tmp_path / "run")
    name = "query"
    factors = result.trained["base"]["encoder"]["blocks"][name]
    a, b = (np.asarray(factors[part], np.float64) for part in "ab")
    kernel = np.asarray(model.parameters["encoder"]["blocks"][name]["kernel"], np.float64)
    stated = kernel + 16 / 8 * np.einsum("lir,lro->lio", a, b)
    assert np.abs(stated - kernel).max() > 1e-2
    np.testing.assert_allclose(merged.parameters["encoder"]["blocks"][name]["kernel"], stated, atol=1e-6)
    # The head reads what the merged run embeds.
    features = embed_cells(merged, tissue.corpus, tissue.test, config=EmbeddingConfig())
    np.testing.assert_array_equal(result.answer(features), result.predict(tissue.corpus, tissue.test))
    exported = export_run(tmp_path / "run", tmp_path / "published")
    assert exported.parameters > 0 and (tmp_path / "published" / "model.safetensors").is_file()


def test_nicheformer_with_another_niche(ranks: RunConfig, tissue: Tissue, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ranks, tissue.corpus)
    config = replace(FAST, epochs=4, neighbours=2, head=HeadConfig("mean_tanh", dropout=0.2))
    result = tissue.finetune(open_model(run), config)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    result.save(tmp_path / "tuned", run)
    result.write_merged_run(tmp_path / "merged")
    merged, said = open_model(tmp_path / "merged"), result.predict(tissue.corpus, tissue.test)
    assert merged.config.data.sample.niche_neighbours == 2
    assert {path.split("=")[0] for path in merged.config.data.sample.mean_files} == {"simscope", "simseq"}
    features = embed_cells(merged, tissue.corpus, tissue.test)
    np.testing.assert_array_equal(result.answer(features), said)
    np.testing.assert_array_equal(
        open_finetuned(tmp_path / "tuned").predict(tissue.corpus, tissue.test), said
    )
    told = "cannot read 0 neighbours, it was made for 3; its sentence has a niche: give 1 or more"
    with pytest.raises(InputError, match=told):
        tissue.finetune(open_model(run), replace(config, neighbours=0))


def test_the_same_seed_gives_the_same(model: TrainedModel, tissue: Tissue) -> None:
    config = replace(FAST, epochs=2, max_train_cells=100)
    first, again, other = (tissue.finetune(model, config, seed=seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first.trained, again.trained)
    assert [row["train_loss"] for row in first.history] == [row["train_loss"] for row in again.history]
    assert first.history[0]["train_loss"] != other.history[0]["train_loss"]


def test_the_loss_is_that_of_every_training_cell_once(model: TrainedModel, tissue: Tissue) -> None:
    """At rate 0 nothing moves: the loss follows from the probabilities, whatever fills the last batch."""
    size = 25
    config = replace(FAST, epochs=1, batch_size=size, base_rate=0.0, head_rate=0.0, balanced=False)
    result = tissue.finetune(model, replace(config, label_smoothing=0.0))
    fit, _ = tissue.choosing()
    assert len(fit) % size
    cells = tissue.train[fit]
    said = result.predict(tissue.corpus, cells)[np.arange(len(cells)), tissue.codes[cells]]
    assert result.history[0]["train_loss"] == pytest.approx(-np.log(said).mean(), rel=1e-4)


def test_the_best_epoch_is_kept_and_can_be_trained_anew_on_all(model: TrainedModel, tissue: Tissue) -> None:
    config = replace(FAST, epochs=12, patience=2)
    result = tissue.finetune(model, config)
    scores = [row["validation_score"] for row in result.history]
    assert result.chosen["validation_score"] == max(scores)
    assert len(scores) - result.chosen["epoch"] == 2 or len(scores) == 12
    codes, cells = tissue.codes[tissue.train], tissue.train
    fit, held_out = tissue.choosing()
    said = result.predict(tissue.corpus, cells[held_out])
    assert score("classes", codes[held_out], said) == pytest.approx(max(scores))
    steps: list[tuple[int, int]] = []
    anew = tissue.finetune(model, replace(config, refit=True), progress=lambda *said: steps.append(said[:2]))
    told = list(dict.fromkeys(done for done, _ in steps))
    assert told[: len(scores)] == list(range(1, len(scores) + 1))
    assert steps[-1][0] == steps[-1][1] == 12 * -(-len(fit) // 16)
    assert [row["validation_score"] for row in anew.history] == scores
    assert np.any(anew.trained["head"]["out"]["kernel"] != result.trained["head"]["out"]["kernel"])


def test_compositions_and_values(model: TrainedModel, tissue: Tissue) -> None:
    config = replace(FAST, way="head", epochs=40, patience=40)
    near = tissue.corpus.neighbours(np.arange(tissue.corpus.n_cells), 4)
    composition = np.eye(6)[tissue.codes[near]].mean(1)
    result = tissue.finetune(model, config, composition, kind="composition")
    said, truth = result.predict(tissue.corpus, tissue.test), composition[tissue.test]
    np.testing.assert_allclose(said.sum(1), 1, rtol=1e-5)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    everywhere = composition[tissue.train].mean(0)
    assert np.abs(said - truth).mean() < np.abs(everywhere - truth).mean()

    depth = 1_000.0 + tissue.corpus.column("total_matched", np.arange(tissue.corpus.n_cells))
    result = tissue.finetune(model, config, depth, kind="value")
    said = result.predict(tissue.corpus, tissue.test)
    assert said.shape == tissue.test.shape and said.dtype == np.float32
    assert r2_score(depth[tissue.test], said) > 0.3


def torch_cross_entropy(logits: np.ndarray, codes: np.ndarray, weight: np.ndarray, smoothing: float) -> float:
    """As PyTorch documents CrossEntropyLoss(weight, label_smoothing), reduction mean, entry by entry."""
    total = count = 0.0
    for row, code in zip(logits, codes):
        log_probability = row - np.log(np.exp(row).sum())
        for c in range(len(row)):
            target = (1 - smoothing) * (c == code) + smoothing / len(row)
            total -= weight[c] * target * log_probability[c]
        count += weight[code]
    return total / count


@pytest.mark.parametrize("balanced", [True, False])
def test_smoothing_and_weights_are_pytorchs(balanced: bool) -> None:
    codes = np.repeat([0, 1, 2, 4], [50, 30, 5, 15])  # no cell of class 3
    logits = np.random.default_rng(0).normal(0, 2, (100, 5))
    weight = np.array([1.0, 1.0, 1.0, 0.0, 1.0])
    if balanced:
        weight = np.array([1 / 50, 1 / 30, 1 / 5, 0, 1 / 15])
        weight /= weight.sum() / 4  # mean 1 over the classes that there are
    goals, of_cell, _ = loss_targets(codes, "classes", 5, label_smoothing=0.1, balanced=balanced)
    np.testing.assert_allclose(of_cell, weight[codes], rtol=1e-6)
    mine = float(cell_losses(logits.astype(np.float32), goals, "classes").sum() / of_cell.sum())
    assert mine == pytest.approx(torch_cross_entropy(logits, codes, weight, 0.1), rel=1e-5)


def test_cells_are_drawn_in_proportion() -> None:
    codes = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [600, 300, 100]))
    rows = drawn(codes, "classes", 100, seed=1)
    assert len(np.unique(rows)) == 100
    assert np.abs(np.bincount(codes[rows]) - [60, 30, 10]).max() <= 1
    assert np.any(rows != drawn(codes, "classes", 100, seed=2))
    values = np.random.default_rng(0).gamma(1.0, size=5_000)
    assert np.median(values[drawn(values, "value", 500, 0)]) == pytest.approx(np.median(values), rel=0.02)
    assert np.array_equal(drawn(codes, "classes", 0, 1), np.arange(1_000))


def test_bad_input_says_what_to_mend(model: TrainedModel, tissue: Tissue) -> None:
    codes = tissue.codes
    for targets, more, message in (
        (codes - 1, {}, "negative codes mean no label"),
        (codes, {"n_classes": 3}, "code 5 is beyond 3 classes"),
        (np.zeros_like(codes), {}, "hold one class"),
        (np.ones((len(codes), 6)), {"kind": "composition"}, "no distribution"),
        (np.full(len(codes), np.nan), {"kind": "value"}, "not finite"),
        (np.ones(len(codes)), {"kind": "value"}, "all values are equal"),
    ):
        with pytest.raises(InputError, match=message):
            tissue.finetune(model, FAST, targets, **more)
    with pytest.raises(InputError, match=r"lora\.targets"):
        tissue.finetune(model, replace(FAST, lora=LoraConfig(targets=("proj",))))
    with pytest.raises(InputError, match="loss of epoch 1 is not finite"):
        tissue.finetune(model, replace(FAST, way="head", head_rate=1e38, epochs=1))
    for settings in ({"label_smoothing": 1.0}, {"validation_share": 0.0}, {"epochs": 0}, {"base_rate": -1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            FinetuneConfig(**settings)
