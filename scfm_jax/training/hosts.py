"""What the hosts of one run tell each other beside the step, through JAX's coordination service.

These are plain messages and no computation on the devices, so a loader's thread may use them at any time.
"""

from __future__ import annotations

import base64
import itertools
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # JAX has no public way to its key-value store
from jaxtyping import Int64

from scfm_jax.data.loader import Exchange

_SECONDS = 600
_NUMBERS = itertools.count()


def greatest_of_hosts() -> Exchange | None:
    """An exchange in which every host gets the greatest lengths of any; None where there is one host.

    All hosts must make theirs in the same order, and ask for the same names in the same order.
    """
    if jax.process_count() == 1:
        return None
    client: Any = distributed.global_state.client
    host = jax.process_index()
    number, said = next(_NUMBERS), list[str]()

    def exchange(name: str, lengths: Int64[np.ndarray, "steps 2"]) -> Int64[np.ndarray, "steps 2"]:
        key = f"scfm_jax/lengths/{number}/{name}"
        client.key_value_set(f"{key}/{host}", base64.b64encode(lengths.astype("<i8").tobytes()).decode())
        said.append(f"{key}/{host}")
        greatest = lengths
        for other in range(jax.process_count()):
            if other != host:
                text = client.blocking_key_value_get(f"{key}/{other}", _SECONDS * 1000)
                theirs = np.frombuffer(base64.b64decode(text), "<i8").reshape(lengths.shape)
                greatest = np.maximum(greatest, theirs)
        # A host that has said this window's lengths has heard those of the window before.
        if len(said) > 2:
            client.key_value_delete(said.pop(0))
        return greatest

    return exchange
