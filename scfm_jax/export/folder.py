"""Published weights on disk: a folder as Hugging Face keeps models, or a Lightning checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from scfm_jax import json_files
from scfm_jax.errors import InputError
from scfm_jax.export.family import Family, Form, Tensors
from scfm_jax.training.run import MEANS, save_technology_means

CONFIG, TENSORS, PICKLE, CARD, VOCAB = (
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "README.md",
    "vocab.json",
)
CHECKPOINT = ".ckpt"
# What a model of ours carries along: how its cells became sentences, and by which means.
OWN, _OF_OURS = "scfm_jax.json", "scfm_jax"
# Of a checkpoint: tensors, which come back from our parameters, and what only training goes on from.
_NOT_KEPT = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", _OF_OURS)
DTYPES = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16))


@dataclass(frozen=True, eq=False)
class PublishedWeights:
    """What a folder or a checkpoint holds.

    Attributes
    ----------
    path, form
        Where it lies, and which of the two it is.
    config
        ``config.json``, or ``hyper_parameters``, decoded.
    tensors
        By name, the family's prefix taken off, in the dtype of the file.
    prefixed
        Whether there was one.
    vocab
        ``vocab.json`` of a folder that has one: from token's name to its number.
    own
        What a model of ours carries beside its weights (see `write_folder`).
    means
        Its technology means.
    rest
        Of a checkpoint, what is neither tensors nor an optimiser's state.
    """

    path: Path
    form: Form
    config: dict[str, Any]
    tensors: Tensors
    prefixed: bool
    vocab: dict[str, int] | None = None
    own: dict[str, Any] | None = None
    means: Tensors = field(default_factory=dict)
    rest: dict[str, Any] | None = None


def published_family(path: Path, families: tuple[Family, ...]) -> Family:
    """Which family a folder's ``config.json`` says it is of; a file is a Lightning checkpoint.

    Raises
    ------
    InputError
        No config, or one of another architecture.
    """
    if not path.exists():
        raise InputError(path, "is not there", "name a folder or a checkpoint of published weights")
    if path.is_file() and path.suffix != CHECKPOINT:
        raise InputError(path, f"is neither a folder nor a {CHECKPOINT} file", "name the published weights")
    if path.is_file():
        return next(family for family in families if "lightning" in family.forms)
    kind = read_json(path / CONFIG, path).get("model_type")
    for family in families:
        if family.model_type == kind:
            return family
    known = " or ".join(repr(family.model_type) for family in families)
    raise InputError(path / CONFIG, f"the field 'model_type' is {kind!r}", f"give a folder of {known}")


def read_published(path: Path, family: Family) -> PublishedWeights:
    """Read a folder or a checkpoint; every tensor must be finite.

    Raises
    ------
    InputError
        No config, no weights, weights that cannot be read, a pickle that holds more than plain values and
        tensors, or a tensor that is not finite.
    """
    found = _read_checkpoint(path) if path.is_file() else _read_folder(path, family)
    for name, tensor in found.tensors.items():
        if tensor.dtype in DTYPES and not np.isfinite(tensor.astype(np.float32)).all():
            raise InputError(path, f"the tensor {name!r} has NaN or infinite weights", "get the file again")
    return found


def _read_folder(path: Path, family: Family) -> PublishedWeights:
    config = read_json(path / CONFIG, path)
    if (path / TENSORS).is_file():
        tensors = _read_safetensors(path / TENSORS)
    elif (path / PICKLE).is_file():
        tensors = _tensors(path / PICKLE, load_pickle(path / PICKLE))
    else:
        raise InputError(path, f"has neither {TENSORS} nor {PICKLE}", "add the weights")
    prefix, heads = family.prefix, family.heads
    base = [name for name in tensors if not name.startswith(heads)]
    prefixed = any(name.startswith(prefix) for name in base)
    bare = [name for name in base if not name.startswith(prefix)]
    if prefixed and bare:
        raise InputError(path, f"has names with {prefix!r} and without: {', '.join(bare)}", "name all alike")
    named = {
        name.removeprefix(prefix) if not name.removeprefix(prefix).startswith(heads) else name: tensor
        for name, tensor in tensors.items()
    }
    vocab = read_json(path / VOCAB, path) if (path / VOCAB).is_file() else None
    own = read_json(path / OWN, path) if (path / OWN).is_file() else None
    means = {file.stem: _read_array(file) for file in sorted((path / MEANS).glob("*.npy"))}
    return PublishedWeights(path, "folder", config, named, prefixed, vocab, own, means)


def _read_checkpoint(path: Path) -> PublishedWeights:
    content = load_pickle(path)
    for name in ("state_dict", "hyper_parameters"):
        if not isinstance(content, dict) or not isinstance(content.get(name), dict):
            raise InputError(path, f"has no {name}", "give the Lightning checkpoint, or the folder")
    beside = content.get(_OF_OURS, {})
    return PublishedWeights(
        path,
        "lightning",
        dict(content["hyper_parameters"]),
        _tensors(path, content["state_dict"]),
        prefixed=False,
        own=beside.get("own"),
        means=_tensors(path, beside.get("means", {})),
        rest={name: value for name, value in content.items() if name not in _NOT_KEPT},
    )


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """A JSON object."""
    if not path.is_file():
        raise InputError(folder, f"has no {path.name}", "name a folder as Hugging Face keeps models")
    content = json_files.read_json(path, "give the published file")
    if not isinstance(content, dict):
        raise InputError(path, "holds no object", "give the published file")
    return content


def check_tensors(source: PublishedWeights, shapes: Mapping[str, tuple[int, ...]], family: Family) -> None:
    """Raise where a tensor is missing, unknown, of another shape or no weight."""
    missing = [name for name in shapes if name not in source.tensors and not name.endswith(family.optional)]
    unknown = [name for name in source.tensors if name not in shapes and not name.startswith(family.kept)]
    wrong = [
        f"{name} {source.tensors[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if name in source.tensors and source.tensors[name].shape != shape
    ]
    other = [
        f"{name} {source.tensors[name].dtype}"
        for name in shapes
        if name in source.tensors and source.tensors[name].dtype not in DTYPES
    ]
    mend = "give the weights that belong to its config.json"
    for problem, names in (
        ("lacks the tensors", missing),
        ("has tensors that are not known:", unknown),
        ("has tensors of another shape:", wrong),
        ("has tensors that are neither float32, bfloat16 nor float16:", other),
    ):
        if names:
            raise InputError(source.path, f"{problem} {', '.join(names)}", mend)


def write_folder(
    path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    card: str,
    *,
    vocab: dict[str, int] | None = None,
    own: dict[str, Any] | None = None,
    means: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Write a folder that torch's tools read too; `path` must be there and empty.

    `own` (``scfm_jax.json``) and `means` (``technology_means/``) are ours: what an import of it needs to make
    the same sentences of the same cells. The authors' code does not look at them.
    """
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    (path / CARD).write_text(card)
    write_beside(path, vocab=vocab, own=own, means=means)


def write_beside(
    path: Path, *, vocab: dict[str, int] | None, own: dict[str, Any] | None, means: Mapping[str, np.ndarray]
) -> None:
    """The part of `write_folder` that says what tokens mean."""
    for name, content in ((VOCAB, vocab), (OWN, own)):
        if content is not None:
            (path / name).write_text(json.dumps(content, indent=2) + "\n")
    save_technology_means(path, means)


def write_checkpoint(
    path: Path,
    rest: Mapping[str, Any],
    tensors: Tensors,
    *,
    own: dict[str, Any] | None = None,
    means: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Write what the authors' ``LightningModule.load_from_checkpoint`` reads; `rest` is all else in it."""
    content: dict[str, Any] = {**rest, "state_dict": _to_torch_all(tensors)}
    if own is not None:
        content[_OF_OURS] = {"own": own, "means": _to_torch_all(means)}
    save_pickle(path, content)


def save_pickle(path: Path, content: Any) -> None:
    """By torch; `load_pickle` reads it."""
    require_torch(path).save(content, path)


def _read_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(path, f"cannot be read ({error})", "get the file again") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, AttributeError, TypeError) as error:
        raise InputError(path, f"cannot be read ({error})", "get the file again") from error


def require_torch(path: Path) -> Any:
    """The module, or an error that names `path` as what needs it."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            path, "is a pickle, which torch alone reads and writes", "pip install torch, or use a folder"
        ) from error
    return torch


def load_pickle(path: Path) -> Any:
    """What a pickle of plain values, NumPy's numbers and tensors holds; nothing else in it is executed."""
    torch = require_torch(path)
    # Lightning keeps rates that NumPy computed.
    numbers = [np.dtype, np.float64(0).__reduce__()[0], *(type(np.dtype(kind)) for kind in "fdilq?")]
    try:
        with torch.serialization.safe_globals(numbers):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the pickle makes it raise
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it holds {refused[1]}, which is no plain value" if refused else _first_line(error)
        raise InputError(
            path,
            f"is not plain weights ({why})",
            "get the file again, or save it with plain values and tensors alone",
        ) from error


def _tensors(path: Path, content: Any) -> Tensors:
    torch = require_torch(path)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in content.items()
    ):
        raise InputError(path, "holds more than tensors by name", "give model.safetensors")
    try:
        return {name: _from_torch(tensor) for name, tensor in content.items()}
    except (TypeError, RuntimeError) as error:
        raise InputError(
            path, f"has a tensor that is no array ({_first_line(error)})", "give model.safetensors"
        ) from error


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"\x1b\[\d*m", "", line)[:120]


def _from_torch(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch_all(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: _to_torch(tensor) for name, tensor in tensors.items()}


def _to_torch(tensor: np.ndarray) -> Any:
    import torch

    own = np.array(tensor)  # torch warns of memory that it may not write to
    if own.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(own)
