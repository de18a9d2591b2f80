"""The training step and its state: what is jitted, and where every part of it lies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import UInt32

from scfm_jax.models.functional import Parameters, abstract, initialise
from scfm_jax.models.sharding import split_by
from scfm_jax.training.checkpoint import abstract_state
from scfm_jax.training.config import OptimiserConfig, RunConfig
from scfm_jax.training.mesh import (
    activation_split,
    batch_sharding,
    check_batch,
    parameter_shardings,
    replicated,
)
from scfm_jax.training.optimiser import make_optimiser, rates_of
from scfm_jax.training.task import Learning

State: TypeAlias = dict[str, Any]
Given: TypeAlias = dict[str, Any]
Words: TypeAlias = UInt32[ArrayLike, "2"]

# Fields of the optimiser that a step is given as a rate.
_GIVEN: dict[str, Any] = {
    "steps": 1,
    "schedule_steps": 0,
    "schedule": "warmup_cosine",
    "initial_rate": 0.0,
    "peak_rate": 0.0,
    "final_rate": 0.0,
    "warmup_steps": 0,
}


@dataclass(frozen=True)
class Program:
    """What is compiled of a run: the very functions that `train` runs.

    Attributes
    ----------
    shapes
        Parameters as shapes.
    like
        The state as shapes, dtypes and shardings.
    fresh
        () to the state of step 0.
    given
        What the step after so many is given beside the batch: the learning rate and the run's key. They are
        arguments, so that runs of equal shape share a compilation, whatever their seed and schedule.
    step
        (state, batch, given) to (state, sums); the state is donated.
    evaluate
        (parameters, batch, key) to sums.
    key
        The two words of the run's key.
    """

    shapes: Parameters
    like: State
    fresh: Callable[[], State]
    given: Callable[[int], Given]
    step: Any
    evaluate: Any
    key: Words


def make_program(config: RunConfig, mesh: Mesh, learning: Learning) -> Program:
    """Bind a run's model, objective and optimiser to a mesh; no corpus is needed for it.

    Runs that compute the same, but for seed and schedule, share one program: in a process, what is compiled
    of the first serves all.
    """
    check_batch(config, mesh)
    own = Learning(learning.build, learning.loss, learning.drawn)
    shared = _functions(own, replace(config.optimiser, **_GIVEN), mesh)
    # NumPy's, which every host has alike.
    key, rates = np.asarray(jax.random.key_data(jax.random.key(config.seed))), rates_of(config.optimiser)
    return Program(
        shapes=shared.shapes,
        like=shared.like,
        fresh=lambda: shared.fresh(key),
        given=lambda step: {"rate": rates(step), "key": key},
        step=shared.step,
        evaluate=shared.evaluate,
        key=key,
    )


@dataclass(frozen=True)
class _Functions:
    """What of a program does not depend on seed and schedule; see `Program`."""

    shapes: Parameters
    like: State
    fresh: Callable[[Words], State]
    step: Any
    evaluate: Any


@functools.lru_cache(maxsize=8)
def _functions(learning: Learning, config: OptimiserConfig, mesh: Mesh) -> _Functions:
    graph, shapes, names = abstract(learning.build)
    optimiser = make_optimiser(config, names, rate=lambda step: 1.0)
    shardings = state_shardings(mesh, optimiser, shapes, names)
    split = activation_split(mesh)

    def loss(parameters: Parameters, batch: Any, key: Words) -> dict[str, jax.Array]:
        with split_by(split):
            return learning.loss(
                nnx.merge(graph, parameters), batch, jax.random.wrap_key_data(jnp.asarray(key))
            )

    fresh = jax.jit(
        lambda key: fresh_state(learning, optimiser, jax.random.wrap_key_data(key)), out_shardings=shardings
    )
    key = jax.ShapeDtypeStruct((2,), np.uint32)
    return _Functions(
        shapes=shapes,
        like=abstract_state(jax.eval_shape(fresh, key), shardings),
        fresh=fresh,
        step=jax.jit(
            make_step(loss, learning.drawn, optimiser, config.accumulation, shardings),
            in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
        ),
        evaluate=jax.jit(
            loss,
            in_shardings=(shardings["parameters"], batch_sharding(mesh), replicated(mesh)),
            out_shardings=replicated(mesh),
        ),
    )


def make_step(
    loss: Callable[[Parameters, Any, Words], dict[str, jax.Array]],
    drawn: Callable[[jax.Array], jax.Array],
    optimiser: optax.GradientTransformation,
    parts: int,
    shardings: State,
) -> Callable[[State, Any, Given], tuple[State, dict[str, jax.Array]]]:
    """The pure training step (state, batch, given) -> (state, sums).

    The gradient is that of ``sum of losses / sum of weights`` over the global batch. Microbatches (`parts` a
    step) add up both sums, so that accumulation changes the memory and nothing else. Gradients lie where
    their parameters do. `optimiser` is one of rate 1: all of its updates are proportional to the rate.
    """

    def summed(parameters: Any, batch: Any, key: Words) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = loss(parameters, batch, key)
        return sums["loss"], sums

    def gradient(parameters: Any, batch: Any, key: Words) -> tuple[Any, dict[str, jax.Array]]:
        (_, sums), gradients = jax.value_and_grad(summed, has_aux=True)(parameters, batch, key)
        return jax.lax.with_sharding_constraint(gradients, shardings["parameters"]), sums

    def step(state: State, batch: Any, given: Given) -> tuple[State, dict[str, jax.Array]]:
        parameters, key = state["parameters"], given["key"]
        if parts == 1:
            gradients, sums = gradient(parameters, batch, key)
        else:
            # Strided, so that each device keeps the rows that it has.
            micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                jax.eval_shape(gradient, parameters, jax.tree.map(lambda x: x[0], micro), key),
            )
            (gradients, sums), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, gradient(parameters, part, key)), None),
                zeros,
                micro,
            )
        gradients = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1e-9), gradients)
        updates, moments = optimiser.update(gradients, state["optimiser"], parameters)
        new = {
            "parameters": optax.apply_updates(parameters, optax.tree.scale(given["rate"], updates)),
            "optimiser": moments,
            "step": state["step"] + 1,
        }
        return new, {
            **sums,
            "gradient_norm": optax.tree.norm(gradients),
            "drawn": drawn(batch.index),
        }

    return step


def fresh_state(learning: Learning, optimiser: optax.GradientTransformation, key: jax.Array) -> State:
    """Parameters from the seed, moments at zero."""
    parameters = initialise(learning.build, key)
    return {
        "parameters": parameters,
        "optimiser": optimiser.init(parameters),
        "step": jnp.zeros((), jnp.int32),
    }


def state_shardings(mesh: Any, optimiser: optax.GradientTransformation, shapes: Any, names: Any) -> State:
    """Where the state lies: moments beside their parameters, scalars everywhere."""
    places = parameter_shardings(mesh, shapes, names)
    of_parameter = dict(jax.tree.leaves_with_path(places))

    def of_moment(path: tuple[Any, ...], leaf: Any) -> Any:
        """A moment's path ends with its parameter's."""
        ends = (path[start:] for start in range(len(path)))
        return next((of_parameter[end] for end in ends if end in of_parameter), replicated(mesh))

    moments = jax.tree.map_with_path(of_moment, jax.eval_shape(optimiser.init, shapes))
    return {"parameters": places, "optimiser": moments, "step": replicated(mesh)}
