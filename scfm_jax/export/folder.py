"""A folder as Hugging Face keeps models: ``config.json``, ``model.safetensors``, ``README.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from scfm_jax.errors import InputError

CONFIG, TENSORS, PICKLE, CARD = "config.json", "model.safetensors", "pytorch_model.bin", "README.md"
PREFIX = "bert."
# Beginnings of names that are kept verbatim, though they are not known.
KEPT = ("cls.",)
DTYPES = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16))


@dataclass(frozen=True, eq=False)
class PublishedFolder:
    """What a folder holds.

    Attributes
    ----------
    path
        The folder.
    config
        ``config.json``, decoded.
    tensors
        By name, the prefix of the base model (``bert.``) taken off, in the dtype of the file.
    prefixed
        Whether there was one.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    prefixed: bool


def read_folder(path: Path) -> PublishedFolder:
    """Read a folder; every tensor must be finite.

    Raises
    ------
    InputError
        No config, no weights, weights that cannot be read, a pickle that holds more than tensors, or a
        tensor that is not finite.
    """
    config = path / CONFIG
    if not config.is_file():
        raise InputError(path, f"has no {CONFIG}", "name a folder as Hugging Face keeps models")
    try:
        content = json.loads(config.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(config, f"is no JSON ({error})", "give the published file") from error
    if not isinstance(content, dict):
        raise InputError(config, "holds no object", "give the published file")
    if (path / TENSORS).is_file():
        tensors = _read_safetensors(path / TENSORS)
    elif (path / PICKLE).is_file():
        tensors = _read_pickle(path / PICKLE)
    else:
        raise InputError(path, f"has neither {TENSORS} nor {PICKLE}", "add the weights")
    for name, tensor in tensors.items():
        if tensor.dtype in DTYPES and not np.isfinite(tensor.astype(np.float32)).all():
            raise InputError(path, f"the tensor {name!r} has NaN or infinite weights", "get the file again")
    own = [name for name in tensors if not name.startswith(KEPT)]
    prefixed = any(name.startswith(PREFIX) for name in own)
    bare = [name for name in own if not name.startswith(PREFIX)]
    if prefixed and bare:
        raise InputError(path, f"has names with {PREFIX!r} and without: {', '.join(bare)}", "name all alike")
    named = {
        name.removeprefix(PREFIX) if not name.removeprefix(PREFIX).startswith(KEPT) else name: tensor
        for name, tensor in tensors.items()
    }
    return PublishedFolder(path, content, named, prefixed)


def check_tensors(
    folder: PublishedFolder, shapes: Mapping[str, tuple[int, ...]], optional: tuple[str, ...] = ()
) -> None:
    """Raise where a tensor is missing, unknown, of another shape or no weight.

    Parameters
    ----------
    shapes
        Of all known tensors.
    optional
        Endings of names that may be missing.
    """
    missing = [name for name in shapes if name not in folder.tensors and not name.endswith(optional)]
    unknown = [name for name in folder.tensors if name not in shapes and not name.startswith(KEPT)]
    wrong = [
        f"{name} {folder.tensors[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if name in folder.tensors and folder.tensors[name].shape != shape
    ]
    other = [
        f"{name} {folder.tensors[name].dtype}"
        for name in shapes
        if name in folder.tensors and folder.tensors[name].dtype not in DTYPES
    ]
    mend = "give the weights that belong to its config.json"
    for problem, names in (
        ("lacks the tensors", missing),
        ("has tensors that are not known:", unknown),
        ("has tensors of another shape:", wrong),
        ("has tensors that are neither float32, bfloat16 nor float16:", other),
    ):
        if names:
            raise InputError(folder.path, f"{problem} {', '.join(names)}", mend)


def write_folder(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], card: str) -> None:
    """Write a folder that torch's tools read too; `path` must be there and empty."""
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    (path / CARD).write_text(card)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, AttributeError, TypeError) as error:
        raise InputError(path, f"cannot be read ({error})", "get the file again") from error


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            path, "is a pickle, which torch alone reads", "pip install torch, or give model.safetensors"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the pickle makes it raise
        raise InputError(
            path, f"is not plain weights ({_first_line(error)})", "give model.safetensors"
        ) from error
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
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _from_torch(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
