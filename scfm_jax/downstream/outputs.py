"""New files and folders: what exists is left alone, and what fails leaves nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scfm_jax.errors import DataWarning, InputError


def check_new(out: Path) -> None:
    """Raise InputError where something is called `out` already, or nothing can be."""
    if os.path.lexists(out):
        raise InputError(out, "exists already", "name another output or remove it")
    with writing(out):
        if not out.parent.is_dir():
            raise InputError(out, "its folder does not exist", "make it first")
        # No look at permissions knows of read-only systems and of names that are too long.
        out.touch(exist_ok=False)
        out.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise InputError where the system refuses; what is done within writes `path` alone."""
    try:
        yield
    except OSError as error:
        raise InputError(
            path, f"cannot be written: {error.strerror or error}", "name another place"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep out other processes that lock the same file, which is made; they wait."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a lock, whose file is made, and yield True; yield False at once where another process holds it.

    It ends with the process, however that ends. Where the file system knows no locks, a warning says so and
    the claim is taken to hold.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            text = f"{path}: its file system knows no locks ({error.strerror}); work on it in one process"
            warnings.warn(text, DataWarning, stacklevel=3)
        yield True


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A place beside `out` for a file or a folder, which becomes `out` unless something goes wrong.

    It is the caller's alone, whoever else writes the same at the same time.

    Raises
    ------
    InputError
        The system refuses to write it.
    """
    partial = out.with_name(f"{out.name[:50]}.{uuid.uuid4().hex}.partial")
    with writing(out):
        try:
            yield partial
            partial.replace(out)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
