"""What is compiled is let go before the kernel refuses more memory maps."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import pytest

from scfm_jax.compilations import release_compilations


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_programs_are_let_go_near_the_limit_alone() -> None:
    traced = []

    @jax.jit
    def doubled(x: jax.Array) -> jax.Array:
        traced.append(x.shape)
        return 2 * x

    assert doubled(jnp.ones(3)).sum() == 6
    assert not release_compilations(share=1.0)
    assert doubled(jnp.ones(3)).sum() == 6 and traced == [(3,)]
    assert release_compilations(share=0.0)
    assert doubled(jnp.ones(3)).sum() == 6 and traced == [(3,), (3,)]
