"""Nicheformer's Hugging Face folder in and out; the Lightning checkpoint needs torch (tests/parity)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import nicheformer_49m
from scfm_jax.cli import main
from scfm_jax.corpus import Corpus, Source
from scfm_jax.data.ranks import RankConfig
from scfm_jax.downstream.embed import embed_file
from scfm_jax.downstream.model import open_model
from scfm_jax.errors import InputError
from scfm_jax.export.nicheformer import published_shapes
from scfm_jax.export.weights import export_run, import_run
from scfm_jax.genes import Vocabulary
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.training.run import read_run

MODEL = NicheformerConfig(layers=2, heads=2, width=16, hidden=24, positions=40)
CONTENT = {
    "model_type": "nicheformer",
    "dim_model": 16,
    "nheads": 2,
    "dim_feedforward": 24,
    "nlayers": 2,
    "context_length": 40,
    "dropout": 0.0,
    "batch_first": True,
    "assay": False,
    "a_field_of_its_own": [1],
}


def write(folder: Path, genes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """A folder as the authors publish it, with random weights."""
    random = np.random.default_rng(0)
    unused = {"encoder_layer.linear1.bias": (24,), "encoder_layer.norm1.weight": (16,)}
    tensors = {
        (name if name.startswith("classifier_head") else f"nicheformer.{name}"): random.normal(
            size=shape
        ).astype(np.float32)
        for name, shape in (published_shapes(MODEL, len(genes)) | unused).items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONTENT, "n_tokens": len(genes) + 30}))
    vocab = {"[PAD]": 1, "[MASK]": 0, "[SPECIES_human]": 5}
    vocab |= {gene: 30 + index for index, gene in enumerate(genes)}
    (folder / "vocab.json").write_text(json.dumps(dict(sorted(vocab.items()))))
    return tensors


@pytest.fixture
def folder(corpus_path: Path, tmp_path: Path) -> Path:
    write(tmp_path / "published", Corpus.open(corpus_path).vocabulary.ids)
    return tmp_path / "published"


def test_in_and_out_again_is_identical(folder: Path, tmp_path: Path) -> None:
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    config, _ = read_run(tmp_path / "run")
    model, sample, _ = config.nicheformer()
    assert replace(MODEL, attention=model.attention, dtype=model.dtype, remat=model.remat) == model
    assert (sample.length, sample.context, sample.means) == (40, ("species", "modality"), "published")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("published", "again"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    for file in ("config.json", "vocab.json"):
        contents = [json.loads((tmp_path / name / file).read_text()) for name in ("published", "again")]
        assert contents[0] == contents[1]


def test_genes_come_with_the_folder_and_means_with_the_import(
    folder: Path, corpus_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, recipe = Corpus.open(corpus_path), nicheformer_49m.recipe()
    sample = replace(recipe.nicheformer()[1], extra_assays=("simseq",))
    recipe = replace(recipe, data=replace(recipe.data, sample=sample))
    source = Source(str(corpus_path.parent / "slide1.h5ad"), "human", "simseq", um_per_unit=1.0)
    import_run(folder, tmp_path / "bare", recipe)
    assert open_model(tmp_path / "bare").vocabulary.ids == corpus.vocabulary.ids
    with pytest.raises(InputError, match="import it again with --technology-means"):
        embed_file(open_model(tmp_path / "bare"), source, tmp_path / "out.h5ad")
    means = corpus.technology_means("simseq")
    means[corpus.slides[1].panel[:3]] = np.nan, -2.0, np.nan
    np.save(tmp_path / "means.npy", means)
    flag = f"simseq={tmp_path / 'means.npy'}"
    assert main(["import", str(folder), str(tmp_path / "run"), "--technology-means", flag]) == 0
    embedded, model = tmp_path / "embedded.h5ad", open_model(tmp_path / "run")
    said = capsys.readouterr().out
    assert "parameters of Nicheformer imported" in said
    with pytest.warns(UserWarning, match=r"2 have no mean and 1 a negative one"):
        embed_file(model, source, embedded)
    assert np.isfinite(anndata.read_h5ad(embedded).obsm["X_nicheformer"]).all()
    np.save(tmp_path / "other.npy", means[:-1])
    with pytest.raises(InputError, match="give technology means of the vocabulary"):
        import_run(folder, tmp_path / "x", recipe, technology_means={"simseq": tmp_path / "other.npy"})


def test_a_model_of_ours_goes_out_with_what_the_authors_class_expects(
    ranks_off: Path, corpus_path: Path, tmp_path: Path
) -> None:
    done = export_run(ranks_off, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    model = open_model(ranks_off)
    used = published_shapes(model.config.nicheformer()[0], len(model.vocabulary))
    unused = {name for name in tensors if name.startswith("nicheformer.encoder_layer.")}
    assert done.parameters == sum(np.prod(shape) for shape in used.values())
    assert done.unused == sum(tensors[name].size for name in unused) > 0
    assert len(tensors) == len(used) + len(unused)
    assert not any(tensors[name].any() for name in unused)
    vocab = json.loads((tmp_path / "out" / "vocab.json").read_text())
    assert [vocab[gene] for gene in model.vocabulary.ids] == list(range(30, 30 + len(model.vocabulary)))
    assert vocab["[TECH_simseq]"] == 20 and vocab["[MODALITY_spatial]"] == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "masked genes (Nicheformer)" in card and "held_out_loss" in card
    # Extra assays, exact means and the means themselves come back; the recipe is the default one.
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    before, after = (model.config.nicheformer()[1] for model in (model, open_model(tmp_path / "back")))
    assert before.meaning() == after.meaning() and before.length == after.length
    for name in ("simscope", "simseq"):
        means = [np.load(run / "technology_means" / f"{name}.npy") for run in (ranks_off, tmp_path / "back")]
        np.testing.assert_array_equal(*means)
    source = Source(str(corpus_path.parent / "slide1.h5ad"), "human", "simseq", um_per_unit=1.0)
    for run in (ranks_off, tmp_path / "back"):
        embed_file(open_model(run), source, tmp_path / f"{run.name}.h5ad")
    embedded = [
        anndata.read_h5ad(tmp_path / f"{name}.h5ad").obsm["X_nicheformer"]
        for name in (ranks_off.name, "back")
    ]
    np.testing.assert_allclose(*embedded, atol=1e-5)
    export_run(tmp_path / "back", tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors[name])
    assert Vocabulary.read(tmp_path / "back" / "vocabulary.json").hash == model.vocabulary.hash


def test_the_published_count() -> None:
    """20,310 genes; with the unused layer and heads it is the 49,302,040 of the paper's checkpoint."""
    from scfm_jax.export.nicheformer import NICHEFORMER

    recipe = nicheformer_49m.recipe()
    used = sum(np.prod(shape) for shape in NICHEFORMER.shapes(recipe, 20_310).values())
    unused = sum(np.prod(shape) for shape in NICHEFORMER.unused(recipe, "lightning").values())
    assert used == 46_852_468
    assert used + unused == 49_302_040


def changed(file: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        content.update(fields)
        (folder / file).write_text(
            json.dumps({name: value for name, value in content.items() if value is not ...})
        )

    return change


BAD = {
    "no size": (changed("config.json", nheads=...), "lacks the field 'nheads'"),
    "a wrong size": (changed("config.json", nlayers=2.5), "the field 'nlayers' is 2.5"),
    "heads": (changed("config.json", nheads=3), "width 16 must be a multiple of heads (3)"),
    "fixed positions": (changed("config.json", learnable_pe=False), "the field 'learnable_pe' is False"),
    "no gene": (changed("config.json", n_tokens=30), "leaves no gene"),
    "positions": (changed("config.json", context_length=41), "another shape: positional_embedding.weight"),
    "no room": (changed("config.json", context_length=2), "leaves no room for genes"),
    "layers": (changed("config.json", nlayers=3), "lacks the tensors encoder.layers.2."),
    "a flag that is none": (changed("config.json", modality="no"), "the field 'modality' is 'no'"),
    "another reserved token": (
        changed("vocab.json", **{"[SPECIES_human]": 6}),
        "gives [SPECIES_human] the token 6, not 5",
    ),
    "a gene twice": (changed("vocab.json", another=31), "does not name one gene for each"),
    "a gene less": (changed("vocab.json", a_gene="x"), "does not name one gene for each"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = BAD[name]
    damage(folder)
    before = sorted(tmp_path.iterdir())
    assert main(["import", str(folder), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_published_form_cannot_hold(
    run_with_niche: Path, ranks_off: Path, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="reads niches, for which the published form has no tensor"):
        export_run(run_with_niche, tmp_path / "out")
    with pytest.raises(InputError, match=r"is no name of a checkpoint; name it out\.ckpt"):
        export_run(ranks_off, tmp_path / "out", form="lightning")
    with pytest.raises(InputError, match="has no Lightning form"):
        export_run(finished, tmp_path / "out.ckpt", form="lightning")
    assert not list(tmp_path.glob("out*"))


def test_a_vocabulary_that_contradicts_the_folder(
    folder: Path, corpus_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genes = Corpus.open(corpus_path).vocabulary
    order = [1, 0, *range(2, len(genes))]
    turned = Vocabulary(*(tuple(np.array(column)[order].tolist()) for column in genes.to_dict().values()))
    turned.save(tmp_path / "genes.json")
    assert (
        main(["import", str(folder), str(tmp_path / "x"), "--vocabulary", str(tmp_path / "genes.json")]) == 2
    )
    assert "names other genes than the vocabulary given" in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["simseq", "=means.npy", "simseq=", "../x=means.npy"])
def test_bad_means_flags(
    folder: Path, tmp_path: Path, entry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(folder), str(tmp_path / "x"), "--technology-means", entry]) == 2
    assert f"cannot read {entry!r}" in capsys.readouterr().err


def test_a_technology_without_means_names_the_file(
    ranks_off: Path, corpus_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = corpus_path.parent / "slide1.h5ad"
    words = ["embed", str(ranks_off), str(file), "-o", str(tmp_path / "x.h5ad"), "--species", "human"]
    assert main([*words, "--technology", "merfish"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"scfm: {file}: ") and "no technology means of 'merfish'" in said
    assert main([*words, "--technology", "simseq", "--key-added", "spatial"]) == 2
    assert "cannot keep an embedding as obsm['spatial']" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sample_needs_room() -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        RankConfig(length=3)
