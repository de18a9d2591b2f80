"""Nicheformer's published tensors and configuration, name by name, and ours.

The names are those of the Lightning checkpoint; the Hugging Face folder has ``nicheformer.`` in front of all
but the head. Torch keeps query, key and value of a layer in one matrix, outputs first; here they are three,
inputs first, and layers are stacked. The authors' classes hold a layer that they copy the encoder's from and
never run (``encoder_layer``), and the Lightning one two heads without a loss (``pooler_head``, ``cls_head``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from scfm_jax.data.ranks import Context, RankConfig
from scfm_jax.errors import InputError
from scfm_jax.export.family import Family, Form, Shapes, check_fixed
from scfm_jax.genes import Vocabulary
from scfm_jax.models.embeddings import padded_size
from scfm_jax.models.functional import Parameters
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.reserved_tokens import (
    ASSAY_TOKENS,
    CLS,
    FIRST_EXTRA_ASSAY,
    MASK,
    MODALITY_TOKENS,
    PAD,
    RESERVED_TOKENS,
    SPARE_ROWS,
    SPECIES_TOKENS,
)
from scfm_jax.training.config import RunConfig, from_dict

TOKENS, POSITIONS, HEAD = "embeddings.weight", "positional_embedding.weight", "classifier_head"
MODEL_TYPE = "nicheformer"
IMPORTED_BATCH = 16
# Settings of a sentence that no published config holds.
_SENTENCE = ("length", "context", "extra_assays", "means")
CELL_CLASSES = 164  # of a head that the released code makes and does not train
# Ours and the published config's.
_SIZES = {
    "width": "dim_model",
    "heads": "nheads",
    "hidden": "dim_feedforward",
    "layers": "nlayers",
    "positions": "context_length",
    "n_tokens": "n_tokens",
}
_CONTEXT: dict[Context, str] = {"species": "specie", "assay": "assay", "modality": "modality"}
_FIXED = {"batch_first": True, "learnable_pe": True, "autoregressive": False}
_PROJECTIONS = ("query", "key", "value")
_LINEAR = {"output": "self_attn.out_proj", "up": "linear1", "down": "linear2"}
_NORMS = {"attention_norm": "norm1", "feed_forward_norm": "norm2"}
_INPUTS = "self_attn.in_proj"


def from_published(tensors: dict[str, np.ndarray], config: NicheformerConfig, n_genes: int) -> Parameters:
    """Parameters of `Nicheformer`, float32, from tensors by their names without a prefix."""
    wide = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    n_tokens = n_genes + RESERVED_TOKENS
    rows, classes = padded_size(n_tokens + SPARE_ROWS), padded_size(n_tokens)

    def each_layer(name: str) -> np.ndarray:
        return np.stack([wide[f"encoder.layers.{layer}.{name}"] for layer in range(config.layers)])

    blocks: Parameters = {}
    weights, biases = each_layer(f"{_INPUTS}_weight"), each_layer(f"{_INPUTS}_bias")
    for place, name in enumerate(_PROJECTIONS):
        part = slice(place * config.width, (place + 1) * config.width)
        blocks[name] = {"kernel": weights[:, part].swapaxes(1, 2), "bias": biases[:, part]}
    for ours, theirs in _LINEAR.items():
        blocks[ours] = {
            "kernel": each_layer(f"{theirs}.weight").swapaxes(1, 2),
            "bias": each_layer(f"{theirs}.bias"),
        }
    for ours, theirs in _NORMS.items():
        blocks[ours] = {"scale": each_layer(f"{theirs}.weight"), "bias": each_layer(f"{theirs}.bias")}
    return {
        "token_embedding": {"table": _padded(wide[TOKENS], rows)},
        "position_embedding": wide[POSITIONS],
        "blocks": blocks,
        "head": {
            "kernel": _padded(wide[f"{HEAD}.weight"], classes).T,
            "bias": _padded(wide[f"{HEAD}.bias"], classes),
        },
    }


def to_published(parameters: Parameters, config: NicheformerConfig, n_genes: int) -> dict[str, np.ndarray]:
    """Float32 tensors by their published names: the inverse of `from_published`."""
    n_tokens = n_genes + RESERVED_TOKENS
    head = {name: np.asarray(leaf) for name, leaf in parameters["head"].items()}
    tensors = {
        TOKENS: np.asarray(parameters["token_embedding"]["table"])[: n_tokens + SPARE_ROWS],
        POSITIONS: np.asarray(parameters["position_embedding"]),
        f"{HEAD}.weight": np.ascontiguousarray(head["kernel"].T[:n_tokens]),
        f"{HEAD}.bias": head["bias"][:n_tokens],
    }
    blocks = parameters["blocks"]
    for layer in range(config.layers):
        start = f"encoder.layers.{layer}."

        def own(name: str, part: str, layer: int = layer) -> np.ndarray:
            leaf = np.asarray(blocks[name][part])[layer]
            return np.ascontiguousarray(leaf.T if part == "kernel" else leaf)

        tensors[f"{start}{_INPUTS}_weight"] = np.concatenate([own(name, "kernel") for name in _PROJECTIONS])
        tensors[f"{start}{_INPUTS}_bias"] = np.concatenate([own(name, "bias") for name in _PROJECTIONS])
        for ours, theirs in _LINEAR.items():
            tensors[f"{start}{theirs}.weight"] = own(ours, "kernel")
            tensors[f"{start}{theirs}.bias"] = own(ours, "bias")
        for ours, theirs in _NORMS.items():
            tensors[f"{start}{theirs}.weight"] = own(ours, "scale")
            tensors[f"{start}{theirs}.bias"] = own(ours, "bias")
    return tensors


def published_shapes(config: NicheformerConfig, n_genes: int) -> Shapes:
    """Shape of every published tensor that the model uses."""
    n_tokens = n_genes + RESERVED_TOKENS
    shapes: Shapes = {
        TOKENS: (n_tokens + SPARE_ROWS, config.width),
        POSITIONS: (config.positions, config.width),
        f"{HEAD}.weight": (n_tokens, config.width),
        f"{HEAD}.bias": (n_tokens,),
    }
    for layer in range(config.layers):
        shapes |= _layer_shapes(config, f"encoder.layers.{layer}.")
    return shapes


def _layer_shapes(config: NicheformerConfig, start: str) -> Shapes:
    width, hidden = config.width, config.hidden
    shapes: Shapes = {
        f"{start}{_INPUTS}_weight": (len(_PROJECTIONS) * width, width),
        f"{start}{_INPUTS}_bias": (len(_PROJECTIONS) * width,),
    }
    for name, (outputs, inputs) in {
        "self_attn.out_proj": (width, width),
        "linear1": (hidden, width),
        "linear2": (width, hidden),
    }.items():
        shapes[f"{start}{name}.weight"], shapes[f"{start}{name}.bias"] = (outputs, inputs), (outputs,)
    for name in _NORMS.values():
        shapes[f"{start}{name}.weight"] = shapes[f"{start}{name}.bias"] = (width,)
    return shapes


def _unused(run: RunConfig, form: Form) -> Shapes:
    config, _, _ = run.nicheformer()
    heads: Shapes = {
        "pooler_head.weight": (config.width, config.width),
        "pooler_head.bias": (config.width,),
        "cls_head.weight": (CELL_CLASSES, config.width),
        "cls_head.bias": (CELL_CLASSES,),
    }
    return _layer_shapes(config, "encoder_layer.") | (heads if form == "lightning" else {})


def _configure(content: dict[str, Any], recipe: RunConfig, where: str) -> tuple[RunConfig, int]:
    model, sample, _ = recipe.nicheformer()
    check_fixed(content, _FIXED, where)
    sizes: dict[str, Any] = {ours: _size(content, field, where) for ours, field in _SIZES.items()}
    n_genes = sizes.pop("n_tokens") - RESERVED_TOKENS
    if n_genes < 1:
        raise InputError(where, "the field 'n_tokens' leaves no gene", "give the published config")
    for field in _CONTEXT.values():
        if not isinstance(content.get(field, True), bool):
            raise InputError(where, f"the field {field!r} is {content[field]!r}", "give true or false")
    # The Lightning class leaves a context token out where it is not asked for, the other takes them all.
    taken = "model_type" in content
    context = tuple(ours for ours, field in _CONTEXT.items() if content.get(field, taken))
    try:
        # As the release computes: float32, in batches that a laptop holds.
        model = replace(
            model, **sizes, niche=False, norm_epsilon=1e-12, dtype="float32", attention="auto", remat="none"
        )
        sample = replace(
            sample,
            length=model.positions,
            context=context,
            means="published",
            mean_files=(),
            niche_neighbours=0,
        )
        data = replace(recipe.data, sample=sample, batch_size=IMPORTED_BATCH, virtual_shards=1)
        optimiser = replace(recipe.optimiser, accumulation=1)
    except ValueError as error:
        raise InputError(where, str(error), "give the published config") from error
    return replace(recipe, model=model, data=data, optimiser=optimiser), n_genes


def own_settings(run: RunConfig) -> dict[str, Any]:
    """How cells became sentences: what an import of an exported model needs beside the published config."""
    _, sample, _ = run.nicheformer()
    settings = asdict(sample)
    return {"sample": {name: settings[name] for name in _SENTENCE}}


def with_own_settings(run: RunConfig, own: dict[str, Any], where: str) -> RunConfig:
    """The inverse of `own_settings`.

    Raises
    ------
    InputError
        Settings that this version does not know.
    """
    _, sample, _ = run.nicheformer()
    said = own.get("sample")
    if not isinstance(said, dict) or set(said) - set(_SENTENCE):
        raise InputError(where, "holds no sample of this version", "export the run again, or remove the file")
    sample = from_dict(RankConfig, asdict(sample) | said, where, "sample.")
    return replace(run, data=replace(run.data, sample=sample))


def with_vocab(run: RunConfig, vocab: Mapping[str, Any], where: str) -> RunConfig:
    """The run with the extra assays of a ``vocab.json``, whose reserved tokens must be ours.

    Raises
    ------
    InputError
        A reserved token with another number than here.
    """
    _, sample, _ = run.nicheformer()
    known = published_vocab(Vocabulary((), (), ()), replace(sample, extra_assays=()))
    for name, token in vocab.items():
        if known.get(name, token) != token:
            raise InputError(
                where, f"gives {name} the token {token!r}, not {known[name]}", "give the published vocab.json"
            )
    extra = {token: name for name, token in vocab.items() if name.startswith("[TECH_") and name not in known}
    numbers = range(FIRST_EXTRA_ASSAY, FIRST_EXTRA_ASSAY + len(extra))
    if sample.extra_assays or sorted(extra) != list(numbers):
        return run  # named by the run's own settings, or other names of published assays
    names = tuple(extra[token].removeprefix("[TECH_").removesuffix("]") for token in numbers)
    return replace(run, data=replace(run.data, sample=replace(sample, extra_assays=names)))


def _size(content: dict[str, Any], field: str, where: str) -> int:
    value = content.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        said = f"the field {field!r} is {value!r}" if field in content else f"lacks the field {field!r}"
        raise InputError(where, said, "give the published config")
    return value


def _published_config(run: RunConfig, n_genes: int, form: Form) -> dict[str, Any]:
    model, sample, objective = run.nicheformer()
    content = {
        **{field: getattr(model, ours) for ours, field in _SIZES.items() if ours != "n_tokens"},
        "n_tokens": n_genes + RESERVED_TOKENS,
        "dropout": 0.0,
        "batch_first": True,
        "masking_p": objective.rate,
        "learnable_pe": True,
        "cls_classes": CELL_CLASSES,
        "supervised_task": None,
        **{field: ours in sample.context for ours, field in _CONTEXT.items()},
    }
    if form == "lightning":
        optimiser = run.optimiser
        return content | {
            "lr": optimiser.peak_rate,
            "warmup": optimiser.warmup_steps,
            "batch_size": run.data.batch_size,
            "max_epochs": optimiser.schedule_steps or optimiser.steps,
            "contrastive": False,
        }
    return content | {
        "model_type": MODEL_TYPE,
        "architectures": ["NicheformerForMaskedLM"],
        "torch_dtype": "float32",
    }


def published_vocab(vocabulary: Vocabulary, sample: RankConfig) -> dict[str, int]:
    """``vocab.json``: from the name of a token to its number, the genes last."""
    extra = {name: FIRST_EXTRA_ASSAY + n for n, name in enumerate(sample.extra_assays)}
    kinds = (("MODALITY", MODALITY_TOKENS), ("SPECIES", SPECIES_TOKENS), ("TECH", {**ASSAY_TOKENS, **extra}))
    return {
        "[PAD]": PAD,
        "[MASK]": MASK,
        "[CLS]": CLS,
        **{
            f"[{kind}_{name.lower().replace(' ', '_').replace(chr(39), '_')}]": token
            for kind, table in kinds
            for name, token in table.items()
        },
        **{gene: RESERVED_TOKENS + index for index, gene in enumerate(vocabulary.ids)},
    }


def vocabulary_of(
    vocab: Mapping[str, Any], n_genes: int, where: str, gene_names: Mapping[str, str] | None = None
) -> Vocabulary:
    """The genes of a ``vocab.json``, in the order of their tokens.

    Raises
    ------
    InputError
        A token without a gene, with two, or without a number.
    """
    genes = {
        token: name for name, token in vocab.items() if isinstance(token, int) and token >= RESERVED_TOKENS
    }
    named = sum(not isinstance(token, int) or token >= RESERVED_TOKENS for token in vocab.values())
    if named != n_genes or sorted(genes) != list(range(RESERVED_TOKENS, RESERVED_TOKENS + n_genes)):
        raise InputError(
            where,
            f"does not name one gene for each of {n_genes:,} tokens from {RESERVED_TOKENS}",
            "give the vocab.json that belongs to the weights, or remove it and use --vocabulary",
        )
    ids = tuple(genes[token] for token in sorted(genes))
    return Vocabulary(
        ids,
        tuple((gene_names or {}).get(gene, "") for gene in ids),
        tuple("mouse" if gene.startswith("ENSMUSG") else "human" for gene in ids),
    )


def _check(run: RunConfig) -> None:
    model, sample, _ = run.nicheformer()
    order = [field for field in _CONTEXT if field in sample.context]
    if list(sample.context) != order:
        raise InputError(
            run.name,
            f"has the context {', '.join(sample.context)}; the authors' class puts it as {', '.join(order)}",
            "use --format stablehlo",
        )
    if model.niche:
        raise InputError(
            run.name, "reads niches, for which the published form has no tensor", "use --format stablehlo"
        )
    if model.norm_epsilon != 1e-12:
        raise InputError(
            run.name,
            f"has model.norm_epsilon {model.norm_epsilon}, the authors' class 1e-12",
            "use --format stablehlo",
        )


NICHEFORMER = Family(
    title="Nicheformer",
    summary="A cell as a sentence of its genes by rank, pretrained by masked genes (Nicheformer).",
    model_type=MODEL_TYPE,
    forms=("folder", "lightning"),
    recipe="nicheformer_49m",
    prefix="nicheformer.",
    heads=(f"{HEAD}.", "pooler_head.", "cls_head."),
    kept=("encoder_layer.", "pooler_head.", "cls_head."),
    optional=(),
    prefixes_own=True,
    configure=_configure,
    shapes=lambda run, n_genes: published_shapes(run.nicheformer()[0], n_genes),
    from_published=lambda tensors, run, n_genes: from_published(tensors, run.nicheformer()[0], n_genes),
    to_published=lambda parameters, run, n_genes: to_published(parameters, run.nicheformer()[0], n_genes),
    published_config=_published_config,
    unused=_unused,
    check=_check,
)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), np.float32)])
