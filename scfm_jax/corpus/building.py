"""One build of a corpus at a time, and nothing behind one that fails but its finished slides.

A build keeps its notes in ``building/`` beside the slides. In a folder it holds a lock there, which the
system frees when the process ends, however it ends; so what a killed build leaves never keeps the next one
out. In a bucket nothing can be held like that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from typing import IO

from scfm_jax.corpus.manifest import BUILDING, MANIFEST
from scfm_jax.corpus.place import Place
from scfm_jax.errors import DataWarning, InputError

COUNTED, FINISHED = f"{BUILDING}/counted", f"{BUILDING}/finished"
SCRATCH = "scratch"


@contextlib.contextmanager
def only_build(place: Place) -> Iterator[None]:
    """Keep other builds of a corpus out, and leave nothing behind a failure but finished slides.

    Raises
    ------
    InputError
        Another build is at work there, or something that is no corpus is there.
    """
    mend = "remove it or choose another name"
    if place.is_local and place.path.exists() and not place.path.is_dir():
        raise InputError(place, "it exists already", mend)
    if not any(map(place.names, (MANIFEST, f"{BUILDING}/"))) and place.names():
        raise InputError(place, "it exists already and is no corpus", mend)
    with _locked(place) if place.is_local else contextlib.nullcontext():
        try:
            yield
        except BaseException:
            _clean(place)
            raise


def clear_scratch(place: Place) -> None:
    """Remove what killed jobs left behind."""
    if place.is_local:
        shutil.rmtree(place.path / BUILDING / SCRATCH, ignore_errors=True)


def _clean(place: Place) -> None:
    clear_scratch(place)
    if place.names(f"{FINISHED}/"):
        return
    if not place.names(MANIFEST):
        # A slide may be in place, or half uploaded, and not yet marked.
        place.delete("slides/")
    place.delete(f"{BUILDING}/")


@contextlib.contextmanager
def _locked(place: Place) -> Iterator[None]:
    path = place.path / BUILDING / "lock"
    with _lock(place) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            for folder in (path.parent, place.path):
                with contextlib.suppress(OSError):  # it holds something, or is gone
                    folder.rmdir()


def _lock(place: Place) -> IO[str]:
    path = place.path / BUILDING / "lock"
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:  # the build before has just ended
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            file.close()
            mend = "wait until it ends, or stop it, and run the same again"
            raise InputError(place, f"another build of it is at work ({holder})", mend) from None
        except OSError as error:
            text = (
                f"{place}: its file system knows no locks ({error.strerror}); run one build of it at a time"
            )
            warnings.warn(text, DataWarning, stacklevel=5)
            return file
        # It may have been deleted between opening and locking: then this is a lock that nobody looks at.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
