"""A Nicheformer of a billion parameters, for 64 chips of TPU v5p or as many H100s; all of it is ours.

- Heads of 128 features, the side of a TPU's matrix unit: the published 32 would leave three quarters of it
  idle in attention.
- 2,048 wide, 16 heads, 18 layers: as ``tissue_1b``, and for its reasons. The block stays the published one,
  post-norm, which grows hard to train with depth: one more reason for width, for a long warm-up and for a
  rate below the published 7e-4.
- Feed-forward of 4 times the width where the published one has twice: ReLU has no gate, and at this width the
  two larger products are the cheapest weights to have.
- Sentences of 1,536 tokens, the published 1,500 rounded up to whole tiles: padding would cost the same.
"""

from dataclasses import replace

from experiments import nicheformer_49m
from scfm_jax.training.config import MeshConfig, RunConfig


def recipe() -> RunConfig:
    published = nicheformer_49m.recipe()
    model, sample, _ = published.nicheformer()
    return replace(
        published,
        name="nicheformer_1b",
        model=replace(model, layers=18, heads=16, width=2_048, hidden=8_192, positions=1_536),
        data=replace(
            published.data,
            sample=replace(sample, length=1_536),
            # 3.1 million tokens a step.
            batch_size=2_048,
            # Up to 128 hosts of a pod, each with streams of its own.
            virtual_shards=128,
        ),
        optimiser=replace(
            published.optimiser,
            steps=150_000,
            schedule_steps=0,
            schedule="warmup_cosine",
            initial_rate=1e-6,
            # Not tuned.
            peak_rate=1e-4,
            final_rate=1e-5,
            warmup_steps=10_000,
            b2=0.95,
            decay="matrices",
        ),
        # 15 GiB of state over 8 chips: one host of GPUs, or a face of the torus.
        mesh=MeshConfig(fsdp=8),
        checkpoint_every=1_000,
    )
