"""The model card that goes with exported weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from scfm_jax import __version__
from scfm_jax.errors import InputError
from scfm_jax.export.family import Family
from scfm_jax.genes import Vocabulary
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.training.config import RunConfig
from scfm_jax.training.metrics import read_metrics
from scfm_jax.training.run import read_run


def model_card(
    run: Path, step: int, n_genes: int, licence: str, exported: int, digest: str, family: Family
) -> str:
    """Markdown with the front matter that Hugging Face reads.

    Parameters
    ----------
    run
        The run directory.
    step
        The training step of what is exported.
    n_genes
        Genes of the vocabulary.
    licence
        An SPDX identifier, or "unknown".
    exported, digest
        Number of the parameters that are exported, and their SHA-256.
    family
        Of the model.

    Raises
    ------
    InputError
        A licence that is no identifier.
    """
    if not re.fullmatch(r"[A-Za-z0-9.+-]+", licence):
        raise InputError(licence, "is no licence's identifier (licence)", "give one of SPDX, as apache-2.0")
    config, corpus_hash = read_run(run)
    genes = run / "vocabulary.json"
    genes_hash = Vocabulary.read(genes).hash if genes.is_file() else "not known"
    rows_of_step = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] == step]
    metrics = {
        name: value for row in rows_of_step for name, value in row.items() if name.startswith("held_out")
    }
    rows: list[tuple[str, Any]] = [
        ("Parameters", f"{exported:,}, SHA-256 {digest}"),
        ("Vocabulary", f"{n_genes:,} genes, hash {genes_hash}"),
        *_model_rows(config),
    ]
    if corpus_hash:
        split = config.split
        held_out = ", ".join(split.held_out) or f"fold {split.fold} of {split.n_folds}, blocks with margin"
        rows += [
            ("Trained on", f"corpus {config.corpus}, hash {corpus_hash}, to step {step:,}"),
            ("Started from", config.initial_weights or "the seed"),
            ("Technologies", ", ".join(config.technologies) or "all"),
            ("Held out", held_out),
            *_training_rows(config),
        ]
    else:
        rows.append(("Trained on", "imported weights: what they were trained on is not known here"))
    rows.append(("Made with", f"scfm_jax {__version__}"))
    lines = [
        "---",
        f"license: {licence}",
        "library_name: scfm_jax",
        "tags: [single-cell, spatial-transcriptomics]",
        "---",
        "",
        f"# {config.name if corpus_hash else f'{family.title}, imported'}",
        "",
        family.summary,
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


def _model_rows(config: RunConfig) -> list[tuple[str, Any]]:
    if isinstance(config.model, NicheformerConfig):
        return [("Model", f"{vars(config.model)}")]
    model, _, _ = config.tissue()
    return [("Encoder", f"{vars(model.encoder)}")]


def _training_rows(config: RunConfig) -> list[tuple[str, Any]]:
    if isinstance(config.model, NicheformerConfig):
        _, sentence, masked = config.nicheformer()
        return [
            ("Sentence", f"{vars(sentence)}"),
            ("Sampling weights", ", ".join(config.data.weights) or "by number of cells"),
            ("Masked", f"{masked.rate:.0%} of the genes of a sentence"),
        ]
    model, sample, objective = config.tissue()
    return [
        ("Neighbours", sample.neighbours),
        (
            "Masked",
            f"{objective.nonzero_rate:.0%} of non-zeros, {objective.zero_rate:.0%} of zeros, by column",
        ),
        ("Normalisation", f"{objective.normalise}, target sum {objective.target_sum}"),
        ("Loss", objective.loss),
        ("Decoder in training", f"{vars(model.decoder)}"),
    ]
