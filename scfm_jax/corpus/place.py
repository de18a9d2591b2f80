"""Where a corpus lies: a local folder, or a prefix of a bucket (``gs://``, ``s3://``), through TensorStore.

Objects are read, written whole and listed by name; arrays are opened by what `Place.kvstore` specifies.
Credentials come from the environment, as TensorStore takes them; it tries throttled requests and dropped
connections again.
"""

from __future__ import annotations

import functools
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from scfm_jax.errors import InputError

_BUCKET_DRIVERS = {"s3://": "s3", "gs://": "gcs"}
_AT_ONCE = 128
_LARGE = 1 << 24


class Place:
    """A folder or a prefix.

    Parameters
    ----------
    location
        A path, or ``gs://BUCKET/PREFIX`` or ``s3://BUCKET/PREFIX``. For S3, ``AWS_ENDPOINT_URL`` names a
        server other than Amazon's and ``AWS_REGION`` the region.

    Raises
    ------
    InputError
        A URL of another kind, or one without a bucket.
    """

    def __init__(self, location: str | Path | Place) -> None:
        text = str(location)
        scheme = next((scheme for scheme in _BUCKET_DRIVERS if text.startswith(scheme)), None)
        if scheme is None and "://" in text:
            raise InputError(text, "this kind of URL is not known", "give a folder, gs:// or s3://")
        self.is_local = scheme is None
        if scheme is None:
            self._root = str(Path(text).absolute()) if text else ""
            self._text = text
        else:
            bucket, _, prefix = text.removeprefix(scheme).partition("/")
            if not bucket:
                raise InputError(text, "names no bucket", f"write {scheme}BUCKET/PREFIX")
            self._bucket, self._driver = bucket, _BUCKET_DRIVERS[scheme]
            if ".." in prefix.split("/"):
                raise InputError(text, "the prefix has .. in it", "write it out")
            self._root = "" if prefix.strip("/.") == "" else posixpath.normpath(prefix).strip("/")
            self._text = f"{scheme}{bucket}/{self._root}"

    def __str__(self) -> str:
        return self._text

    def __truediv__(self, name: str) -> Place:
        """A place below this one, or where `name` says if that is a place of its own."""
        if "://" in name or name.startswith("/"):
            return Place(name)
        return Place(str(Path(self._text) / name) if self.is_local else f"{self._text}/{name}")

    @property
    def absolute(self) -> str:
        """Its location as a process elsewhere names it."""
        return self._root if self.is_local else self._text

    @property
    def path(self) -> Path:
        """The local folder."""
        assert self.is_local
        return Path(self._text)

    def kvstore(self) -> dict[str, Any]:
        """TensorStore's specification of it."""
        root = f"{self._root}/" if self._root else ""
        if self.is_local:
            return {"driver": "file", "path": os.path.normpath(root) + "/"}
        spec = {"driver": self._driver, "bucket": self._bucket, "path": root}
        if self._driver == "s3":
            # The variables of Amazon's own tools, which TensorStore does not read.
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            if endpoint:
                spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
            elif region:
                spec |= {"aws_region": region}
        return spec

    def read(self, name: str) -> bytes | None:
        """The content of an object, ``None`` where there is none."""
        return self.read_all([name])[0]

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        """The content of several objects, read at once."""
        found: list[bytes | None] = []
        for first in range(0, len(names), _AT_ONCE):
            part = names[first : first + _AT_ONCE]
            # All are asked before the first is waited for.
            asked = [self._ask(name) for name in part]
            for name, future in zip(part, asked, strict=True):
                result = self._result(future, name)
                found.append(bytes(result.value) if result.state == "value" else None)
        return found

    def _ask(self, name: str) -> Any:
        if not name.startswith(("/", "..")) and "://" not in name:
            return self._store.read(name)
        folder, _, file = name.rpartition("/")
        return (self / folder)._store.read(file)

    def write(self, name: str, data: bytes) -> None:
        """Write an object, at once or not at all."""
        self._result(self._store.write(name, data), name)

    def names(self, prefix: str = "") -> list[str]:
        """Names of the objects below `prefix`, sorted."""
        keys = self._result(self._store.list(ts.KvStore.KeyRange(prefix, _after(prefix))), prefix)
        return sorted(key.decode() for key in keys)

    def delete(self, prefix: str) -> None:
        """Delete all objects whose names begin with `prefix`; a local folder goes with them."""
        self._result(self._store.delete_range(ts.KvStore.KeyRange(prefix, _after(prefix))), prefix)
        if self.is_local:
            for folder, _, _ in os.walk(self.path / prefix, topdown=False):
                Path(folder).rmdir()

    def upload(self, folder: Path) -> None:
        """Write every file of a local folder here."""
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        # Large objects one at a time, so that a worker's memory holds one.
        large = [file for file in files if file.stat().st_size > _LARGE]
        for part in (*([file] for file in large), [file for file in files if file not in large]):
            names = [file.relative_to(folder).as_posix() for file in part]
            written = [self._store.write(name, file.read_bytes()) for name, file in zip(names, part)]
            for name, future in zip(names, written, strict=True):
                self._result(future, name)

    @functools.cached_property
    def _store(self) -> ts.KvStore:
        return self._result(ts.KvStore.open(self.kvstore(), context=_CONTEXT), "")

    def _result(self, future: Any, name: str) -> Any:
        try:
            return future.result()
        except (ValueError, OSError, RuntimeError) as error:
            problem = str(error).split("\n")[0].split(" [")[0]
            mend = "check that it exists and that you may read and write there"
            raise InputError(self / name if name else self, problem, mend) from None


def _after(prefix: str) -> str:
    """The first name, in byte order, that does not begin with `prefix`; "" for no end."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""


def remote_context(cache_bytes: int) -> ts.Context:
    """TensorStore's context: a cache for shard indexes and chunks, and requests enough for object stores."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": cache_bytes},
            "s3_request_concurrency": {"limit": 128},
            "gcs_request_concurrency": {"limit": 128},
        }
    )


_CONTEXT = remote_context(0)
