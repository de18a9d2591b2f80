"""A pre-norm transformer whose layers are stacked and scanned: compile time does not grow with depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from scfm_jax.errors import check_least
from scfm_jax.models.attention import AttentionName, attention
from scfm_jax.models.linear import make_linear
from scfm_jax.models.rotary import rotary_tables, rotate
from scfm_jax.models.sharding import constrain
from scfm_jax.models.stack import StackConfig, scan_layers, stacked

RotaryTables = tuple[Float[Array, "b s 1 d"], Float[Array, "b s 1 d"]]


@dataclass(frozen=True)
class TransformerConfig:
    """Geometry of a stack.

    Attributes
    ----------
    layers, heads, width
        Depth, attention heads, features of a token.
    hidden
        Features inside the SwiGLU feed-forward; None is 8/3 of the width, rounded up to a multiple of 8.
    norm
        ``rms`` or ``layer``, each with `norm_epsilon`.
    use_bias
        Whether projections have biases.
    """

    layers: int
    heads: int
    width: int
    hidden: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-5
    use_bias: bool = True

    def __post_init__(self) -> None:
        check_least(self, 1, "layers", "heads", "width")
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 4 x heads ({self.heads}): rotary positions "
                "split each head in four"
            )

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def feed_forward(self) -> int:
        return self.hidden or -(-8 * self.width // 24) * 8


def make_norm(config: TransformerConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """The norm that `config` names, over its width."""
    width, epsilon, names = config.width, config.norm_epsilon, {"logical": ("embed",)}
    if config.norm == "rms":
        return nnx.RMSNorm(width, epsilon=epsilon, dtype=dtype, scale_metadata=names, rngs=rngs)
    return nnx.LayerNorm(
        width, epsilon=epsilon, dtype=dtype, scale_metadata=names, bias_metadata=names, rngs=rngs
    )


class Block(nnx.Module):
    """One layer: norm, rotary self-attention, residual; norm, SwiGLU, residual."""

    def __init__(
        self, config: TransformerConfig, *, init_std: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        def linear(inputs: int, outputs: int, *names: str) -> nnx.Linear:
            return make_linear(
                inputs,
                outputs,
                (names[0], names[1]),
                use_bias=config.use_bias,
                init_std=init_std,
                dtype=dtype,
                rngs=rngs,
            )

        width, hidden = config.width, config.feed_forward
        self.heads = config.heads
        self.attention_norm = make_norm(config, dtype, rngs)
        self.query = linear(width, width, "embed", "heads")
        self.key = linear(width, width, "embed", "heads")
        self.value = linear(width, width, "embed", "heads")
        self.output = linear(width, width, "heads", "embed")
        self.feed_forward_norm = make_norm(config, dtype, rngs)
        self.gate = linear(width, hidden, "embed", "mlp")
        self.up = linear(width, hidden, "embed", "mlp")
        self.down = linear(hidden, width, "mlp", "embed")

    def __call__(
        self,
        x: Float[Array, "b s d"],
        tables: RotaryTables,
        lengths: Int[Array, " b"],
        implementation: AttentionName,
        attend_padding: bool = False,
    ) -> Float[Array, "b s d"]:
        def heads(y: Float[Array, "bs d"]) -> Float[Array, "b s h e"]:
            return y.reshape(*x.shape[:2], self.heads, -1)

        # Projections see tokens in one axis: on a CPU the gradient of a weight over two axes costs twice the
        # time.
        y = self.attention_norm(x).reshape(-1, x.shape[-1])
        query, key = (rotate(heads(project(y)), tables) for project in (self.query, self.key))
        if attend_padding:
            real = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None, None]
            query, key = jnp.where(real, query, 0), jnp.where(real, key, 0)
            lengths = jnp.full_like(lengths, x.shape[1])
        mixed = attention(query, key, heads(self.value(y)), lengths, implementation=implementation)
        x = x + self.output(mixed.reshape(y.shape)).reshape(x.shape)
        y = self.feed_forward_norm(x).reshape(y.shape)
        inner = constrain(jax.nn.silu(self.gate(y)) * self.up(y), "batch", "mlp")
        return x + self.down(inner).reshape(x.shape)


class Transformer(nnx.Module):
    """A stack of `Block` and a final norm.

    Parameters
    ----------
    config
        Geometry.
    compute
        How the layers are computed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        init_std: float,
        compute: StackConfig,
        rngs: nnx.Rngs,
    ) -> None:
        self.head_size, self.compute, dtype = config.head_size, compute, compute.dtype
        self.blocks = stacked(
            config.layers, lambda rngs: Block(config, init_std=init_std, dtype=dtype, rngs=rngs), rngs
        )
        self.norm = make_norm(config, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        positions: Float[Array, "b s 2"],
        lengths: Int[Array, " b"],
        *,
        implementation: AttentionName,
        attend_padding: bool = False,
    ) -> Float[Array, "b s d"]:
        """Hidden states of right-padded rows; what stands at the padding is undefined.

        With `attend_padding`, padding is seen: as keys of logit 0.
        """
        x, _ = self.layers(
            x, positions, lengths, implementation=implementation, attend_padding=attend_padding
        )
        return self.norm(x)

    def layers(
        self,
        x: Float[Array, "b s d"],
        positions: Float[Array, "b s 2"],
        lengths: Int[Array, " b"],
        *,
        implementation: AttentionName,
        attend_padding: bool = False,
        keep: bool = False,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "l b s d"] | None]:
        """The last layer's output before the final norm, and with `keep` the output of every layer."""
        tables = rotary_tables(positions, self.head_size)
        return scan_layers(
            self.blocks,
            lambda block, x: block(x, tables, lengths, implementation, attend_padding),
            x,
            config=self.compute,
            keep=keep,
        )
