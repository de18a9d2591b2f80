"""Published weights to a run directory, and back."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from scfm_jax.data.technology_means import read_means
from scfm_jax.errors import InputError
from scfm_jax.export.card import model_card
from scfm_jax.export.family import Family, Form, Tensors
from scfm_jax.export.folder import (
    CHECKPOINT,
    CONFIG,
    OWN,
    VOCAB,
    PublishedWeights,
    check_tensors,
    load_pickle,
    published_family,
    read_published,
    require_torch,
    save_pickle,
    write_checkpoint,
    write_folder,
)
from scfm_jax.export.nicheformer import (
    NICHEFORMER,
    own_settings,
    published_vocab,
    vocabulary_of,
    with_own_settings,
    with_vocab,
)
from scfm_jax.export.tissue import TISSUE
from scfm_jax.genes import Vocabulary
from scfm_jax.models.functional import initialise, parameters_hash
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.training.config import RunConfig
from scfm_jax.training.run import (
    MEANS,
    read_run,
    restore_parameters,
    save_technology_means,
    write_weights,
)
from scfm_jax.training.task import model_builder

FAMILIES: dict[type, Family] = {TissueConfig: TISSUE, NicheformerConfig: NICHEFORMER}
# What a run directory keeps of the weights it came from: all that our parameters do not hold.
_ORIGIN, _VERBATIM, _REST = "published.json", "published.safetensors", "published.ckpt"


def family_of(path: Path) -> Family:
    """The family of published weights; errors as of `published_family`."""
    return published_family(path, tuple(FAMILIES.values()))


def import_run(
    path: Path,
    run: Path,
    recipe: RunConfig,
    vocabulary: Vocabulary | None = None,
    *,
    gene_names: Mapping[str, str] | None = None,
    technology_means: Mapping[str, Path] | None = None,
) -> int:
    """Make a run directory at step 0 from published weights.

    The geometry comes with the weights and replaces the recipe's. What no published form holds (the decoder
    of AIDO.Tissue) starts from the recipe's seed. Weights become float32; their dtypes are remembered.

    Parameters
    ----------
    path
        A folder with ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``), or Nicheformer's
        Lightning checkpoint.
    run
        The new run directory.
    recipe
        The experiment that the weights are for.
    vocabulary
        Their genes, in the order of the table. If not given, those of the folder's ``vocab.json``; without
        either the run can be exported, not used.
    gene_names
        Symbols of the genes of ``vocab.json``.
    technology_means
        Nicheformer: for each technology the ``.npy`` file of means that cells are to be ranked against.

    Returns
    -------
    Parameters that were imported; what the published code holds and does not use is not counted.

    Raises
    ------
    InputError
        As the readers' errors say, an existing output, or a vocabulary or means of another length.
    """
    family = family_of(path)
    source = read_published(path, family)
    where = str(path / CONFIG if source.form == "folder" else path)
    config, n_genes = family.configure(source.config, recipe, where)
    shapes = family.shapes(config, n_genes)
    check_tensors(source, shapes, family)
    given = {name: read_means(file, n_genes) for name, file in (technology_means or {}).items()}
    config, named, means = _what_tokens_mean(source, config, n_genes, gene_names)
    if given and not isinstance(config.model, NicheformerConfig):
        raise InputError(path, "does not rank genes, so it has no technology means", "leave them out")
    if vocabulary is not None and len(vocabulary) != n_genes:
        raise InputError(
            path,
            f"is of {n_genes:,} genes, the vocabulary of {len(vocabulary):,}",
            "give the vocabulary that the weights were trained with",
        )
    if vocabulary is not None and named is not None and vocabulary.ids != named.ids:
        raise InputError(
            path / VOCAB, "names other genes than the vocabulary given", "leave one of the two out"
        )
    vocabulary = vocabulary or named
    published = jax.tree.map(jnp.asarray, family.from_published(source.tensors, config, n_genes))
    parameters = {**initialise(model_builder(config, n_genes), jax.random.key(config.seed)), **published}
    own = {name for name in shapes if not name.endswith(family.optional)}
    origin = {
        "form": source.form,
        "config": source.config if source.form == "folder" else None,
        "n_genes": n_genes,
        "prefixed": source.prefixed,
        "vocab": source.vocab,
        "dtypes": {name: str(tensor.dtype) for name, tensor in source.tensors.items() if name in own},
    }
    with new_path(run) as scratch:
        scratch.mkdir()
        write_weights(scratch, config, vocabulary, n_genes, parameters)
        (scratch / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        verbatim = {name: tensor for name, tensor in source.tensors.items() if name not in own}
        save_file(verbatim, scratch / _VERBATIM)
        if source.rest is not None:
            save_pickle(scratch / _REST, source.rest)
        save_technology_means(scratch, {**means, **given})
    return sum(source.tensors[name].size for name in own)


def _what_tokens_mean(
    source: PublishedWeights, config: RunConfig, n_genes: int, gene_names: Mapping[str, str] | None
) -> tuple[RunConfig, Vocabulary | None, Tensors]:
    """What weights of Nicheformer bring along: how sentences are made, the genes, technology means."""
    vocabulary = None
    if isinstance(config.model, NicheformerConfig):
        if source.own is not None:
            config = with_own_settings(config, source.own, str(source.path / OWN))
        if source.vocab is not None:
            where = str(source.path / VOCAB)
            config = with_vocab(config, source.vocab, where)
            vocabulary = vocabulary_of(source.vocab, n_genes, where, gene_names)
    return config, vocabulary, source.means


@dataclass(frozen=True)
class Exported:
    """Numbers of parameters: of the model, and of what the published code holds beside it, unused."""

    parameters: int
    unused: int


def export_run(run: Path, out: Path, *, form: Form = "folder", licence: str = "unknown") -> Exported:
    """Write a run as the authors' class loads it.

    A run that was imported gives back, in the form that it came in, its own names, dtypes, config and the
    tensors that were only kept. Any other, or another form, gives float32 and a config of its geometry; what
    the authors' class holds and does not use is zero. A model card goes with a folder.

    Parameters
    ----------
    run
        A run directory.
    out
        The new folder or file.
    form
        ``folder``, or for Nicheformer ``lightning``, a checkpoint.
    licence
        An SPDX identifier for the model card.

    Raises
    ------
    InputError
        No run there, an existing output, or a model that the published form cannot hold.
    """
    config, _ = read_run(run)
    family = FAMILIES[type(config.model)]
    family.check(config)
    if form not in family.forms:
        raise InputError(run, f"is of {family.title}, which has no Lightning form", "use --format published")
    if form == "lightning" and out.suffix != CHECKPOINT:
        raise InputError(out, "is no name of a checkpoint", f"name it {out.name}{CHECKPOINT}")
    origin, verbatim = _origin(run)
    genes = run / "vocabulary.json"
    vocabulary = Vocabulary.read(genes) if genes.is_file() else None
    if vocabulary is not None:
        n_genes = len(vocabulary)
    elif origin:
        n_genes = origin["n_genes"]
    else:
        raise InputError(run, "does not know its genes (no vocabulary.json)", "train or import it again")
    _, parameters, step = restore_parameters(run, config, n_genes)
    tensors = family.to_published(parameters, config, n_genes)
    weights = {name: tensor for name, tensor in sorted(tensors.items()) if not name.endswith(family.optional)}
    exported = sum(tensor.size for tensor in weights.values())
    card = model_card(run, step, n_genes, licence, exported, parameters_hash(weights), family)
    rest: dict[str, Any] = {}
    if origin and origin["form"] == form:
        dtypes = {name: np.dtype(getattr(ml_dtypes, kind, kind)) for name, kind in origin["dtypes"].items()}
        tensors = {name: tensors[name].astype(dtype) for name, dtype in dtypes.items()}
        content, prefixed, unused = origin["config"], origin["prefixed"], verbatim
        if form == "lightning":
            rest = load_pickle(run / _REST)
    else:
        content, prefixed = family.published_config(config, n_genes, form), family.prefixes_own
        rest = {
            "epoch": 0,
            "global_step": step,
            "pytorch-lightning_version": "2.0.0",
            "hyper_parameters": content,
        }
        unused = {
            name: verbatim.get(name, np.zeros(shape, np.float32))
            for name, shape in family.unused(config, form).items()
        }
    tensors = {**tensors, **unused}
    vocab, own, means = beside(run, config, vocabulary, origin)
    with new_path(out) as scratch:
        if form == "lightning":
            require_torch(out)
            write_checkpoint(scratch, rest, tensors, own=own, means=means)
        else:
            scratch.mkdir()
            named = {
                family.prefix + name if prefixed and not name.startswith(family.heads) else name: tensor
                for name, tensor in tensors.items()
            }
            write_folder(scratch, content, named, card, vocab=vocab, own=own, means=means)
    counted = (name for name in unused if not name.endswith(family.optional))
    return Exported(exported, sum(unused[name].size for name in counted))


def beside(
    run: Path, config: RunConfig, vocabulary: Vocabulary | None, origin: dict[str, Any] | None
) -> tuple[dict[str, int] | None, dict[str, Any] | None, Tensors]:
    """What says how a run's tokens are made: ``vocab.json``, our own settings, technology means.

    Weights that were imported from the authors' form keep to what came with them.
    """
    if not isinstance(config.model, NicheformerConfig):
        return None, None, {}
    means = {file.stem: np.load(file) for file in sorted((run / MEANS).glob("*.npy"))}
    if origin:
        return origin["vocab"], own_settings(config) if means else None, means
    vocab = published_vocab(vocabulary, config.nicheformer()[1]) if vocabulary is not None else None
    return vocab, own_settings(config), means


def _origin(run: Path) -> tuple[dict[str, Any] | None, Tensors]:
    """What an imported run keeps of where it came from."""
    if not (run / _ORIGIN).is_file():
        return None, {}
    try:
        return json.loads((run / _ORIGIN).read_text()), load_file(run / _VERBATIM)
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(
            run, f"what it was imported from cannot be read ({error})", "import it again"
        ) from error


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Where to write what appears under `path` when it is whole, and not at all after an error."""
    if os.path.lexists(path):
        raise InputError(path, "exists already", "name another folder or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".scfm.") as scratch:
            inside = Path(scratch) / path.name
            yield inside
            inside.rename(path)
    except OSError as error:
        raise InputError(path, f"cannot be written ({error})", "name another folder") from error
