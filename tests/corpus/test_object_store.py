from __future__ import annotations

import boto3
import numpy as np
import pytest
from s3_server import BUCKET, UnreliableProxy, s3_server

from scfm_jax.cli import main
from scfm_jax.corpus import Corpus, add_sources, build_corpus, merge_corpora, remove_slides, verify_corpus
from scfm_jax.corpus.place import Place
from scfm_jax.corpus.store import StoreOptions, shard_rows
from scfm_jax.data.loader import DataConfig, Loader
from scfm_jax.data.masks import MaskRates
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.errors import InputError


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_REGION", "us-east-1")
        with s3_server() as url:
            patch.setenv("AWS_ENDPOINT_URL", url)
            yield url


@pytest.fixture
def prefix(server, request) -> str:
    return f"s3://{BUCKET}/{request.node.name}"


def objects(server: str, prefix: str) -> dict[str, int]:
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    key = prefix.removeprefix(f"s3://{BUCKET}/")
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{key}/").get("Contents", [])
    return {entry["Key"].removeprefix(f"{key}/"): entry["Size"] for entry in found}


def batches(path: str) -> list[np.ndarray]:
    corpus = Corpus.open(path)
    config = DataConfig(sample=SampleConfig(neighbours=3), batch_size=8, window=2, rungs=2)
    loader = Loader(corpus, np.arange(corpus.n_cells), config, seed=1, rates=MaskRates(0.3, 0.03))
    return [np.asarray(value) for batch in loader.iterate(0, 8) for value in batch.values()]


def test_a_corpus_in_a_bucket_is_the_corpus_of_a_folder(tissue, write, tmp_path, server, prefix):
    source = write(tissue, labels=("type",))
    build_corpus(tmp_path / "local", [source], options=StoreOptions())
    build_corpus(prefix, [source], options=StoreOptions())
    local, remote = Corpus.open(tmp_path / "local"), Corpus.open(prefix)
    assert remote.hash == local.hash and remote.path == prefix
    files = {
        path.relative_to(tmp_path / "local").as_posix(): path for path in (tmp_path / "local").rglob("*")
    }
    sizes = {name: path.stat().st_size for name, path in files.items() if path.is_file()}
    there = objects(server, prefix)
    assert {n: s for n, s in there.items() if n != "manifest.json"} == {
        n: s for n, s in sizes.items() if n != "manifest.json"
    }
    index = np.random.default_rng(0).permutation(local.n_cells)
    for field in ("genes", "counts", "offsets"):
        np.testing.assert_array_equal(getattr(remote.cells(index), field), getattr(local.cells(index), field))
    np.testing.assert_array_equal(remote.neighbours(index, 7), local.neighbours(index, 7))
    np.testing.assert_array_equal(remote.distances(index, 7), local.distances(index, 7))
    np.testing.assert_array_equal(remote.labels("type")[0], local.labels("type")[0])
    np.testing.assert_array_equal(remote.technology_means("sim"), local.technology_means("sim"))
    for one, other in zip(batches(prefix), batches(str(tmp_path / "local")), strict=True):
        np.testing.assert_array_equal(one, other)
    assert verify_corpus(prefix) == []


def test_slides_are_added_removed_and_merged_there(tissue, write, server, prefix):
    build_corpus(f"{prefix}/a", [write(tissue)])
    add_sources(f"{prefix}/a", [write(tissue, "more")])
    remove_slides(f"{prefix}/a", ["tissue/s2", "more/s1"])
    assert [slide.name for slide in Corpus.open(f"{prefix}/a").slides] == ["tissue/s1", "more/s2"]
    folders = {name.split("/")[1] for name in objects(server, f"{prefix}/a") if name.startswith("slides/")}
    assert len(folders) == 2
    vocabulary = Corpus.open(f"{prefix}/a").vocabulary
    build_corpus(f"{prefix}/b", [write(tissue, "other")], vocabulary=vocabulary)
    merge_corpora(f"{prefix}/both", [f"{prefix}/a", f"{prefix}/b"])
    assert not any(name.startswith("slides/") for name in objects(server, f"{prefix}/both"))
    both, first = Corpus.open(f"{prefix}/both"), Corpus.open(f"{prefix}/a")
    index = np.arange(first.n_cells)
    np.testing.assert_array_equal(both.cells(index).counts, first.cells(index).counts)
    assert len(both.slides) == 4 and verify_corpus(f"{prefix}/both") == []


def test_throttling_and_dropped_connections_are_tried_again(tissue, write, server, prefix, monkeypatch):
    source = write(tissue)
    with UnreliableProxy(server, every=40).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        build_corpus(prefix, [source])
        corpus = Corpus.open(prefix)
        cells = corpus.cells(np.arange(corpus.n_cells))
        assert verify_corpus(prefix) == []
        assert proxy.throttled and proxy.dropped
    rows = corpus.column("source_row")
    np.testing.assert_array_equal(
        np.add.reduceat(cells.counts, cells.offsets[:-1]), np.asarray(tissue.X.sum(1)).ravel()[rows]
    )


def test_a_missing_object_is_named(tissue, write, server, prefix, capsys):
    build_corpus(prefix, [write(tissue)])
    name = next(name for name in objects(server, prefix) if name.endswith("entries/c/0/0"))
    Place(prefix).delete(name)
    slide = "tissue/s1" if "_s1-" in name else "tissue/s2"
    told = rf"{prefix}/slides/tissue_s\d-\w+/entries: slide '{slide}' cannot be read"
    with pytest.raises(InputError, match=told):
        Corpus.open(prefix).cells(np.arange(300))
    assert verify_corpus(prefix) == [f"{prefix}/{name} (slide {slide}): missing"]
    assert main(["corpus", "verify", prefix]) == 1 and "missing" in capsys.readouterr().out


def test_what_is_not_there_is_one_line(tissue, write, server, prefix, capsys):
    assert main(["corpus", "info", f"{prefix}/nothing"]) == 2
    assert "no manifest.json there, so no corpus" in capsys.readouterr().err
    assert main(["corpus", "info", "s3://no-such-bucket/x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scfm: s3://no-such-bucket/x")
    for location, problem in (("s3://", "names no bucket"), ("ftp://x/y", "this kind of URL is not known")):
        with pytest.raises(InputError, match=problem):
            Corpus.open(location)


def test_an_interrupted_build_goes_on_there(tissue, write, server, prefix, monkeypatch):
    from scfm_jax.corpus import write as write_module

    source, whole = write(tissue), write_module.write_slide

    def only_the_first(folder, content, *rest, **more):
        if content.name != "tissue/s1":
            raise KeyboardInterrupt
        return whole(folder, content, *rest, **more)

    monkeypatch.setattr(write_module, "write_slide", only_the_first)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(prefix, [source])
    with pytest.raises(InputError, match="run it again"):
        Corpus.open(prefix)
    written = []
    monkeypatch.setattr(
        write_module,
        "write_slide",
        lambda folder, content, *r, **m: written.append(content.name) or whole(folder, content, *r, **m),
    )
    build_corpus(prefix, [source])
    assert written == ["tissue/s2"] and verify_corpus(prefix) == []
    assert not any(name.startswith("building") for name in objects(server, prefix))


def test_a_bucket_of_google_is_specified_as_tensorstore_wants_it():
    assert Place("gs://bucket/a/b/").kvstore() == {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}
    assert str(Place("gs://bucket/a") / "x") == "gs://bucket/a/x"
    assert Place("s3://bucket/.data/v1.").kvstore()["path"] == ".data/v1./"
    with pytest.raises(InputError, match=r"the prefix has \.\. in it"):
        Place("s3://bucket/../x")


def test_shards_hold_four_times_as_much_in_a_bucket(tmp_path):
    for place, entries in ((f"s3://{BUCKET}/a", 1 << 27), (tmp_path, 1 << 25)):
        assert shard_rows("entries", StoreOptions.suited_to(Place(place)), width=1 << 10) == entries >> 10
