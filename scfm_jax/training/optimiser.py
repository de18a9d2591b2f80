"""The optimiser and its schedule, composed from optax."""

from __future__ import annotations

from typing import Any

import jax
import optax

from scfm_jax.training.config import OptimiserConfig


def learning_rate(config: OptimiserConfig) -> optax.Schedule:
    """Linear from the initial to the peak rate, then a cosine to the final one."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.initial_rate,
        peak_value=config.peak_rate,
        warmup_steps=min(config.warmup_steps, max(config.steps - 1, 0)),
        decay_steps=max(config.steps, 1),
        end_value=config.final_rate,
    )


def make_optimiser(config: OptimiserConfig, names: Any) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm.

    Parameters
    ----------
    names
        Tree of logical names: a parameter with two named axes or more, layers aside, is a matrix and decays.
    """
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731
    decays = jax.tree.map(
        lambda logical: sum(name != "layers" for name in logical) >= 2, names, is_leaf=is_names
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )
