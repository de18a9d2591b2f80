"""Builds that are shared out, killed and run again: always the same corpus."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import anndata as ad
import numpy as np
import pytest

from scfm_jax.corpus import Corpus, Source, build_corpus, verify_corpus, workers
from scfm_jax.corpus.place import Place
from scfm_jax.corpus.workers import run_jobs
from scfm_jax.errors import InputError


def square(number: int) -> int:
    return number * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise InputError("job 3", "went wrong", "mend it")
    return number


@pytest.fixture
def sources(tissue, write) -> list[Source]:
    """A file of three sections and two of one, as CSR, CSC and dense."""
    tissue.obs["section"] = np.array(["a", "b", "c"])[np.arange(tissue.n_obs) % 3]
    half = tissue[:150].copy()
    half.X = half.X.tocsc()
    rest = tissue[150:].copy()
    rest.X = rest.X.toarray()
    for part in (half, rest):
        del part.obs["section"]
    parts = (tissue, half, rest)
    return [
        write(part, f"file{n}", labels=("type",), section="section" if n == 0 else None)
        for n, part in enumerate(parts)
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_are_done_once_wherever_they_run(processes):
    assert dict(run_jobs(square, range(6), workers=processes)) == {n: n * n for n in range(6)}
    with pytest.raises(InputError, match="job 3: went wrong; mend it"):
        dict(run_jobs(fail_at_three, range(6), workers=processes))


def test_processes_change_nothing(sources, expected, tmp_path, small_jobs):
    told = []
    build_corpus(
        tmp_path / "out", sources, workers=2, progress=lambda what, done, total: told.append((done, total))
    )
    assert Corpus.open(tmp_path / "out").hash == expected and verify_corpus(tmp_path / "out") == []
    assert told[-1] == (1200, 1200) and told == sorted(told)


def test_a_bad_file_in_another_process_is_one_line(sources, tmp_path):
    bad = ad.read_h5ad(sources[1].path)
    bad.X.data[5] = 0.5
    bad.write_h5ad(sources[1].path)
    with pytest.raises(InputError, match=r"file1.h5ad: X .*no raw counts"):
        build_corpus(tmp_path / "out", sources, workers=2)
    assert not (tmp_path / "out").exists()


def test_a_dask_cluster_changes_nothing(sources, expected, tmp_path, small_jobs):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        build_corpus(tmp_path / "out", sources, scheduler=cluster.scheduler_address)
    assert Corpus.open(tmp_path / "out").hash == expected and verify_corpus(tmp_path / "out") == []


def test_no_scheduler_there_is_one_line(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_DASK_SECONDS", 1)
    with pytest.raises(InputError, match=r"--scheduler: no Dask scheduler at tcp://127.0.0.1:9"):
        list(run_jobs(square, [1], scheduler="tcp://127.0.0.1:9"))
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"install scfm_jax\[dask\]"):
        list(run_jobs(square, [1], scheduler="tcp://127.0.0.1:9"))


def kill(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(InputError, match="a worker was killed; give them more memory or take fewer"):
        list(run_jobs(kill, range(3), workers=2))


def test_a_build_that_fails_before_its_first_mark_can_be_run_again(sources, expected, tmp_path, monkeypatch):
    kept = Place.write

    def full(place, name, data):
        if "finished" in name:
            raise OSError("disk full")
        kept(place, name, data)

    monkeypatch.setattr(Place, "write", full)
    with pytest.raises(OSError, match="disk full"):
        build_corpus(tmp_path / "out", sources)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    build_corpus(tmp_path / "out", sources)
    assert Corpus.open(tmp_path / "out").hash == expected


def test_a_slide_cut_short_by_a_crash_is_written_again(sources, expected, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "5", str(tmp_path / "out"), *(s.path for s in sources)], check=False
    )
    assert done.returncode == -9
    slide = next((tmp_path / "out" / "slides").glob("*/slide.json"))
    slide.write_bytes(slide.read_bytes()[:40])
    build_corpus(tmp_path / "out", sources)
    assert Corpus.open(tmp_path / "out").hash == expected and verify_corpus(tmp_path / "out") == []


KILLED = """
import os, signal, sys
from scfm_jax.corpus import Source, build, build_corpus, write

build._ENTRIES_OF_A_JOB = 1
kept = write.Place.write

def kill_at(place, name, data, left=[int(sys.argv[1])]):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    kept(place, name, data)

write.Place.write = kill_at
sources = [
    Source(path, "human", "sim", section="section" if "file0" in path else None, labels=("type",))
    for path in sys.argv[3:]
]
build_corpus(sys.argv[2], sources)
"""


def test_a_build_killed_anywhere_goes_on(sources, expected, tmp_path):
    out, paths = tmp_path / "out", [source.path for source in sources]
    killed = 0
    for writes in (1, 2, 4, 3, 2, 2, 1, 99):
        done = subprocess.run([sys.executable, "-c", KILLED, str(writes), str(out), *paths], check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -9
        killed += 1
        with pytest.raises(InputError, match=r"run it again|no corpus"):
            Corpus.open(out)
    assert killed >= 5
    assert Corpus.open(out).hash == expected and verify_corpus(out) == []
    assert not (out / "building").exists()
