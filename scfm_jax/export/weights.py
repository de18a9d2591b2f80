"""Published weights to a run directory, and back."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from scfm_jax.errors import InputError
from scfm_jax.export.card import model_card
from scfm_jax.export.folder import KEPT, PREFIX, check_tensors, read_folder, write_folder
from scfm_jax.export.tissue import (
    INVERSE_FREQUENCIES,
    from_published,
    published_config,
    published_shapes,
    tissue_config,
    to_published,
)
from scfm_jax.genes import Vocabulary
from scfm_jax.models.functional import abstract, initialise, parameters_hash
from scfm_jax.training.checkpoint import Checkpoints
from scfm_jax.training.config import RunConfig
from scfm_jax.training.optimiser import make_optimiser
from scfm_jax.training.run import describe_run, read_run, restore_parameters
from scfm_jax.training.task import model_builder

# What a run directory keeps of the folder it came from: all that our parameters do not hold.
_ORIGIN, _VERBATIM = "published.json", "published.safetensors"


def import_run(folder: Path, run: Path, recipe: RunConfig, vocabulary: Vocabulary | None = None) -> int:
    """Make a run directory at step 0 from a folder of published weights.

    The encoder's geometry comes from the folder and replaces the recipe's; the decoder, which no published
    folder holds, starts from the recipe's seed, with the encoder's geometry and as many layers as the recipe
    says. Weights become float32; the folder's dtypes are remembered.

    Parameters
    ----------
    folder
        ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``).
    run
        The new run directory.
    recipe
        The experiment that the weights are for.
    vocabulary
        Its genes, in the order of the table. Without one the run can be exported, not used.

    Returns
    -------
    Parameters that were imported, padding in memory not counted.

    Raises
    ------
    InputError
        As the readers' errors say, an existing output, or a vocabulary of another length.
    """
    source = read_folder(folder)
    wanted, _, _ = recipe.tissue()
    model, n_genes = tissue_config(source.config, wanted.decoder.layers, str(folder / "config.json"))
    model = replace(
        wanted,
        encoder=model.encoder,
        decoder=model.decoder,
        bins=model.bins,
        bin_alpha=model.bin_alpha,
        init_std=model.init_std,
    )
    shapes = published_shapes(model, n_genes)
    check_tensors(source, shapes, optional=(INVERSE_FREQUENCIES,))
    if vocabulary is not None and len(vocabulary) != n_genes:
        raise InputError(
            folder,
            f"is of {n_genes:,} genes (max_position_embeddings), the vocabulary of {len(vocabulary):,}",
            "give the vocabulary that the weights were trained with",
        )
    config = replace(recipe, model=model)
    build = model_builder(config, n_genes)
    published = jax.tree.map(jnp.asarray, from_published(source.tensors, model))
    parameters = {**initialise(build, jax.random.key(config.seed)), **published}
    state = {
        "parameters": parameters,
        "optimiser": make_optimiser(config.optimiser, abstract(build)[2]).init(parameters),
        "step": jnp.zeros((), jnp.int32),
    }
    own = {name for name in shapes if not name.endswith(INVERSE_FREQUENCIES)}
    origin = {
        "config": source.config,
        "n_genes": n_genes,
        "prefixed": source.prefixed,
        "dtypes": {name: str(tensor.dtype) for name, tensor in source.tensors.items() if name in own},
    }
    with new_folder(run) as scratch:
        describe_run(scratch, config, vocabulary, "")
        (scratch / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        verbatim = {name: tensor for name, tensor in source.tensors.items() if name not in own}
        save_file(verbatim, scratch / _VERBATIM)
        with Checkpoints(scratch / "checkpoints") as checkpoints:
            checkpoints.save(0, state)
    return sum(source.tensors[name].size for name in own)


def export_run(run: Path, folder: Path, *, licence: str = "unknown") -> int:
    """Write the encoder of a run as a folder that the authors' class loads.

    A run that was imported gives back its own names, dtypes, config and the tensors that were only kept; any
    other gives float32 and a ``config.json`` of its geometry. A model card goes with it.

    Returns
    -------
    Parameters that were exported; what was only kept is not counted.

    Raises
    ------
    InputError
        No run there, or an existing output.
    """
    config, _ = read_run(run)
    origin: dict[str, Any] | None = None
    verbatim: dict[str, np.ndarray] = {}
    if (run / _ORIGIN).is_file():
        try:
            origin, verbatim = json.loads((run / _ORIGIN).read_text()), load_file(run / _VERBATIM)
        except (ValueError, OSError, SafetensorError) as error:
            raise InputError(
                run, f"what it was imported from cannot be read ({error})", "import it again"
            ) from error
    genes = run / "vocabulary.json"
    if genes.is_file():
        n_genes = len(Vocabulary.read(genes))
    elif origin:
        n_genes = origin["n_genes"]
    else:
        raise InputError(run, "does not know its genes (no vocabulary.json)", "train or import it again")
    _, parameters, step = restore_parameters(run, config, n_genes)
    model, _, _ = config.tissue()
    tensors = to_published(parameters, model, n_genes)
    weights = {name: x for name, x in sorted(tensors.items()) if not name.endswith(INVERSE_FREQUENCIES)}
    exported = sum(x.size for x in weights.values())
    card = model_card(run, step, n_genes, licence, exported, parameters_hash(weights))
    if origin:
        dtypes = {name: np.dtype(getattr(ml_dtypes, kind, kind)) for name, kind in origin["dtypes"].items()}
        tensors = {name: tensors[name].astype(dtype) for name, dtype in dtypes.items()} | verbatim
        content = origin["config"]
        if origin["prefixed"]:
            tensors = {
                name if name.startswith(KEPT) else PREFIX + name: tensor for name, tensor in tensors.items()
            }
    else:
        content = published_config(model, n_genes, "float32")
    with new_folder(folder) as scratch:
        write_folder(scratch, content, tensors, card)
    return exported


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name when all of it is written, and not at all after an error."""
    if os.path.lexists(path):
        raise InputError(path, "exists already", "name another folder or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".scfm.") as scratch:
            inside = Path(scratch) / path.name
            inside.mkdir()
            yield inside
            inside.rename(path)
    except OSError as error:
        raise InputError(path, f"cannot be written ({error})", "name another folder") from error
