"""The whole of an experiment as one frozen value: from a recipe, with dotted flags, kept with the run."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import reprlib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from scfm_jax.corpus.split import SplitConfig
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.ranks import RankConfig
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.errors import InputError, check_least
from scfm_jax.json_files import as_float
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.objectives.column_masking import ColumnMaskingConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig

T = TypeVar("T")


@dataclass(frozen=True)
class OptimiserConfig:
    """An optimiser with a linear warm-up and a cosine decay; the defaults are AIDO.Tissue's where public.

    Attributes
    ----------
    name
        ``adamw`` (published), or ``muon``: momentum made orthogonal for matrices, Nadam for the rest (ours; a
        small model of real tissue learns in a fifth of the samples).
    steps
        Length of the run.
    schedule_steps
        Length of the schedule; 0 is that of the run.
    schedule
        ``warmup_cosine``: a line from the initial to the peak rate, then a cosine to the final one.
        ``product``: as Nicheformer's code has it, a cosine from step 0 to zero, times a line from zero over
        the warm-up, but never below the final rate; it reads no initial rate.
    initial_rate, peak_rate, final_rate
        Learning rate at step 0, after `warmup_steps`, and at the end (warm-up length and final rate are
        ours).
    b1, b2, epsilon, weight_decay
        Of AdamW (Muon's momentum is `b2`).
    decay
        What decays: ``matrices``, not biases, norms and other vectors (ours), or ``all``, as PyTorch's AdamW
        does by default.
    clip
        Global norm that gradients are clipped to.
    accumulation
        Microbatches a step: divides the batch size.
    """

    name: Literal["adamw", "muon"] = "adamw"
    steps: int = 150_000
    schedule_steps: int = 0
    schedule: Literal["warmup_cosine", "product"] = "warmup_cosine"
    initial_rate: float = 2e-5
    peak_rate: float = 2e-4
    final_rate: float = 2e-5
    warmup_steps: int = 2_000
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    decay: Literal["matrices", "all"] = "matrices"
    clip: float = 1.0
    accumulation: int = 1

    def __post_init__(self) -> None:
        check_least(self, 1, "steps", "accumulation")
        check_least(self, 0, "schedule_steps", "warmup_steps", "initial_rate", "peak_rate", "final_rate")
        check_least(self, 0, "weight_decay", "clip", "epsilon")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; `data` = 0 takes all that the others leave."""

    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_least(self, 0, "data")
        check_least(self, 1, "fsdp", "tensor")


# What a model reads, and what it is trained to say.
FAMILIES: dict[type, tuple[type, type]] = {
    TissueConfig: (SampleConfig, ColumnMaskingConfig),
    NicheformerConfig: (RankConfig, MaskedGenesConfig),
}


@dataclass(frozen=True)
class RunConfig:
    """One pretraining run.

    Attributes
    ----------
    name
        Of the recipe.
    corpus
        Path of the corpus.
    seed
        Of weights, order and masks.
    split, data, model, objective, optimiser, mesh
        See their classes.
    initial_weights
        A run directory whose best checkpoint gives the first parameters (training with more neighbours can
        start from a run with fewer); empty draws them from the seed.
    technologies
        Train and evaluate on slides of these only; empty is all.
    evaluate_every, evaluate_cells
        Steps between evaluations; held-out cells of each (a fixed random subset; 0 is all).
    checkpoint_every
        Steps between checkpoints, beside one at every evaluation and at the end.
    keep_last, keep_best
        Checkpoints that stay.
    log_every
        Steps between looks at the device.
    """

    name: str
    model: TissueConfig | NicheformerConfig
    corpus: str = ""
    seed: int = 0
    split: SplitConfig = field(default_factory=SplitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ColumnMaskingConfig | MaskedGenesConfig = field(default_factory=ColumnMaskingConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    initial_weights: str = ""
    technologies: tuple[str, ...] = ()
    evaluate_every: int = 1_000
    evaluate_cells: int = 2_048
    checkpoint_every: int = 1_000
    keep_last: int = 2
    keep_best: int = 1
    log_every: int = 10

    def __post_init__(self) -> None:
        check_least(self, 1, "evaluate_every", "checkpoint_every", "log_every", "keep_last")
        check_least(self, 0, "evaluate_cells", "keep_best")
        if self.data.batch_size % self.optimiser.accumulation:
            raise InputError(
                "optimiser.accumulation",
                f"{self.optimiser.accumulation} does not divide data.batch_size, {self.data.batch_size}",
                "choose a divisor",
            )
        sample, objective = FAMILIES[type(self.model)]
        if not (isinstance(self.data.sample, sample) and isinstance(self.objective, objective)):
            raise InputError(
                "model",
                f"{type(self.model).__name__} does not go with {type(self.data.sample).__name__} and "
                f"{type(self.objective).__name__}",
                f"give data.sample a {sample.__name__}, and objective a {objective.__name__}",
            )
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", f"{self.seed} is not a 32-bit number", "choose one from 0 to 4294967295")

    def tissue(self) -> tuple[TissueConfig, SampleConfig, ColumnMaskingConfig]:
        """Model, sample and objective of a tissue run.

        Raises
        ------
        InputError
            The run is of another family.
        """
        model, sample, objective = self.model, self.data.sample, self.objective
        if (
            isinstance(model, TissueConfig)
            and isinstance(sample, SampleConfig)
            and isinstance(objective, ColumnMaskingConfig)
        ):
            return model, sample, objective
        raise InputError(self.name, "is no run of AIDO.Tissue, whose genes have values", "give one that is")

    def nicheformer(self) -> tuple[NicheformerConfig, RankConfig, MaskedGenesConfig]:
        """Model, sample and objective of a run of Nicheformer.

        Raises
        ------
        InputError
            The run is of another family.
        """
        model, sample, objective = self.model, self.data.sample, self.objective
        if (
            isinstance(model, NicheformerConfig)
            and isinstance(sample, RankConfig)
            and isinstance(objective, MaskedGenesConfig)
        ):
            return model, sample, objective
        raise InputError(self.name, "is no run of Nicheformer, whose genes have ranks", "give one that is")

    def takes(self, technology: str) -> bool:
        """Whether slides of `technology` are trained and evaluated on."""
        return not self.technologies or technology in self.technologies


def load_recipe(path: str | Path) -> RunConfig:
    """The config that a recipe's ``recipe()`` returns.

    Raises
    ------
    InputError
        No such file, no such function, a recipe with an unknown field, or one that fails or gives no config.
    """
    return from_python(path, "recipe", RunConfig)


def from_python(path: str | Path, function: str, kind: type[T]) -> T:
    """What a function without arguments of a Python file returns, which must be of a `kind`.

    Raises
    ------
    InputError
        As `load_recipe`.
    """
    path = Path(path)
    mend = f"name a Python file with a function {function}()"
    if not path.is_file():
        raise InputError(path, f"there is no such {function}", mend)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(path, "is no Python file", mend)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        value = getattr(module, function)()
    except InputError:
        raise
    except AttributeError as error:
        raise InputError(path, str(error), f"define {function}() -> {kind.__name__}") from error
    except (TypeError, ValueError, SyntaxError, ImportError) as error:
        raise InputError(path, str(error), f"mend that field of the {function}") from error
    except Exception as error:  # a recipe is any Python
        raise InputError(path, f"{type(error).__name__}: {error}", f"mend the {function}") from error
    if not isinstance(value, kind):
        raise InputError(
            path,
            f"{function}() returns {type(value).__name__}",
            f"return a {kind.__module__}.{kind.__name__}",
        )
    return value


def override(config: RunConfig, flags: Sequence[str], where: str) -> RunConfig:
    """`config` with dotted flags (``--model.encoder.layers 6 --data.batch_size=64``) applied.

    Raises
    ------
    InputError
        A flag that names no field, lacks a value, or has one of another type.
    """
    words = list(flags)
    content = dataclasses.asdict(config)
    while words:
        flag = words.pop(0)
        name, equals, text = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or (not equals and not words):
            raise InputError(where, f"cannot read {flag!r}", "write --field.name value")
        text = text if equals else words.pop(0)
        node, keys = content, name.replace("-", "_").split(".")
        for place, key in enumerate(keys):
            if not isinstance(node, dict) or key not in node:
                raise InputError(where, f"has no field {name!r}", _suggestion(key, node))
            if place < len(keys) - 1:
                node = node[key]
        node[keys[-1]] = _parsed(text, _field_type(config, keys))
    return from_dict(RunConfig, content, where)


def _field_type(config: Any, keys: Sequence[str]) -> Any:
    """The declared type at a dotted path of nested dataclasses."""
    for key in keys[:-1]:
        config = getattr(config, key)
    return typing.get_type_hints(type(config))[keys[-1]]


def _parsed(text: str, hint: Any) -> Any:
    """What a flag's `text` says for a field of type `hint`: JSON, except that text is taken as it stands."""
    if hint is str:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if typing.get_origin(hint) is tuple and not isinstance(value, list):
        return text.split(",")
    return value


def from_dict(kind: type[T], content: dict[str, Any], where: str, path: str = "") -> T:
    """A frozen dataclass from nested plain data, every field and type checked.

    Raises
    ------
    InputError
        An unknown field, a missing one, or a value of another type.
    """
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {}
    for key, value in content.items():
        if key not in known:
            raise InputError(where, f"has no field {path + key!r}", _suggestion(key, known))
        values[key] = typed(hints[key], value, where, path + key)
    for key, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise InputError(where, f"lacks the field {path + key!r}", "add it")
    try:
        return kind(**values)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(where, f"{path.rstrip('.') or 'config'}: {error}", "choose other values") from error


def typed(hint: Any, value: Any, where: str, name: str) -> Any:
    """Plain data as a value of the type `hint`: dataclasses, tuples, lists, dicts and scalars.

    Raises
    ------
    InputError
        It is of another type; `where` and the field `name` say of what.
    """
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where, f"{name}.")  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [option for option in arguments if dataclasses.is_dataclass(option)]
        if kinds and isinstance(value, dict):
            return typed(max(kinds, key=lambda kind: _likeness(kind, value)), value, where, name)
        for option in arguments:
            try:
                return typed(option, value, where, name)
            except InputError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        hints = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(hints) == len(value):
            return tuple(typed(of, item, where, name) for of, item in zip(hints, value, strict=True))
    elif origin is list and isinstance(value, list):
        return [typed(arguments[0], item, where, name) for item in value]
    elif origin is dict and isinstance(value, dict):
        of_key, of_value = arguments  # a key is text in JSON
        return {
            typed(of_key, _parsed(key, of_key), where, name): typed(of_value, item, where, f"{name}.{key}")
            for key, item in value.items()
        }
    elif origin is typing.Literal and value in arguments:
        return value
    elif hint is float and (number := as_float(value)) is not None:
        return number
    elif (
        hint in (int, str, bool, type(None))
        and isinstance(value, hint)
        and not (hint is int and isinstance(value, bool))
    ):
        return value
    raise InputError(where, f"the field {name!r} cannot be {reprlib.repr(value)}", f"give {_wanted(hint)}")


def _likeness(kind: Any, content: dict[str, Any]) -> int:
    """How much plain data looks like a dataclass: fields that it has, less those that it has not."""
    known = {item.name for item in dataclasses.fields(kind)}
    return len(known & set(content)) - len(set(content) - known)


def _wanted(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(repr, options))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_wanted, options))
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _suggestion(key: str, known: Any) -> str:
    names = list(known) if isinstance(known, dict) else []
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there are {', '.join(names)}" if names else "it ends before that name"
