"""What a model family brings to import and export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scfm_jax.errors import InputError
from scfm_jax.models.functional import Parameters
from scfm_jax.training.config import RunConfig

# A folder as Hugging Face keeps models, or one file as Lightning keeps its checkpoints.
Form = Literal["folder", "lightning"]
Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, np.ndarray]


def check_fixed(content: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    """Raise where a published config says otherwise than the one architecture that is known here."""
    for field, value in fixed.items():
        if content.get(field, value) != value:
            raise InputError(
                where,
                f"the field {field!r} is {content[field]!r}",
                f"only {value!r} is known to this version",
            )


@dataclass(frozen=True)
class Family:
    """The published forms of a model family, and the way to ours.

    Attributes
    ----------
    title, summary
        For the model card.
    model_type
        Of a folder's ``config.json``.
    forms
        In which it is published.
    recipe
        Of `experiments`: what published weights are for, where the user does not say.
    prefix
        In front of names in a folder, unless they are `heads`.
    heads
        Beginnings of names that never have the prefix.
    kept
        Beginnings of names that our parameters do not hold: kept with the run, for the way out.
    optional
        Endings of names that may be missing.
    prefixes_own
        Whether a model trained here is exported with the prefix.
    configure
        (published config, recipe, file) to the run's config and its number of genes.
    shapes
        Of the tensors that are read.
    from_published, to_published
        Tensors by their names without prefix, to float32 parameters and back. The former need not be all of
        the model's.
    published_config
        What the authors' class needs to know of a model of ours, by form.
    unused
        Shapes of tensors that the authors' class holds and does not use, by form.
    check
        Raises where the published form cannot hold a model of ours.
    """

    title: str
    summary: str
    model_type: str
    forms: tuple[Form, ...]
    recipe: str
    prefix: str
    heads: tuple[str, ...]
    kept: tuple[str, ...]
    optional: tuple[str, ...]
    prefixes_own: bool
    configure: Callable[[dict[str, Any], RunConfig, str], tuple[RunConfig, int]]
    shapes: Callable[[RunConfig, int], Shapes]
    from_published: Callable[[Tensors, RunConfig, int], Parameters]
    to_published: Callable[[Parameters, RunConfig, int], Tensors]
    published_config: Callable[[RunConfig, int, Form], dict[str, Any]]
    unused: Callable[[RunConfig, Form], Shapes]
    check: Callable[[RunConfig], None]
