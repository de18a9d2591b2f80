"""The model card that goes with exported weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scfm_jax import __version__
from scfm_jax.genes import Vocabulary
from scfm_jax.models.functional import Parameters, count_parameters, parameters_hash
from scfm_jax.training.metrics import read_metrics
from scfm_jax.training.run import read_run


def model_card(run: Path, parameters: Parameters, step: int, n_genes: int, licence: str) -> str:
    """Markdown with the front matter that Hugging Face reads.

    Parameters
    ----------
    run
        The run directory.
    parameters, step
        What is exported, and the training step that it is from.
    n_genes
        Genes of the vocabulary.
    licence
        An SPDX identifier, or "unknown".
    """
    config, corpus_hash = read_run(run)
    genes = run / "vocabulary.json"
    genes_hash = Vocabulary.read(genes).hash if genes.is_file() else "not known"
    rows_of_step = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] == step]
    metrics = {
        name: value for row in rows_of_step for name, value in row.items() if name.startswith("held_out")
    }
    objective, data, split = config.objective, config.data, config.split
    rows: list[tuple[str, Any]] = [
        ("Model", f"{config.name}, {count_parameters(parameters):,} parameters, step {step:,}"),
        ("Weights", f"SHA-256 {parameters_hash(parameters)}"),
        ("Vocabulary", f"{n_genes:,} genes, hash {genes_hash}"),
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
