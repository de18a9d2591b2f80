"""Import and export of published folders: a round trip is identical, bad folders are one line."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import tissue_3m, tissue_60m
from scfm_jax.cli import main
from scfm_jax.errors import InputError
from scfm_jax.export.tissue import published_config, published_shapes
from scfm_jax.export.weights import export_run, import_run
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.config import RunConfig
from scfm_jax.training.train import train

N_GENES = 22


@pytest.fixture(scope="module")
def recipe() -> RunConfig:
    whole = tissue_3m.recipe()
    encoder = TransformerConfig(layers=2, heads=2, width=16, hidden=24)
    model = replace(whole.model, encoder=encoder, decoder=replace(encoder, layers=1), bins=8)
    return replace(whole, model=model)


def write(folder: Path, recipe: RunConfig, dtype: str, prefix: str) -> dict[str, np.ndarray]:
    """A published folder with random weights, `cls.*` tensors and the frequencies as a buffer."""
    random = np.random.default_rng(0)
    kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    tensors = {
        prefix + name: random.normal(size=shape).astype(kind)
        for name, shape in published_shapes(recipe.model, N_GENES).items()
    }
    tensors["cls.predictions.bias"] = random.normal(size=1).astype(kind)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = {**published_config(recipe.model, N_GENES, dtype), "an_unknown_field": 3}
    (folder / "config.json").write_text(json.dumps(content))
    return tensors


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_identical(recipe: RunConfig, tmp_path: Path, dtype: str, prefix: str) -> None:
    tensors = write(tmp_path / "published", recipe, dtype, prefix)
    imported = import_run(tmp_path / "published", tmp_path / "run", recipe)
    assert export_run(tmp_path / "run", tmp_path / "again", licence="mit").parameters == imported
    shapes = published_shapes(recipe.model, N_GENES)
    assert imported == sum(np.prod(s) for name, s in shapes.items() if not name.endswith("inv_freq"))
    back = load_file(tmp_path / "again" / "model.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == tensor.tobytes(), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("published", "again")]
    assert configs[0] == configs[1]
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and f"{N_GENES} genes" in card


def test_what_was_imported_trains_on_and_goes_out(
    recipe: RunConfig, config: RunConfig, corpus_path: Path, tmp_path: Path
) -> None:
    from scfm_jax.corpus import Corpus

    vocabulary = Corpus.open(corpus_path).vocabulary
    whole = replace(
        recipe, model=replace(config.model, encoder=recipe.model.encoder, decoder=recipe.model.decoder)
    )
    shapes = published_shapes(whole.model, len(vocabulary))
    random, folder = np.random.default_rng(1), tmp_path / "published"
    folder.mkdir()
    tensors = {name: 0.1 * random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    content = published_config(whole.model, len(vocabulary), "float32")
    (folder / "config.json").write_text(json.dumps(content))
    import_run(folder, tmp_path / "imported", whole, vocabulary)
    on = replace(
        config,
        model=json_model(tmp_path / "imported"),
        initial_weights=str(tmp_path / "imported"),
        optimiser=replace(config.optimiser, steps=1, peak_rate=0.0, initial_rate=0.0, warmup_steps=0),
    )
    assert train(on, tmp_path / "on") == 1
    export_run(tmp_path / "on", tmp_path / "out")
    back = load_file(tmp_path / "out" / "model.safetensors")
    # A step at rate 0 left the weights as they came; the frequencies are computed, not carried.
    assert set(back) == set(tensors)
    for name in tensors:
        if not name.endswith("inv_freq"):
            np.testing.assert_array_equal(back[name], tensors[name])
    card = (tmp_path / "out" / "README.md").read_text()
    assert Corpus.open(corpus_path).hash in card and "held_out_loss" in card


def json_model(run: Path) -> object:
    from scfm_jax.training.run import read_run

    return read_run(run)[0].model


@pytest.mark.parametrize(
    ("published", "count"), [(tissue_3m, 3_286_524), (tissue_60m, 47_801_468)], ids=["3m", "60m"]
)
def test_parameters_of_a_published_folder(published: ModuleType, count: int) -> None:
    """19,264 genes, feed-forward of 8/3 of the width (ours), frequencies not counted."""
    shapes = published_shapes(published.recipe().model, 19_264)
    assert sum(np.prod(s) for name, s in shapes.items() if not name.endswith("inv_freq")) == count


def damaged(
    change: Callable[[Path, dict[str, np.ndarray], dict[str, object]], None],
) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        content = json.loads((folder / "config.json").read_text())
        change(folder, tensors, content)
        if (folder / "model.safetensors").exists():
            save_file(tensors, folder / "model.safetensors")
        if (folder / "config.json").exists():
            (folder / "config.json").write_text(json.dumps(content))

    return damage


def as_pickle(content: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))

    return damage


QUERY = "encoder.layer.1.attention.self.query.weight"
BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors"),
    "torn config": (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
    "torn weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be read"),
    "another architecture": (
        damaged(lambda folder, tensors, content: content.update(model_type="bert")),
        "the field 'model_type' is 'bert'",
    ),
    "another activation": (
        damaged(lambda folder, tensors, content: content.update(hidden_act="gelu")),
        "the field 'hidden_act' is 'gelu'",
    ),
    "a missing field": (
        damaged(lambda folder, tensors, content: content.__delitem__("hidden_size")),
        "'hidden_size'",
    ),
    "a missing tensor": (damaged(lambda folder, tensors, content: tensors.__delitem__(QUERY)), QUERY),
    "an extra tensor": (
        damaged(lambda folder, tensors, content: tensors.update({"pooler.dense.bias": np.zeros(3)})),
        "not known: pooler.dense.bias",
    ),
    "a wrong shape": (
        damaged(lambda folder, tensors, content: tensors.update({QUERY: np.zeros((16, 8), np.float32)})),
        "another shape: encoder.layer.1.attention.self.query.weight (16, 8), not (16, 16)",
    ),
    "NaN": (
        damaged(
            lambda folder, tensors, content: tensors.update({QUERY: np.full((16, 16), np.nan, np.float32)})
        ),
        "NaN or infinite",
    ),
    "names of two kinds": (
        damaged(lambda folder, tensors, content: tensors.update({f"bert.{QUERY}": tensors[QUERY]})),
        "has names with 'bert.' and without: ",
    ),
    "a prefixed cls": (
        damaged(lambda folder, tensors, content: tensors.update({"bert.cls.x": np.zeros(3, np.float32)})),
        "has names with 'bert.' and without: ",
    ),
    "no weights but integers": (
        damaged(lambda folder, tensors, content: tensors.update({QUERY: np.zeros((16, 16), np.int8)})),
        f"neither float32, bfloat16 nor float16: {QUERY} int8",
    ),
    "float64": (
        damaged(lambda folder, tensors, content: tensors.update({QUERY: np.zeros((16, 16))})),
        f"neither float32, bfloat16 nor float16: {QUERY} float64",
    ),
    **{
        f"{field} {value!r}": (
            damaged(lambda folder, tensors, content, f=field, v=value: content.update({f: v})),
            f"the field {field!r} is ",
        )
        for field, value in (
            ("num_hidden_layers", 2.7),
            ("num_hidden_layers", "2"),
            ("num_attention_heads", 0),
            ("intermediate_size", 0),
            ("hidden_size", True),
            ("layer_norm_eps", -1.0),
            ("layer_norm_eps", float("nan")),
            ("add_linear_bias", "false"),
            ("bin_num", None),
            ("bin_alpha", [1]),
            ("initializer_range", "x"),
            ("normalization_type", "Batch"),
        )
    },
    "heads that do not divide": (
        damaged(lambda folder, tensors, content: content.update(num_attention_heads=3)),
        "width 16 must be a multiple",
    ),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds no object"),
    "a deep file": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "is no JSON"),
    "a pickle": (as_pickle({"weights": object}), "pytorch_model.bin: is "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_is_one_line_and_nothing_is_written(
    recipe: RunConfig, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD[name]
    write(tmp_path / "published", recipe, "float32", "")
    damage(tmp_path / "published")
    before = sorted(tmp_path.iterdir())
    assert main(["import", str(tmp_path / "published"), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("scfm: ") and message in said
    assert sorted(tmp_path.iterdir()) == before


def test_vocabulary_of_another_length_and_existing_outputs(
    recipe: RunConfig, finished: Path, tmp_path: Path
) -> None:
    from scfm_jax.genes import Vocabulary

    write(tmp_path / "published", recipe, "float32", "")
    genes = Vocabulary.read(finished / "vocabulary.json")
    with pytest.raises(InputError, match=rf"is of 22 genes, the vocabulary of {len(genes)}"):
        import_run(tmp_path / "published", tmp_path / "run", recipe, genes)
    with pytest.raises(InputError, match="exists already"):
        import_run(tmp_path / "published", tmp_path / "published", recipe)
    with pytest.raises(InputError, match="exists already"):
        export_run(finished, tmp_path / "published")
    with pytest.raises(InputError, match="no run directory"):
        export_run(tmp_path / "published2", tmp_path / "out")
    import_run(tmp_path / "published", tmp_path / "run", recipe)
    with pytest.raises(InputError, match="import it again with --vocabulary"):
        from scfm_jax.downstream.model import open_model

        open_model(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")


def test_bad_runs_and_outputs(
    recipe: RunConfig, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "published", recipe, "float32", "")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    import_run(tmp_path / "published", tmp_path / "run", recipe)
    shutil.copytree(tmp_path / "run", tmp_path / "torn")
    (tmp_path / "torn" / "published.json").write_text("{")
    shutil.copytree(tmp_path / "run", tmp_path / "lost")
    (tmp_path / "lost" / "published.json").unlink()
    before = sorted(tmp_path.iterdir())
    for words, message in (
        (["export", "published", "out"], "is no run's config"),
        (["export", "torn", "out"], "cannot be read"),
        (["export", "lost", "out"], "does not know its genes"),
        (["export", "run", "file/out"], "cannot be written"),
        (["export", "run", "link"], "exists already"),
        (["export", "run", "x" * 300], "cannot be written"),
        (["import", "published", "file/run"], "cannot be written"),
        (["import", "file", "new"], "is neither a folder nor a .ckpt file"),
        (["import", "nowhere", "new"], "is not there"),
    ):
        verb, *paths = words
        assert main([verb, *(str(tmp_path / path) for path in paths)]) == 2, words
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and message in said, (words, said)
    assert main(["export", str(finished), str(tmp_path / "out"), "--licence", "mit or so"]) == 2
    assert "no licence's identifier" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_weights_keep_their_meaning_in_training(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    """The same tensors with other heads or another epsilon are another function."""
    other = replace(config.model, encoder=replace(config.model.encoder, heads=1, norm_epsilon=0.3))
    changed = replace(config, model=other, initial_weights=str(finished))
    with pytest.raises(
        InputError, match=r"was trained with model.encoder.heads 2, model.encoder.norm_epsilon"
    ):
        train(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()
