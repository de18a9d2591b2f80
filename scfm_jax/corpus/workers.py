"""Running jobs here, over processes of this machine, or over a Dask cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from scfm_jax.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")
_DASK_SECONDS = 10
_KILLED = "give them more memory or take fewer, and run the same again: it goes on"


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    scheduler: str | None = None,
) -> Iterator[tuple[int, Result]]:
    """Call ``function`` with every job, and yield each one's number and result as it is done.

    Parameters
    ----------
    function
        At the top level of a module, so that other processes find it.
    jobs
        Values that can be pickled.
    workers
        Processes; 1 runs the jobs here, in their order.
    scheduler
        Address of a Dask scheduler, whose workers must see the same files; it takes the place of ``workers``.

    Raises
    ------
    InputError
        Dask is not installed, or no scheduler answers. What a job raises is raised here, and jobs not begun
        are given up.
    """
    if scheduler is not None:
        yield from _run_on_dask(function, jobs, scheduler)
    elif workers == 1 or len(jobs) <= 1:
        for number, job in enumerate(jobs):
            yield number, function(job)
    else:
        # TensorStore's threads do not survive a fork.
        spawn = multiprocessing.get_context("spawn")
        n_workers = min(workers, len(jobs))
        with ProcessPoolExecutor(n_workers, mp_context=spawn, initializer=_end_with_parent) as pool:
            number_of = {pool.submit(function, job): number for number, job in enumerate(jobs)}
            try:
                for future in as_completed(number_of):
                    yield number_of[future], future.result()
            except BrokenProcessPool:
                raise InputError("--workers", "a worker was killed", _KILLED) from None
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _end_with_parent() -> None:
    """Have this process end when the one that it works for does, even by a kill: it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_on_dask(
    function: Callable[[Job], Result], jobs: Sequence[Job], scheduler: str
) -> Iterator[tuple[int, Any]]:
    try:
        import distributed
    except ImportError:
        raise InputError(
            "--scheduler", "Dask is not installed", "install scfm_jax[dask], here and on the workers"
        ) from None
    try:
        client = distributed.Client(scheduler, timeout=_DASK_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(
            "--scheduler", f"no Dask scheduler at {scheduler} ({error})", "give its address"
        ) from None
    with client:
        # Jobs write files, so a result of an equal job of another time must not stand in for one.
        number_of = {
            client.submit(function, job, pure=False, retries=0): number for number, job in enumerate(jobs)
        }
        try:
            for future in distributed.as_completed(number_of, loop=client.loop):
                yield number_of[future], future.result()
        except distributed.scheduler.KilledWorker:
            raise InputError("--scheduler", "a worker was killed", _KILLED) from None
        except BaseException:
            client.cancel(list(number_of))
            raise
