"""Several hosts as one run: how they join, share the batch, agree, and end together.

Beside the step they speak through JAX's coordination service, which host 0 keeps: plain messages and no
computation on the devices, so any thread may use them at any time.
"""

from __future__ import annotations

import base64
import itertools
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # JAX has no public way to its key-value store
from jax.sharding import Mesh
from jaxtyping import Int64

from scfm_jax.data.loader import Exchange
from scfm_jax.errors import InputError
from scfm_jax.training.mesh import batch_sharding
from scfm_jax.training.watch import Watch

_JAX_SILENCE = 45  # seconds after which JAX aborts, should the watch have failed
_JOINING = 300.0  # seconds that a host waits for host 0 to start
_PATIENCE = 600  # seconds that hosts wait for each other's messages
_AGREE = 2.0  # seconds, about, between two agreements to go on
_LAST_PORT = 65_535
_NUMBERS = itertools.count()
# What a cluster sets for the processes of a job of several, and for nobody else. (A shell or a batch script
# under SLURM knows of the job's tasks, but it is not one of them.)
_CLUSTERS: dict[str, Callable[[str], bool]] = {
    "SLURM_STEP_NUM_TASKS": lambda text: text.isdecimal() and int(text) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda text: text.isdecimal() and int(text) > 1,
    "TPU_WORKER_HOSTNAMES": lambda text: "," in text,
}


def is_primary() -> bool:
    """Whether this host is the one that prints and writes what all would write alike."""
    return jax.process_index() == 0


@contextmanager
def joined(distributed_by: str | None) -> Iterator[None]:
    """Be one of a run's hosts, for as long as the block lasts; alone where nothing says otherwise.

    With several hosts, a failure in the block does not leave it: it is printed, told to the others, and ends
    this process, with status 2 for bad input, 130 for an interruption and 1 otherwise. So does, with status 1
    and one line, the death or the failure of another host.

    Parameters
    ----------
    distributed_by
        ``auto`` takes address, number and count from the cluster (SLURM, Open MPI, GKE, TPU VMs), as
        `jax.distributed.initialize` finds them; ``ADDRESS:PORT,COUNT,NUMBER`` says them; ``off`` stays alone;
        None is ``auto`` where SLURM, Open MPI or GKE started several processes, and ``off`` elsewhere.

    Raises
    ------
    InputError
        It cannot be read, nothing tells who the hosts are, or the devices are a part of a TPU slice of many
        hosts, which no host can have for itself.
    """
    if distributed_by is None:
        started = any(name in os.environ and several(os.environ[name]) for name, several in _CLUSTERS.items())
        distributed_by = "auto" if started else "off"
    if distributed_by == "off":
        _check_alone()
        yield
        return
    _initialise(distributed_by)
    if jax.process_count() == 1:
        yield
        return
    watch = Watch(distributed.global_state.client)
    try:
        yield
        watch.end()
    except BaseException as error:
        watch.fail(error)
    jax.distributed.shutdown()


def _check_alone() -> None:
    """A TPU slice of several hosts is one whether they have joined or not, and its VMs do not say so."""
    if jax.process_count() > 1:
        raise InputError(
            "--distributed",
            f"this host is one of the {jax.process_count()} of a TPU slice, and has not joined the others",
            "give --distributed auto",
        )


def _initialise(distributed_by: str) -> None:
    """Find the other hosts, before JAX looks for devices."""
    # Its handler of SIGTERM would be in the way of `stopping`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if distributed_by == "auto":
            jax.distributed.initialize(heartbeat_timeout_seconds=_JAX_SILENCE)
        else:
            address, count, number = _parsed(distributed_by)
            if number:
                _wait_for_host_0(address, _JOINING)
            jax.distributed.initialize(
                address,
                count,
                number,
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=_JAX_SILENCE,
            )
    except (ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            "--distributed",
            f"{distributed_by}: no run of several hosts could be joined ({reason})",
            "give ADDRESS:PORT,COUNT,NUMBER, the same address and count on all hosts",
        ) from error


def _wait_for_host_0(address: str, seconds: float) -> None:
    """Wait until somebody listens there: JAX, which waits as long, would abort without a word of ours."""
    name, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((name.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    "--distributed",
                    f"host 0 does not answer at {address} ({error})",
                    "start it with the same address, or mend the address",
                ) from error
            time.sleep(1)


def _parsed(text: str) -> tuple[str, int, int]:
    parts = text.split(",")
    if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
        address, count, number = parts[0], int(parts[1]), int(parts[2])
        host, _, port = address.rpartition(":")
        if number < count and host and port.isdecimal() and 1 <= int(port) <= _LAST_PORT:
            return address, count, number
    raise InputError(
        "--distributed",
        f"cannot read {text!r}",
        "write auto, off, or ADDRESS:PORT,COUNT,NUMBER with numbers from 0, as 10.0.0.1:1234,4,0",
    )


def meet(name: str) -> None:
    """Wait until all hosts have come here."""
    if jax.process_count() > 1:
        client: Any = distributed.global_state.client
        client.wait_at_barrier(f"scfm_jax/{name}/{next(_NUMBERS)}", _PATIENCE * 1000)


def share_of_batch(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which of how many equal parts of a batch this host's devices hold.

    Hosts that share their rows, as those that a tensor axis spans, hold the same part. A part need not be a
    run of rows: where the devices of a host lie apart in the mesh, the global batch has the loader's rows in
    another order, which no sum sees.

    Raises
    ------
    InputError
        The rows of some hosts' devices overlap without being the same.
    """
    rows: dict[int, set[int]] = {}
    places: dict[Any, Any] = dict(batch_sharding(mesh).devices_indices_map((batch_size,)))
    for device, place in places.items():
        start, stop, _ = place[0].indices(batch_size)
        rows.setdefault(device.process_index, set()).update(range(start, stop))
    return equal_share(rows, jax.process_index())


def equal_share(rows: dict[int, set[int]], host: int) -> tuple[int, int]:
    """The same, of the rows that each host's devices hold."""
    parts = sorted({tuple(sorted(of_host)) for of_host in rows.values()})
    if len({len(part) for part in parts}) > 1 or len(set().union(*parts)) < sum(map(len, parts)):
        raise InputError(
            "mesh",
            "hosts hold parts of a batch that overlap or differ in size",
            "choose data x fsdp a multiple of the hosts, or let tensor span whole hosts",
        )
    return parts.index(tuple(sorted(rows[host]))), len(parts)


def greatest_of_hosts() -> Exchange | None:
    """An exchange in which every host gets the greatest lengths of any; None where there is one host.

    Host 0 hears all and tells all, so that messages grow with the hosts and not with their square. All hosts
    must make theirs in the same order, and ask for the same names in the same order.
    """
    if jax.process_count() == 1:
        return None
    client: Any = distributed.global_state.client
    number, told = next(_NUMBERS), list[str]()

    def tell(key: str, lengths: Int64[np.ndarray, "steps 2"]) -> None:
        client.key_value_set(key, base64.b64encode(lengths.astype("<i8").tobytes()).decode())

    def hear(key: str, host: int, name: str) -> Int64[np.ndarray, "steps 2"]:
        try:
            text = client.blocking_key_value_get(key, _PATIENCE * 1000)
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(
                f"host {host} has not said how long rows of window {name} are, asked for {_PATIENCE} seconds"
            ) from error
        return np.frombuffer(base64.b64decode(text), "<i8").reshape(-1, 2)

    def exchange(name: str, lengths: Int64[np.ndarray, "steps 2"]) -> Int64[np.ndarray, "steps 2"]:
        key = f"scfm_jax/lengths/{number}/{name}"
        if not is_primary():
            tell(f"{key}/{jax.process_index()}", lengths)
            return hear(f"{key}/greatest", 0, name)
        greatest = lengths
        for host in range(1, jax.process_count()):
            greatest = np.maximum(greatest, hear(f"{key}/{host}", host, name))
            client.key_value_delete(f"{key}/{host}")
        tell(f"{key}/greatest", greatest)
        # Who has said this window's lengths has heard the greatest of the window before.
        if told:
            client.key_value_delete(told.pop())
        told.append(f"{key}/greatest")
        return greatest

    return exchange


@contextmanager
def stopping() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step: asked by Ctrl-C or SIGTERM on any host, answered alike on all.

    The function is to be called after every step, by all hosts. A second Ctrl-C interrupts at once.
    """
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield (lambda step: bool(received)) if jax.process_count() == 1 else _Agreement(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Agreement:
    """Host 0 says, every two seconds or so, until which step all go on.

    Between two such steps nobody speaks: neither the devices nor the service see more than one message of a
    host in this time, however fast the steps. No host passes such a step before it has heard, so all stop at
    the same one.
    """

    _KEPT = 64  # words that a host behind may yet ask for; hosts are never further apart than steps in flight

    def __init__(self, received: list[int]) -> None:
        self._client: Any = distributed.global_state.client
        self._received, self._told = received, False
        self._number, self._until, self._since = next(_NUMBERS), 0, time.monotonic()
        self._last: int | None = None
        self._said: deque[str] = deque()

    def __call__(self, step: int) -> bool:
        if self._received and not self._told:
            self._told = True
            self._client.key_value_set(f"scfm_jax/stop/{self._number}/{jax.process_index()}", "")
        if step < self._until:
            return False
        key = f"scfm_jax/until/{self._number}/{step}"
        if is_primary():
            word = self._decide(step)
            self._client.key_value_set(key, word)
            self._said.append(key)
            if len(self._said) > self._KEPT:
                self._client.key_value_delete(self._said.popleft())
        else:
            word = self._client.blocking_key_value_get(key, _PATIENCE * 1000)
        self._until = int(word)
        return self._until == step

    def _decide(self, step: int) -> str:
        """The next step at which to ask again; this one to stop."""
        if self._client.key_value_dir_get(f"scfm_jax/stop/{self._number}/"):
            return str(step)
        now = time.monotonic()
        seconds = (now - self._since) / (step - self._last) if self._last is not None else _AGREE
        self._last, self._since = step, now
        return str(step + max(int(_AGREE / max(seconds, 1e-3)), 1))
