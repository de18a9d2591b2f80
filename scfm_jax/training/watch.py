"""The watch that the hosts of a run keep over each other, so that none waits for a dead one.

Every host beats in JAX's coordination service; host 0, which keeps it, listens. A host that falls silent, or
that fails and says so, is a verdict for all, and a thread of each host that waits for nothing else ends its
process with one line. This works where the devices wait for ever, as they do in a collective that a dead host
never joins.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

import jax

from scfm_jax.errors import InputError

_BEAT = 2.0  # seconds between signs of life
_SILENCE = 30.0  # seconds without one after which a host is dead
_DOUBTED = 5 * _BEAT  # the same where a host has failed already: the run is lost, and only why is open
_PATIENCE = 600  # seconds that hosts wait for each other at the end


class Watch:
    """This host's signs of life, and its ear for the verdict that ends all hosts.

    Parameters
    ----------
    client
        Of JAX's coordination service.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._host, self._hosts = jax.process_index(), jax.process_count()
        self._over = threading.Event()
        self._beat(0)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._live, self._listen)]
        for thread in self._threads:
            thread.start()

    def _name(self, host: int) -> str:
        return f"host {host} of {self._hosts}"

    def _beat(self, number: int) -> None:
        self._client.key_value_set(f"scfm_jax/beats/{self._host}", str(number), allow_overwrite=True)

    def _live(self) -> None:
        """Beat, and on host 0 listen for the beats of all."""
        heard = {host: ("", time.monotonic()) for host in range(1, self._hosts)}
        for number in itertools.count(1):
            if self._over.wait(_BEAT):
                return
            try:
                self._beat(number)
                if self._host:
                    continue
                now = time.monotonic()
                for key, beat in self._client.key_value_dir_get("scfm_jax/beats/"):
                    host = int(key.rpartition("/")[2])
                    if host and heard[host][0] != beat:
                        heard[host] = (beat, now)
                silence = _DOUBTED if self._client.key_value_dir_get("scfm_jax/doubts/") else _SILENCE
            except jax.errors.JaxRuntimeError:
                return  # the other thread says why
            dead = {host: now - since for host, (_, since) in heard.items() if now - since > silence}
            if dead:
                names = ", ".join(map(self._name, dead))
                self._say(f"{names} gave no sign of life for {min(dead.values()):.0f} seconds")
                return

    def _listen(self) -> None:
        """Wait for the verdict; an empty one says that all is well and over."""
        verdict = None
        while verdict is None:
            try:
                verdict = self._client.blocking_key_value_get("scfm_jax/verdict", _PATIENCE * 1000)
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith("DEADLINE_EXCEEDED"):
                    verdict = f"{self._name(0)}, which keeps the others together, is gone"
        if not verdict or self._over.is_set():
            return
        _print(f"scfm: {verdict}; all hosts stop: the same command with --resume goes on")
        self._leave(1)

    def _say(self, verdict: str) -> None:
        """Pass a verdict, unless there is one."""
        # It cannot where another was first, or nobody is there to hear it.
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set("scfm_jax/verdict", verdict)

    def _leave(self, status: int) -> None:
        """End this process at once, whatever its other threads wait for; host 0, which all hear, last."""
        if self._host == 0:
            time.sleep(_BEAT)
        sys.stdout.flush()
        os._exit(status)

    def fail(self, error: BaseException) -> None:
        """Tell the others what went wrong here, and end this process."""
        if isinstance(error, InputError):
            told, status = str(error), 2
        elif isinstance(error, KeyboardInterrupt):
            told, status = "interrupted", 130
        else:
            told, status = " ".join(f"{type(error).__name__}: {error}".split())[:200], 1
            # Most likely another host has died in a collective. If so, the verdict ends this process first.
            self._doubt()
            time.sleep(_DOUBTED + 3 * _BEAT)
            traceback.print_exception(error)
        self._over.set()
        if status != 1:
            _print(f"scfm: {told}")
        self._say(f"{self._name(self._host)} failed ({told})")
        self._leave(status)

    def _doubt(self) -> None:
        """Let host 0 know that the run is lost, so that it looks sooner for who has died."""
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"scfm_jax/doubts/{self._host}", "")

    def end(self) -> None:
        """Wait for all hosts to come here, then be silent without being missed."""
        self._client.wait_at_barrier("scfm_jax/end", _PATIENCE * 1000)
        self._over.set()
        if self._host == 0:
            self._say("")
        for thread in self._threads:
            thread.join()


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
