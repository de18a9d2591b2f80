"""Builds killed before any step on the disk, killed workers, builds that meet: always the same corpus."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scfm_jax.corpus import (
    Corpus,
    Source,
    add_sources,
    build_corpus,
    merge_corpora,
    remove_slides,
    verify_corpus,
    write,
)
from scfm_jax.corpus import build as build_module
from scfm_jax.corpus.building import only_build
from scfm_jax.corpus.check import count
from scfm_jax.corpus.place import Place
from scfm_jax.errors import DataWarning, InputError

KILLED = """
import os, signal, sys
from pathlib import Path
from scfm_jax.corpus import Source, build, build_corpus
from scfm_jax.corpus.place import Place

out, kind, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
build._ENTRIES_OF_A_JOB = 1
STEPS = {"write": Place, "delete": Place, "rename": Path, "unlink": Path}

def stop_before(owner, name):
    whole = getattr(owner, name)
    def step(place, *rest, **more):
        global left
        left -= str(place).startswith(out)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(place, *rest, **more)
    setattr(owner, name, step)

for name in STEPS if kind == "any" else [kind]:
    stop_before(STEPS[name], name)
sections = {"file0.h5ad": "section", "file1.h5ad": None}
sources = [Source(path, "human", "sim", section=sections[Path(path).name]) for path in sys.argv[4:]]
build_corpus(out, sources)
"""


@pytest.fixture
def sources(tissue, write) -> list[Source]:
    """A file of two sections, one of one."""
    rest = tissue[150:].copy()
    del rest.obs["section"]
    return [write(tissue[:150].copy(), "file0"), write(rest, "file1", section=None)]


def run_killed(out: Path, sources: list[Source], kind: str, number: int) -> int:
    command = [sys.executable, "-c", KILLED, str(out), kind, str(number), *(s.path for s in sources)]
    return subprocess.run(command, check=False).returncode


def assert_whole(out: Path, expected: str) -> None:
    assert Corpus.open(out).hash == expected and verify_corpus(out) == []
    assert sorted(path.name.split("-")[0] for path in out.iterdir()) == [
        "manifest.json",
        "report",
        "slides",
        "technology_sums",
        "vocabulary.json",
    ]


def test_a_build_killed_between_two_renames_goes_on(sources, expected, tmp_path):
    out = tmp_path / "out"
    # The first slide is in place and not marked: so it is moved away, and then the kill comes.
    assert run_killed(out, sources, "write", 3) == -9
    (unmarked,) = (out / "slides").iterdir()
    assert run_killed(out, sources, "rename", 2) == -9
    assert not unmarked.exists() and list((out / "building" / "scratch").rglob("replaced-*"))
    # The manifest is there, the notes are not yet gone.
    assert run_killed(out, sources, "delete", 1) == -9
    assert Corpus.open(out).hash == expected and (out / "building" / "lock").exists()
    build_corpus(out, sources)
    assert_whole(out, expected)


@pytest.mark.slow
def test_a_build_killed_before_any_step_goes_on(sources, expected, tmp_path):
    for number in range(1, 100):
        out = tmp_path / str(number)
        if run_killed(out, sources, "any", number) == 0:
            break
        # And once more, three steps on.
        run_killed(out, sources, "any", 3)
        build_corpus(out, sources)
        assert_whole(out, expected)
    assert 12 < number < 99


def die_before_rename(job: write.WriteJob) -> object:
    if job.source.path.endswith("file1.h5ad"):
        Path.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    return write.write_slides(job)


def die_counting(job: object) -> object:
    os.kill(os.getpid(), signal.SIGKILL)
    return None


@pytest.mark.parametrize(
    ("function", "dying"), [("write_slides", die_before_rename), ("count", die_counting)]
)
def test_a_build_whose_worker_is_killed_goes_on(
    sources, expected, tmp_path, monkeypatch, small_jobs, function, dying
):
    monkeypatch.setattr(build_module, function, dying)
    with pytest.raises(InputError, match="a worker was killed; give them more memory or take fewer"):
        build_corpus(tmp_path / "out", sources, workers=2)
    monkeypatch.undo()
    build_corpus(tmp_path / "out", sources)
    assert_whole(tmp_path / "out", expected)


def wait_for_ever(job: object) -> None:
    (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
    time.sleep(600)


WITH_WORKERS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_kills import build_module, wait_for_ever
from scfm_jax.corpus import Source, build_corpus
if __name__ == "__main__":
    build_module.count = wait_for_ever
    build_corpus(sys.argv[2], [Source(path, "human", "sim") for path in sys.argv[3:]], workers=2)
"""


def test_workers_end_with_the_build_that_they_work_for(sources, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setenv("PIDS", str(pids))
    program = tmp_path / "program.py"
    program.write_text(WITH_WORKERS)
    command = [sys.executable, str(program), str(Path(__file__).parent), str(tmp_path / "out")]
    process = subprocess.Popen([*command, *(source.path for source in sources)])
    try:
        wait_until(lambda: len(list(pids.iterdir())) == 2)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid.name}/cmdline").exists() for pid in pids.iterdir()))
    build_corpus(tmp_path / "out", sources)  # the lock is free again
    assert verify_corpus(tmp_path / "out") == []


def wait_until(true) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to pass in a minute")


def test_a_second_build_of_one_corpus_is_one_line(sources, expected, tmp_path):
    out = tmp_path / "out"
    told = rf"out: another build of it is at work \(process {os.getpid()} on .*\); wait until it ends"
    with only_build(Place(out)):
        with pytest.raises(InputError, match=told):
            build_corpus(out, sources)
        assert (out / "building" / "lock").exists()
    assert not out.exists()
    build_corpus(out, sources[:1])
    before = sorted(out.rglob("*"))
    with only_build(Place(out)):
        for change in (
            lambda: build_corpus(out, sources[:1]),
            lambda: add_sources(out, sources[1:]),
            lambda: remove_slides(out, ["file0/s1"]),
        ):
            with pytest.raises(InputError, match=told):
                change()
    assert sorted(out.rglob("*")) == before
    with only_build(Place(tmp_path / "both")), pytest.raises(InputError, match="it exists already"):
        merge_corpora(tmp_path / "both", [out, tmp_path / "expected"])


HOLD = """
import sys, time
from scfm_jax.corpus.building import only_build
from scfm_jax.corpus.place import Place
with only_build(Place(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_build_leaves_no_lock(sources, expected, tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"another build of it is at work \(process {held.pid} on"):
            build_corpus(out, sources)
        held.kill()
    with pytest.raises(InputError, match="did not finish: run it again"):
        Corpus.open(out)
    build_corpus(out, sources)
    assert_whole(out, expected)


def test_a_lock_that_was_deleted_meanwhile_is_taken_again(tmp_path, monkeypatch):
    path, lock, taken = tmp_path / "out" / "building" / "lock", fcntl.flock, []

    def late(file, how):
        if not taken:  # the build before ends between opening and locking
            path.unlink()
        taken.append(file)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_build(Place(tmp_path / "out")):
        assert len(taken) == 2 and path.read_text().startswith("process")
        monkeypatch.undo()
        with path.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_warned_of(sources, tmp_path, monkeypatch):
    def unknown(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with pytest.warns(DataWarning, match="knows no locks .* run one build of it at a time"):
        build_corpus(tmp_path / "out", sources)
    assert verify_corpus(tmp_path / "out") == []


def interrupt(sources, out, monkeypatch) -> None:
    """Leave a build with the slides of the first file finished."""
    monkeypatch.setattr(build_module, "write_slides", stop_at_the_second_file)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(out, sources)
    monkeypatch.undo()


def stop_at_the_second_file(job: write.WriteJob) -> object:
    if job.source.path.endswith("file1.h5ad"):
        raise KeyboardInterrupt
    return write.write_slides(job)


def test_what_was_checked_or_finished_is_not_read_again(sources, expected, tmp_path, monkeypatch):
    out, counted, read = tmp_path / "out", [], []
    interrupt(sources, out, monkeypatch)
    opened = write.CountsFile
    monkeypatch.setattr(build_module, "count", lambda job: counted.append(job.source.path) or count(job))
    monkeypatch.setattr(write, "CountsFile", lambda source: read.append(source.path) or opened(source))
    told = []
    build_corpus(out, sources, progress=lambda what, done, total: told.append((done, total)))
    assert counted == [] and read == [sources[1].path]
    assert told[-1] == (600, 600) and told == sorted(told)
    assert_whole(out, expected)


@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_a_file_that_changed_is_checked_again(sources, expected, tmp_path, monkeypatch, damage):
    out, counted = tmp_path / "out", []
    interrupt(sources, out, monkeypatch)
    if damage == "changed":
        os.utime(sources[0].path, ns=(1, 1))
    else:
        for kept in (out / "building" / "counted").iterdir():
            kept.write_bytes(kept.read_bytes()[:-1])
    monkeypatch.setattr(build_module, "count", lambda job: counted.append(job.source.path) or count(job))
    build_corpus(out, sources)
    assert counted == [source.path for source in sources[: 1 if damage == "changed" else 2]]
    assert_whole(out, expected)


def test_a_corpus_that_is_done_is_looked_at_once(sources, expected, tmp_path, monkeypatch):
    read, kept = [], Place.read_all
    monkeypatch.setattr(Place, "read_all", lambda place, names: read.extend(names) or kept(place, names))
    report = build_corpus(tmp_path / "expected", sources)
    assert read.count("manifest.json") == 1 and report["n_cells"] == 300


def test_a_job_carries_what_was_counted_of_its_own_cells(sources, tmp_path, monkeypatch, small_jobs):
    jobs = []
    monkeypatch.setattr(build_module, "write_slides", lambda job: jobs.append(job) or write.write_slides(job))
    build_corpus(tmp_path / "out", sources)
    corpus = Corpus.open(tmp_path / "out")
    assert [list(job.sections.values()) for job in jobs] == [[slide.name] for slide in corpus.slides]
    rows, names = corpus.column("source_row"), ("total_raw", "total_matched", "n_genes")
    for job, slide in zip(jobs, corpus.slides, strict=True):
        cells = slice(slide.start, slide.start + slide.n_cells)
        order = rows[cells].argsort()
        assert job.rows.tolist() == rows[cells][order].tolist()
        for total, name in zip(job.totals, names, strict=True):
            assert total.tolist() == corpus.column(name)[cells][order].tolist()
