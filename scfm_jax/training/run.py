"""A run directory: made, checked, read, and its weights."""

from __future__ import annotations

import dataclasses
import json
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scfm_jax.corpus import Corpus
from scfm_jax.data.ranks import RankConfig
from scfm_jax.data.technology_means import means_of_slide
from scfm_jax.errors import DataWarning, InputError
from scfm_jax.genes import Vocabulary
from scfm_jax.models.functional import Parameters, abstract
from scfm_jax.training.checkpoint import Checkpoints, abstract_state
from scfm_jax.training.config import MeshConfig, RunConfig, from_dict
from scfm_jax.training.hosts import is_primary, meet
from scfm_jax.training.mesh import make_mesh, replicated
from scfm_jax.training.optimiser import make_optimiser
from scfm_jax.training.task import model_builder

# Technology means of a run that ranks genes.
MEANS = "technology_means"


def open_run(folder: Path, config: RunConfig, corpus: Corpus, *, resume: bool) -> None:
    """Make the run directory, or check that it is this run's; of several hosts one writes and all look."""
    if is_primary():
        means = _technology_means(config, corpus)
        if resume:
            _check_resumed(folder, config, corpus, means)
        elif (folder / "config.json").exists():
            raise InputError(folder, "holds a run already", "resume it with --resume, or name another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(folder, f"cannot be made: {error.strerror}", "name another folder") from error
        describe_run(folder, config, corpus.vocabulary, corpus.hash)
        save_technology_means(folder, means)
    meet("run directory")
    if not is_primary() and read_run(folder) != (config, corpus.hash):
        raise InputError(
            folder,
            "host 0 writes a run of another config or corpus than this host was given",
            "give all hosts the same recipe, flags and corpus, and a folder that all can see",
        )


def _check_resumed(folder: Path, config: RunConfig, corpus: Corpus, means: Mapping[str, np.ndarray]) -> None:
    """Raise InputError unless `config` goes on with the run in `folder`.

    What may differ is where it runs and what is kept, and the optimiser's fields, which a user may mean to
    change on the way.
    """
    stored, stored_hash = read_run(folder)
    if stored_hash != corpus.hash:
        raise InputError(folder, "was trained on another corpus", "resume with the corpus it names")
    free = ("corpus", "optimiser", "mesh", "log_every", "checkpoint_every", "keep_last", "keep_best")
    free_of_data = ("lengths", "prefetch", "cache_mib", "readers")
    same = replace(
        stored,
        **{name: getattr(config, name) for name in free},
        data=replace(stored.data, **{name: getattr(config.data, name) for name in free_of_data}),
    )
    if same != config:
        raise InputError(folder, "was started with another config", "resume without overrides, or start anew")
    if any(
        not np.array_equal(np.load(folder / MEANS / f"{name}.npy"), values, equal_nan=True)
        for name, values in means.items()
    ):
        raise InputError(
            folder,
            "was started with other technology means",
            "resume with the files that it was started with",
        )


def _technology_means(config: RunConfig, corpus: Corpus) -> dict[str, np.ndarray]:
    """What sentences are ranked against, by technology; nothing for a run that does not rank."""
    sample = config.data.sample
    if not isinstance(sample, RankConfig):
        return {}
    slides = {slide.technology: slide for slide in corpus.slides if config.takes(slide.technology)}
    return {name: means_of_slide(corpus, slide, sample.mean_files) for name, slide in sorted(slides.items())}


def save_technology_means(folder: Path, means: Mapping[str, np.ndarray]) -> None:
    """Keep technology means with a run: other cells must be ranked by the same."""
    for name, values in means.items():
        (folder / MEANS).mkdir(exist_ok=True)
        np.save(folder / MEANS / f"{name}.npy", values)


def _with_means_of_the_run(config: RunConfig, sample: RankConfig, folder: Path) -> RunConfig:
    files = tuple(f"{path.stem}={path}" for path in sorted(folder.glob("*.npy")))
    return replace(config, data=replace(config.data, sample=replace(sample, mean_files=files)))


def describe_run(folder: Path, config: RunConfig, vocabulary: Vocabulary | None, corpus_hash: str) -> None:
    """Write what a run directory says of itself: config, vocabulary, environment."""
    content = {"config": dataclasses.asdict(config), "corpus_hash": corpus_hash}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    packages = (
        "scfm_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "tensorstore",
        "numpy",
    )
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "packages": {name: version(name) for name in packages},
    }
    if vocabulary is not None:
        vocabulary.save(folder / "vocabulary.json")
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def read_run(folder: Path) -> tuple[RunConfig, str]:
    """The config and the corpus hash of a run directory.

    Raises
    ------
    InputError
        No run there, or a config that this version does not know.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            folder, "is no run directory (no config.json)", "name a folder that scfm train wrote"
        )
    try:
        content = json.loads(path.read_text())
        config, corpus_hash = content["config"], content["corpus_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            path, f"is no run's config ({error!r})", "name a folder that scfm train wrote"
        ) from error
    return from_dict(RunConfig, config, str(path)), corpus_hash


@dataclass(frozen=True, eq=False)
class Weights:
    """Parameters of a run, and what gives them their meaning.

    Attributes
    ----------
    config
        The run's.
    vocabulary
        Genes that the model knows, in the order of its table.
    graph, parameters
        For `nnx.merge`.
    step
        Of the checkpoint.
    """

    config: RunConfig
    vocabulary: Vocabulary
    graph: nnx.GraphDef
    parameters: Parameters
    step: int


def restore_weights(folder: Path, checkpoint: Literal["best", "last"] = "best") -> Weights:
    """Read the weights of a run directory, on every device whole.

    Raises
    ------
    InputError
        No run there, one without a checkpoint, or one that was imported without its vocabulary.
    """
    config, _ = read_run(folder)
    if isinstance(config.data.sample, RankConfig):
        config = _with_means_of_the_run(config, config.data.sample, folder / MEANS)
    if not (folder / "vocabulary.json").is_file():
        raise InputError(
            folder, "does not know its genes (no vocabulary.json)", "import it again with --vocabulary"
        )
    vocabulary = Vocabulary.read(folder / "vocabulary.json")
    return Weights(config, vocabulary, *restore_parameters(folder, config, len(vocabulary), checkpoint))


def restore_parameters(
    folder: Path, config: RunConfig, n_genes: int, checkpoint: Literal["best", "last"] = "best"
) -> tuple[nnx.GraphDef, Parameters, int]:
    """Graph, parameters and step of a run over `n_genes` genes."""
    graph, shapes, names = abstract(model_builder(config, n_genes))
    place = replicated(make_mesh(MeshConfig()))
    moments = jax.eval_shape(make_optimiser(config.optimiser, names).init, shapes)
    state = {"parameters": shapes, "optimiser": moments, "step": jax.ShapeDtypeStruct((), np.int32)}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.best if checkpoint == "best" else checkpoints.latest
        if step is None:
            raise InputError(folder, "has no checkpoint yet", "train it first")
        restored = checkpoints.restore(step, abstract_state(state, jax.tree.map(lambda _: place, state)))
    return graph, restored["parameters"], step


def write_weights(
    folder: Path,
    config: RunConfig,
    vocabulary: Vocabulary | None,
    n_genes: int,
    parameters: Parameters,
    *,
    step: int = 0,
) -> None:
    """Write weights that no training made into `folder` as a run directory, whose optimiser starts anew."""
    describe_run(folder, config, vocabulary, "")
    names = abstract(model_builder(config, n_genes))[2]
    state = {
        "parameters": parameters,
        "optimiser": make_optimiser(config.optimiser, names).init(parameters),
        "step": jnp.asarray(step, jnp.int32),
    }
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(step, state)


def initial_parameters(config: RunConfig, corpus: Corpus, like: Any) -> Any:
    """Parameters of another run's best checkpoint, for the same vocabulary, geometry and meaning."""
    folder = Path(config.initial_weights)
    weights = restore_weights(folder)
    if weights.vocabulary.hash != corpus.vocabulary.hash:
        raise InputError(
            folder, "has another vocabulary than the corpus (initial_weights)", "start from the seed"
        )
    there, wanted = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (weights.parameters, like))
    if there != wanted:
        raise InputError(
            folder,
            "has weights of another geometry (initial_weights)",
            "give the model the sizes in its config.json, or start from the seed",
        )
    before, now = weights.config.model.meaning(), config.model.meaning()
    if other := [f"model.{name} {value}" for name, value in before.items() if now.get(name) != value]:
        raise InputError(
            folder,
            f"was trained with {', '.join(other)} (initial_weights)",
            "set the same, or start from the seed",
        )
    before, now = weights.config.data.sample.meaning(), config.data.sample.meaning()
    if changed := [f"data.sample.{name} {value}" for name, value in before.items() if now[name] != value]:
        warnings.warn(
            f"{folder}: was trained with {', '.join(changed)} (initial_weights), which this run is not",
            DataWarning,
            stacklevel=2,
        )
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(lambda parameters: parameters, out_shardings=places)(weights.parameters)
