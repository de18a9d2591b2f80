"""The optimiser and its schedule, composed from optax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Float32

from scfm_jax.training.config import OptimiserConfig

# Muon's updates get the root mean square that AdamW's have, so that one learning rate suits both (Liu et al.,
# "Muon is Scalable for LLM Training", 2025).
MUON_RMS = 0.2

_BLOCK = 1_024  # learning rates that are computed together


def learning_rate(config: OptimiserConfig) -> optax.Schedule:
    """The learning rate of each step; see `OptimiserConfig.schedule`."""
    steps = max(config.schedule_steps or config.steps, 1)
    if config.schedule == "product":
        warmup, cosine = config.warmup_steps, optax.cosine_decay_schedule(config.peak_rate, steps)

        def rate(step: jax.typing.ArrayLike) -> jax.Array:
            rising = jnp.minimum(jnp.asarray(step) / max(warmup, 1), 1.0)
            return jnp.maximum(cosine(step) * rising, config.final_rate)

        return rate
    return optax.warmup_cosine_decay_schedule(
        init_value=config.initial_rate,
        peak_value=config.peak_rate,
        warmup_steps=min(config.warmup_steps, steps - 1),
        decay_steps=steps,
        end_value=config.final_rate,
    )


def rates_of(config: OptimiserConfig) -> Callable[[int], np.float32]:
    """The learning rate of a step, counted from 0, on the host: many are computed at once."""
    schedule = jax.jit(jax.vmap(learning_rate(config)))

    @functools.lru_cache(maxsize=2)
    def of_block(number: int) -> Float32[np.ndarray, " steps"]:
        return np.asarray(schedule(np.arange(number * _BLOCK, (number + 1) * _BLOCK)), np.float32)

    return lambda step: of_block(step // _BLOCK)[step % _BLOCK]


def make_optimiser(
    config: OptimiserConfig, names: Any, rate: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """AdamW or Muon, after clipping by the global norm.

    Parameters
    ----------
    names
        Tree of logical names: a parameter with two named axes or more, layers aside, is a matrix.
        Muon takes the matrices that have a named axis, each stacked layer's on its own, and leaves the gene
        table, biases and norms to Nadam without decay.
    rate
        The learning rate of each step; that of `config` if not given.
    """

    def of_each(rule: Callable[[tuple[str | None, ...]], Any]) -> Any:
        return jax.tree.map(rule, names, is_leaf=lambda node: isinstance(node, tuple))

    rate = rate or learning_rate(config)
    decays = of_each(lambda logical: config.decay == "all" or len(_own_axes(logical)) >= 2)
    if config.name == "adamw":
        method = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decays,
        )
    else:
        method = optax.contrib.muon(
            rate,
            beta=config.b2,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=of_each(_matrix_axes),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), method)


def _own_axes(logical: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Names of a parameter's axes, without that of stacked layers."""
    return logical[1:] if logical[:1] == ("layers",) else logical


def _matrix_axes(logical: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Rows and columns of what Muon takes; None leaves it to AdamW."""
    axes = _own_axes(logical)
    if len(axes) != 2 or "vocabulary" in axes or axes == (None, None):
        return None
    return optax.contrib.MuonDimensionNumbers(len(logical) - 2, len(logical) - 1)
