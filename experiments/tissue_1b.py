"""A tissue model of a billion parameters, for 64 chips of TPU v5p or as many H100s; all of it is ours.

The geometry goes by what the hardware multiplies well and by what the task asks:

- Heads of 128 features, the side of a TPU's matrix unit; the published 64 would leave half of it idle in
  attention, which is over a quarter of the FLOPs at 5,000 tokens.
- The encoder is 2,048 wide, 16 heads: kernels large enough that products and not memory set the pace, and 16
  divides by every tensor axis worth having. 18 layers keep the ratio of width to depth near 110, in the broad
  optimum that language models of this size have (Kaplan et al. 2020).
- SwiGLU of 5,632: 8/3 of the width, rounded up to a multiple of 512, so that a tensor axis of 4 still leaves
  each chip a multiple of 128.
- The decoder sees one cell's panel and not a neighbourhood: half the width and 4 layers, a twentieth of the
  weights (the published asymmetry, 12 layers to 4, goes on).

What is 2,048 or 1,024 wide divides by 8, 64 and 512 shards alike, so that fsdp can grow with the pod.
"""

from dataclasses import replace

from experiments import tissue_real
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.config import MeshConfig, OptimiserConfig, RunConfig


def recipe() -> RunConfig:
    real = tissue_real.recipe()
    model, _, _ = real.tissue()
    return replace(
        real,
        name="tissue_1b",
        model=replace(
            model,
            encoder=TransformerConfig(layers=18, heads=16, width=2_048, hidden=5_632),
            decoder=TransformerConfig(layers=4, heads=8, width=1_024, hidden=2_816),
            dtype="bfloat16",
            remat="dots",
        ),
        data=DataConfig(
            sample=SampleConfig(neighbours=32, decoder="panel"),
            # 5,000 tokens a sample: 2.6 million a step.
            batch_size=512,
            # Up to 128 hosts of a pod, each with streams of its own.
            virtual_shards=128,
            length_multiple=128,
        ),
        optimiser=OptimiserConfig(
            name="adamw",
            steps=150_000,
            initial_rate=1e-6,
            # Below the 60M model's 2e-4, as widths grew by four; not tuned.
            peak_rate=1e-4,
            final_rate=1e-5,
            warmup_steps=5_000,
            weight_decay=0.1,
        ),
        # 15 GiB of state over 8 chips: one host of GPUs, or a face of the torus.
        mesh=MeshConfig(fsdp=8),
        evaluate_every=5_000,
        evaluate_cells=16_384,
        checkpoint_every=1_000,
    )
