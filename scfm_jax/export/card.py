"""The model card that goes with exported weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scfm_jax import __version__
from scfm_jax.training.config import RunConfig


def model_card(
    config: RunConfig,
    *,
    parameters: int,
    step: int,
    weights_hash: str,
    vocabulary: tuple[int, str],
    corpus_hash: str,
    metrics: Mapping[str, float],
    licence: str,
) -> str:
    """Markdown with the front matter that Hugging Face reads.

    Parameters
    ----------
    config
        Of the run.
    parameters, step, weights_hash
        Number of parameters, training step and SHA-256 of the weights.
    vocabulary
        Number of genes, and the hash of their list ("" where it is not known).
    corpus_hash
        Of what it was trained on; "" for weights that were imported and not trained further.
    metrics
        Held-out figures of that step.
    licence
        An SPDX identifier, or "unknown".
    """
    n_genes, genes_hash = vocabulary
    objective, data, split = config.objective, config.data, config.split
    rows: list[tuple[str, Any]] = [
        ("Model", f"{config.name}, {parameters:,} parameters, step {step:,}"),
        ("Weights", f"SHA-256 {weights_hash}"),
        ("Vocabulary", f"{n_genes:,} genes, hash {genes_hash or 'not known'}"),
        ("Trained on", f"corpus {config.corpus}, hash {corpus_hash}" if corpus_hash else "imported weights"),
        ("Technologies", ", ".join(config.technologies) or "all"),
        (
            "Held out",
            ", ".join(split.held_out) or f"fold {split.fold} of {split.n_folds}, blocks with margin",
        ),
        ("Neighbours", data.sample.neighbours),
        (
            "Masked",
            f"{objective.nonzero_rate:.0%} of non-zeros, {objective.zero_rate:.0%} of zeros, by column",
        ),
        ("Normalisation", f"{objective.normalise}, target sum {objective.target_sum}"),
        ("Loss", objective.loss),
        ("Encoder", f"{vars(config.model.encoder)}"),
        ("Decoder", f"{vars(config.model.decoder)}"),
        ("Made with", f"scfm_jax {__version__}"),
    ]
    lines = [
        "---",
        f"license: {licence}",
        "library_name: scfm_jax",
        "tags: [single-cell, spatial-transcriptomics]",
        "---",
        "",
        f"# {config.name}",
        "",
        "A cell and its spatial neighbours, pretrained by column masking (AIDO.Tissue).",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "## Held-out figures",
        "",
        *([f"- {name}: {value:.4f}" for name, value in metrics.items()] or ["None were measured."]),
        "",
    ]
    return "\n".join(lines)
