"""A fine-tuned model: its base, and what was trained of it; on disk the latter alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float32, Int64
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from scfm_jax.corpus import Corpus
from scfm_jax.data.ranks import RankConfig
from scfm_jax.data.technology_means import read_means
from scfm_jax.downstream.embed import EmbeddingConfig, embed_cells
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.downstream.scores import Kind
from scfm_jax.errors import InputError, check_least
from scfm_jax.models.functional import Parameters, count_parameters
from scfm_jax.models.heads import HeadConfig, apply_head
from scfm_jax.models.lora import LoraConfig, adapted
from scfm_jax.training.config import from_dict
from scfm_jax.training.run import save_technology_means, write_weights

Way = Literal["full", "lora", "head"]
RECORD, WEIGHTS = "finetune.json", "weights.safetensors"
_BASE_RATES: dict[Way, float] = {"lora": 5e-4, "full": 1e-4, "head": 0.0}


@dataclass(frozen=True)
class FinetuneConfig:
    """What is trained, and how.

    Attributes
    ----------
    way
        ``full``: all weights that encode, and the head. ``lora``: adapters and head. ``head``: it alone, on
        hidden states that are computed once.
    head, lora
        See their classes.
    epochs, patience
        Most passes over the training cells, and how many without a better validation score end it.
    batch_size
        Cells of a step.
    base_rate, head_rate
        Peak learning rates of adapters or weights (None: 5e-4 for adapters, 1e-4 for all weights), and of the
        head.
    label_smoothing
        Share of a class's probability that is spread over all classes.
    balanced
        Weigh classes by the inverse of their cells, with mean 1 over the classes.
    standardise
        Let the head learn on features of mean 0 and spread 1 over the training cells, as the base gives them
        (ours): pooled features of cells differ by little beside what they share, and a head that sees them as
        they are (published) learns slowly. It is stored as a plain head either way.
    warmup_share
        Of all steps, on a line from rate zero; a cosine to zero follows.
    weight_decay
        Of AdamW, for kernels and adapters; biases, norms and embeddings do not decay.
    validation_share
        Share of the training blocks that choose the epoch.
    max_train_cells
        Cells drawn from the training cells, in proportion to their classes or evenly over their values; 0
        takes all.
    neighbours
        k, in place of the model's.
    refit
        Train again on all training cells, as many epochs as were chosen.
    """

    way: Way = "lora"
    head: HeadConfig = field(default_factory=HeadConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    epochs: int = 20
    patience: int = 5
    batch_size: int = 32
    base_rate: float | None = None
    head_rate: float = 5e-3
    label_smoothing: float = 0.1
    balanced: bool = True
    standardise: bool = True
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    validation_share: float = 0.2
    max_train_cells: int = 0
    neighbours: int | None = None
    refit: bool = False

    def __post_init__(self) -> None:
        check_least(self, 1, "epochs", "patience", "batch_size")
        check_least(
            self, 0, "head_rate", "label_smoothing", "warmup_share", "weight_decay", "max_train_cells"
        )
        for name in ("label_smoothing", "warmup_share"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not below 1")
        if self.base_rate is not None:
            check_least(self, 0, "base_rate")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}, not between 0 and 1")

    @property
    def rates(self) -> dict[str, float]:
        """Peak learning rate of each part of what is trained."""
        base = _BASE_RATES[self.way] if self.base_rate is None else self.base_rate
        return {"base": base, "head": self.head_rate}

    @property
    def of_step(self) -> FinetuneConfig:
        """What of it a training step is compiled for."""
        return FinetuneConfig(
            way=self.way,
            head=self.head,
            lora=self.lora,
            base_rate=self.base_rate,
            head_rate=self.head_rate,
            weight_decay=self.weight_decay,
        )

    def combined(self, parameters: Parameters, base: Parameters) -> Parameters:
        """A model's parameters with what was trained of them."""
        return adapted(parameters, base, self.lora) if self.way == "lora" else {**parameters, **base}


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A model, its head, and what was trained of the model.

    Attributes
    ----------
    model
        The base, untouched.
    config
        How it was trained.
    kind
        What the head says: ``classes`` and ``composition`` probabilities, ``value`` a number.
    trained
        ``base`` (adapters, weights or nothing) and ``head``.
    scale
        Mean and standard deviation of the training values, which the head's number counts in.
    history
        One row an epoch: ``epoch`` from 1, ``train_loss``, ``validation_score`` (macro-F1 of classes, minus
        the cross-entropy of a composition, R2 of a value: higher is better), ``seconds``.
    optimiser_bytes
        What the optimiser held while it trained.
    """

    model: TrainedModel
    config: FinetuneConfig
    kind: Kind
    trained: Parameters
    scale: tuple[float, float]
    history: tuple[dict[str, float], ...] = ()
    optimiser_bytes: int = 0

    @property
    def trained_parameters(self) -> int:
        return count_parameters(self.trained)

    @property
    def stored_bytes(self) -> int:
        """Of the trained weights."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.trained))

    @property
    def chosen(self) -> dict[str, float]:
        """The row of `history` with the best validation score, the first of equals."""
        return max(self.history, key=lambda row: row["validation_score"])

    def merged(self) -> Parameters:
        """Plain weights of the model as it was trained, without the head."""
        return self.config.combined(self.model.parameters, self.trained["base"])

    def predict(
        self,
        corpus: Corpus,
        cells: Int64[np.ndarray, " m"],
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Float32[np.ndarray, "m c"] | Float32[np.ndarray, " m"]:
        """What is said of cells: probabilities, rows that sum to 1; or values, in their own units.

        Parameters
        ----------
        corpus
            With the model's vocabulary.
        cells
            Cell numbers.
        progress
            Called with the number of cells done and in all.
        """
        return self.answer(self.embed(corpus, cells, progress=progress))

    def embed(
        self,
        corpus: Corpus,
        cells: Int64[np.ndarray, " m"],
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Float32[np.ndarray, "m d"]:
        """What the head reads of cells: hidden states of the model as it was trained, pooled."""
        model = replace(self.model, parameters=self.merged())
        pooling = EmbeddingConfig(pooling=self.config.head.pooling)
        return embed_cells(model, corpus, cells, config=pooling, progress=progress)

    def answer(
        self, features: Float32[np.ndarray, "m d"]
    ) -> Float32[np.ndarray, "m c"] | Float32[np.ndarray, " m"]:
        """`predict`, from embeddings of the model as it was trained, pooled as the head pools."""
        said = apply_head(self.trained["head"], self.config.head, jnp.asarray(features))
        if self.kind == "value":
            mean, spread = self.scale
            return np.asarray(said[:, 0] * spread + mean)
        return np.asarray(jax.nn.softmax(said))

    def save(self, folder: Path, base: Path) -> None:
        """Write ``finetune.json`` and, of the weights, what was trained to ``weights.safetensors``.

        Parameters
        ----------
        folder
            A new folder.
        base
            The run directory that the model was opened from.

        Raises
        ------
        InputError
            The folder exists or cannot be made.
        """
        _make(folder)
        tensors = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(self.trained).items()}
        save_file(tensors, folder / WEIGHTS)
        record = {
            "base": str(base.resolve()),
            "base_hash": self.model.hash,
            "config": asdict(self.config),
            "kind": self.kind,
            "scale": self.scale,
            "history": self.history,
            "trained_parameters": self.trained_parameters,
            "model_parameters": count_parameters(self.model.parameters),
            "stored_bytes": self.stored_bytes,
            "optimiser_bytes": self.optimiser_bytes,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def write_merged_run(self, folder: Path) -> None:
        """Write the merged weights, without the head, as a run directory: for `scfm embed`, `scfm export`.

        Raises
        ------
        InputError
            The folder exists or cannot be made.
        """
        _make(folder)
        model, config, means = self.model, self.model.config, {}
        sample = config.data.sample
        if isinstance(sample, RankConfig):
            files = dict(entry.split("=", 1) for entry in sample.mean_files)
            means = {name: read_means(Path(file), len(model.vocabulary)) for name, file in files.items()}
            config = replace(config, data=replace(config.data, sample=replace(sample, mean_files=())))
        save_technology_means(folder, means)
        write_weights(folder, config, model.vocabulary, len(model.vocabulary), self.merged(), step=model.step)


def open_finetuned(folder: Path, model: TrainedModel | None = None) -> FineTuned:
    """Open what `FineTuned.save` wrote.

    Parameters
    ----------
    folder
        Where it lies.
    model
        Its base; opened where the record says, if not given.

    Raises
    ------
    InputError
        Files that are missing or damaged, or a base with other weights.
    """
    path, mend = folder / RECORD, "name a folder that scfm finetune wrote"
    try:
        record = json.loads(path.read_text())
        config = from_dict(FinetuneConfig, record["config"], str(path))
        tensors = load_file(folder / WEIGHTS)
        base = open_model(Path(record["base"])) if model is None else model
        if base.hash != record["base_hash"]:
            raise InputError(
                path, "was trained on other weights than its base has now", "give it its base back"
            )
        return FineTuned(
            model=base if config.neighbours is None else base.with_neighbours(config.neighbours),
            config=config,
            kind=record["kind"],
            # A way without a base stores no tensor of one.
            trained={"base": {}, **unflatten_dict(tensors, sep="/")},
            scale=(float(record["scale"][0]), float(record["scale"][1])),
            history=tuple(record["history"]),
            optimiser_bytes=record["optimiser_bytes"],
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(folder, f"holds no fine-tuned model ({error!r})", mend) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(folder, f"cannot be made: {error.strerror}", "name another folder") from error
