"""AIDO.Tissue's published tensors and configuration, name by name, and ours.

The published folder (``config.json``, ``model.safetensors``) holds the encoder side of the model: value
embedding, gene table and encoder. Decoder weights were never released. Linear weights are stored there as
(outputs, inputs), here as (inputs, outputs); layers one by one there, stacked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from scfm_jax.errors import InputError
from scfm_jax.export.family import Family, check_fixed
from scfm_jax.models.embeddings import padded_size
from scfm_jax.models.functional import Parameters
from scfm_jax.models.rotary import inverse_frequencies
from scfm_jax.models.tissue import DEPTH_TOKENS, PAD_TOKENS, TissueConfig
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.config import RunConfig

MODEL_TYPE = "cellspatialfoundation"
TABLE = "position_embedding.weight"

# Ours, theirs, and whether the matrix is turned.
_EMBEDDING = (
    (("value_embedding", "scale"), "gene_embedding.linear1.weight", True),
    (("value_embedding", "shift"), "gene_embedding.linear1.bias", False),
    (("value_embedding", "mix"), "gene_embedding.linear2.weight", True),
    (("value_embedding", "mix_bias"), "gene_embedding.linear2.bias", False),
    (("value_embedding", "table"), "gene_embedding.lookup_table.weight", False),
    (("value_embedding", "mask"), "gene_embedding.mask_embedding.weight", False),
    (("value_embedding", "pad"), "gene_embedding.pad_embedding.weight", False),
)
_LINEAR = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORM = {"attention_norm": "attention.ln", "feed_forward_norm": "ln"}
INVERSE_FREQUENCIES = "attention.self.rotary_emb.inv_freq"


def _of_stack(config: TransformerConfig) -> Iterator[tuple[tuple[str, ...], str, bool, bool]]:
    """Ours, theirs (with ``{}`` for the layer), turned, stacked."""
    norm_parts = [("scale", "weight")] + ([("bias", "bias")] if config.norm == "layer" else [])
    linear_parts = [("kernel", "weight")] + ([("bias", "bias")] if config.use_bias else [])
    for ours, theirs in _NORM.items():
        for part, name in norm_parts:
            yield ("blocks", ours, part), f"layer.{{}}.{theirs}.{name}", False, True
    for ours, theirs in _LINEAR.items():
        for part, name in linear_parts:
            yield ("blocks", ours, part), f"layer.{{}}.{theirs}.{name}", part == "kernel", True
    for part, name in norm_parts:
        yield ("norm", part), f"ln.{name}", False, False


def stack_from_published(tensors: dict[str, np.ndarray], config: TransformerConfig) -> Parameters:
    """Parameters of a `Transformer` from the tensors of a published encoder (names without ``encoder.``)."""
    parameters: Parameters = {}
    for path, name, turned, stacked in _of_stack(config):
        names = [name.format(layer) for layer in range(config.layers)] if stacked else [name]
        found = [tensors[one].T if turned else tensors[one] for one in names]
        _put(parameters, path, np.stack(found) if stacked else found[0])
    return parameters


def stack_to_published(parameters: Parameters, config: TransformerConfig) -> dict[str, np.ndarray]:
    """What `stack_from_published` undoes."""
    tensors = {}
    for path, name, turned, stacked in _of_stack(config):
        leaf = np.asarray(_get(parameters, path))
        for layer, part in enumerate(leaf) if stacked else [(0, leaf)]:
            tensors[name.format(layer)] = np.ascontiguousarray(part.T if turned else part)
    return tensors


def from_published(tensors: dict[str, np.ndarray], config: TissueConfig) -> Parameters:
    """The encoder side of `TissueModel`'s parameters, float32.

    Parameters
    ----------
    tensors
        By their published names, without a ``bert.`` prefix.
    config
        What `tissue_config` made of the folder's ``config.json``.

    Returns
    -------
    ``gene_embedding``, ``value_embedding`` and ``encoder`` of the nested dict of parameters.
    """
    wide = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    parameters: Parameters = {}
    for path, name, turned in _EMBEDDING:
        tensor = wide[name].T if turned else wide[name]
        _put(parameters, path, tensor[0] if path[-1] in ("mask", "pad") else tensor)
    table = wide[TABLE]
    padding = np.zeros((padded_size(len(table)) - len(table), table.shape[1]), np.float32)
    _put(parameters, ("gene_embedding", "table"), np.concatenate([table, padding]))
    inner = {name.removeprefix("encoder."): tensor for name, tensor in wide.items()}
    return {**parameters, "encoder": stack_from_published(inner, config.encoder)}


def to_published(parameters: Parameters, config: TissueConfig, n_genes: int) -> dict[str, np.ndarray]:
    """Float32 tensors by their published names: the inverse of `from_published`, with ``inv_freq``."""
    tensors = {}
    for path, name, turned in _EMBEDDING:
        leaf = np.asarray(_get(parameters, path))
        leaf = leaf[None] if path[-1] in ("mask", "pad") else leaf
        tensors[name] = np.ascontiguousarray(leaf.T if turned else leaf)
    tensors[TABLE] = np.asarray(parameters["gene_embedding"]["table"])[: n_genes + DEPTH_TOKENS + PAD_TOKENS]
    for name, tensor in stack_to_published(parameters["encoder"], config.encoder).items():
        tensors[f"encoder.{name}"] = tensor
    for layer in range(config.encoder.layers):
        frequencies = inverse_frequencies(config.encoder.head_size // 2)
        tensors[f"encoder.layer.{layer}.{INVERSE_FREQUENCIES}"] = frequencies
    return tensors


def published_shapes(config: TissueConfig, n_genes: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the published folder for this geometry."""
    wide, bins = config.encoder, config.bins
    width, hidden = wide.width, wide.feed_forward
    shapes: dict[str, tuple[int, ...]] = {
        "gene_embedding.linear1.weight": (bins, 1),
        "gene_embedding.linear1.bias": (bins,),
        "gene_embedding.linear2.weight": (bins, bins),
        "gene_embedding.linear2.bias": (bins,),
        "gene_embedding.lookup_table.weight": (bins, width),
        "gene_embedding.mask_embedding.weight": (1, width),
        "gene_embedding.pad_embedding.weight": (1, width),
        TABLE: (n_genes + DEPTH_TOKENS + PAD_TOKENS, width),
    }
    sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    for path, name, turned, stacked in _of_stack(wide):
        outputs_inputs = sizes.get(path[1], (width, width))
        shape = (
            outputs_inputs if turned else (outputs_inputs[0],) if path[1] in _LINEAR and stacked else (width,)
        )
        for layer in range(wide.layers if stacked else 1):
            shapes[f"encoder.{name.format(layer)}"] = shape
    for layer in range(wide.layers):
        shapes[f"encoder.layer.{layer}.{INVERSE_FREQUENCIES}"] = (wide.head_size // 4,)
    return shapes


# What the published class fixes: a folder that says otherwise is of another architecture.
_FIXED = {
    "hidden_act": "swiglu",
    "position_embedding_type": "absolute",
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
    "is_decoder": False,
}
# Type and default of what is read; sizes and widths have no default.
_FIELDS: dict[str, tuple[Any, Any]] = {
    "num_hidden_layers": (int, None),
    "num_attention_heads": (int, None),
    "hidden_size": (int, None),
    "intermediate_size": (int, None),
    "max_position_embeddings": (int, None),
    "normalization_type": (str, "RMSNorm"),
    "layer_norm_eps": ((int, float), 1e-5),
    "add_linear_bias": (bool, True),
    "bin_num": (int, 100),
    "bin_alpha": ((int, float), 1.0),
    "initializer_range": ((int, float), 0.02),
}
_NORMS = {"RMSNorm": "rms", "LayerNorm": "layer"}


def _configure(content: dict[str, Any], recipe: RunConfig, where: str) -> tuple[RunConfig, int]:
    """The recipe with the encoder of a folder, and a decoder of its geometry as deep as the recipe's."""
    wanted, _, _ = recipe.tissue()
    found, n_genes = tissue_config(content, wanted.decoder.layers, where)
    geometry = ("encoder", "decoder", "bins", "bin_alpha", "init_std")
    model = replace(wanted, **{name: getattr(found, name) for name in geometry})
    return replace(recipe, model=model), n_genes


def tissue_config(content: dict[str, Any], decoder_layers: int, where: str) -> tuple[TissueConfig, int]:
    """Our config and the number of genes that a published ``config.json`` describes.

    Parameters
    ----------
    content
        The file, decoded.
    decoder_layers
        Layers of the decoder, which the folder does not hold.
    where
        The file, for messages.

    Raises
    ------
    InputError
        Another architecture, or a missing field.
    """
    check_fixed(content, _FIXED, where)
    fields = {name: _checked(content, name, where) for name in _FIELDS}
    try:
        encoder = TransformerConfig(
            layers=fields["num_hidden_layers"],
            heads=fields["num_attention_heads"],
            width=fields["hidden_size"],
            hidden=fields["intermediate_size"],
            norm=_NORMS[fields["normalization_type"]],  # type: ignore[arg-type]
            norm_epsilon=fields["layer_norm_eps"],
            use_bias=fields["add_linear_bias"],
        )
    except KeyError as error:
        raise InputError(
            where, f"the field 'normalization_type' is {error}", f"it is one of {', '.join(_NORMS)}"
        ) from error
    except ValueError as error:
        raise InputError(where, str(error), "give the published config.json") from error
    config = TissueConfig(
        encoder=encoder,
        decoder=replace(encoder, layers=decoder_layers),
        bins=fields["bin_num"],
        bin_alpha=float(fields["bin_alpha"]),
        init_std=fields["initializer_range"],
    )
    return config, fields["max_position_embeddings"]


def _checked(content: dict[str, Any], name: str, where: str) -> Any:
    """A field of the published config, of the type that it must have, or its default."""
    kind, default = _FIELDS[name]
    if name not in content and default is not None:
        return default
    value: Any = content.get(name)
    fits = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    if fits and kind in (int, (int, float)) and name != "bin_alpha":
        fits = bool(0 < value < float("inf"))
    if not fits or value != value:
        said = f"the field {name!r} is {value!r}" if name in content else f"lacks the field {name!r}"
        raise InputError(where, said, "give the published config.json")
    return value


def published_config(config: TissueConfig, n_genes: int, dtype: str) -> dict[str, Any]:
    """A ``config.json`` that the authors' class reads, for a model of ours."""
    wide = config.encoder
    return {
        "architectures": ["CellSpatialFoundationModel"],
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype,
        "hidden_size": wide.width,
        "num_hidden_layers": wide.layers,
        "num_attention_heads": wide.heads,
        "intermediate_size": wide.feed_forward,
        "max_position_embeddings": n_genes,
        "layer_norm_eps": wide.norm_epsilon,
        "normalization_type": {ours: theirs for theirs, ours in _NORMS.items()}[wide.norm],
        "add_linear_bias": wide.use_bias,
        "bin_num": config.bins,
        "bin_alpha": config.bin_alpha,
        "initializer_range": config.init_std,
        "pad_token_id": -2,
        "mask_token_id": -1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "_use_flash_attention_2": True,
        **_FIXED,
    }


TISSUE = Family(
    title="AIDO.Tissue",
    summary="A cell and its spatial neighbours, pretrained by column masking (AIDO.Tissue).",
    model_type=MODEL_TYPE,
    forms=("folder",),
    recipe="tissue_3m",
    prefix="bert.",
    heads=("cls.",),
    kept=("cls.",),
    optional=(INVERSE_FREQUENCIES,),
    prefixes_own=False,
    configure=_configure,
    shapes=lambda run, n_genes: published_shapes(run.tissue()[0], n_genes),
    from_published=lambda tensors, run, n_genes: from_published(tensors, run.tissue()[0]),
    to_published=lambda parameters, run, n_genes: to_published(parameters, run.tissue()[0], n_genes),
    published_config=lambda run, n_genes, form: published_config(run.tissue()[0], n_genes, "float32"),
    unused=lambda run, form: {},
    check=lambda run: None,
)


def _put(tree: Parameters, path: tuple[str, ...], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _get(tree: Parameters, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
