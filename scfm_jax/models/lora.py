"""LoRA: low-rank changes of the attention projections, as pure functions of plain parameters.

Follows Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022): a kernel W [in, out]
becomes ``W + alpha / rank * A B`` with A [in, rank] and B [rank, out]. No module knows of it: the sum is
formed once a step, for all layers together, and costs little beside the layers' own products.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from scfm_jax.errors import InputError, check_least
from scfm_jax.models.functional import Parameters

# Parts of either family that hidden states do not depend on: they serve pretraining alone.
_PRETRAINING = ("decoder", "decoder_embed", "decoder_norm", "head", "gene_bias", "log_dispersion")


@dataclass(frozen=True)
class LoraConfig:
    """Which kernels change, and in how many directions.

    Attributes
    ----------
    rank, alpha
        Inner size of a change, and its weight: it counts ``alpha / rank``.
    targets
        Names of the projections.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "key", "value", "output")

    def __post_init__(self) -> None:
        check_least(self, 1, "rank")
        check_least(self, 0, "alpha")


def encoding(parameters: Parameters) -> Parameters:
    """The part of a model's parameters that its hidden states depend on."""
    return {name: part for name, part in parameters.items() if name not in _PRETRAINING}


def init_adapters(parameters: Parameters, config: LoraConfig, key: jax.Array) -> Parameters:
    """Adapters that change nothing yet, for every target that encodes.

    A is normal as in the paper, with the variance of the authors' code, 1 / (3 in); B is zero.

    Parameters
    ----------
    parameters
        Of a model, arrays or shapes; kernels [in, out], or [layers, in, out] where layers are stacked.
    config
        Rank and targets.
    key
        Of the draws of A.

    Returns
    -------
    The tree of `parameters` down to the targets, each with ``a`` [..., in, rank] and ``b`` [..., rank, out],
    float32.

    Raises
    ------
    InputError
        A target that no kernel has.
    """
    kernels = {
        path[:-1]: leaf for path, leaf in flatten_dict(encoding(parameters)).items() if path[-1] == "kernel"
    }
    named = {path[-1] for path in kernels}
    if unknown := [target for target in config.targets if target not in named]:
        raise InputError(
            "lora.targets",
            f"the model has no projection {unknown[0]!r}",
            f"choose from {', '.join(sorted(named))}",
        )
    chosen = {path: kernel for path, kernel in sorted(kernels.items()) if path[-1] in config.targets}
    adapters = {}
    for number, (path, kernel) in enumerate(chosen.items()):
        *layers, inputs, outputs = kernel.shape
        drawn = jax.random.normal(
            jax.random.fold_in(key, number), (*layers, inputs, config.rank), jnp.float32
        )
        adapters[*path, "a"] = drawn / (3 * inputs) ** 0.5
        adapters[*path, "b"] = jnp.zeros((*layers, config.rank, outputs), jnp.float32)
    return unflatten_dict(adapters)


def adapted(parameters: Parameters, adapters: Parameters, config: LoraConfig) -> Parameters:
    """Plain parameters with the adapters' changes in them: to run, and to export.

    The sum is float32. A model that computes in bfloat16 rounds it like any weight.
    """
    flat, factors = flatten_dict(parameters), flatten_dict(adapters)
    for path in {path[:-1] for path in factors}:
        change = jnp.matmul(factors[*path, "a"], factors[*path, "b"], precision="highest")
        flat[*path, "kernel"] = flat[*path, "kernel"] + config.alpha / config.rank * change
    return unflatten_dict(flat)
