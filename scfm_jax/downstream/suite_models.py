"""The models of a suite in a fold: pretrained where they are missing, opened, and asked for embeddings."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32, Int64

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.downstream.cohort import open_cohort
from scfm_jax.downstream.cost import Cost, Meter
from scfm_jax.downstream.embed import EmbeddingConfig, embed_cells
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.downstream.outputs import locked
from scfm_jax.downstream.suite_config import UNTRAINED, Suite
from scfm_jax.downstream.suite_tasks import Task, read_tables
from scfm_jax.errors import InputError
from scfm_jax.models.functional import initialise
from scfm_jax.models.heads import Pooling
from scfm_jax.training.config import load_recipe, override
from scfm_jax.training.run import read_run
from scfm_jax.training.task import model_builder
from scfm_jax.training.train import train

Report = Callable[[str], None]
Progress = Callable[[int, int], None]


class Models:
    """The models of a suite; what they say of a task's cells is kept in the results' folder.

    Parameters
    ----------
    suite, out
        The suite and its results.
    report
        Told what takes long.
    progress
        Called with the number of cells embedded and in all.
    """

    def __init__(
        self, suite: Suite, out: Path, report: Report, progress: Progress = lambda done, total: None
    ) -> None:
        self._suite, self._out, self._report, self._progress = suite, out, report, progress
        self._opened = functools.lru_cache(maxsize=4)(self._open)
        self._transductive: dict[tuple[str, int, str], bool] = {}

    def open(self, name: str, task: str, fold: int, seed: int = 0) -> TrainedModel:
        """A model of the suite for a task's fold; an untrained one has the geometry of the task's first.

        Raises
        ------
        InputError
            A run that is not there, without a way to make it.
        """
        if name != UNTRAINED:
            return self._opened(name, fold)
        trained = self._opened(self.first(task), fold)
        build = model_builder(trained.config, len(trained.vocabulary))
        return replace(trained, parameters=initialise(build, jax.random.key(seed)))

    def first(self, task: str) -> str:
        """The first model that is for a task."""
        return self._suite.first_model(task)

    def transductive(self, name: str, fold: int, task: Task, test: Int64[np.ndarray, " m"]) -> bool:
        """Whether a model of the suite may have learnt from test cells, as far as its own corpus tells."""
        asked = name, fold, task.name
        if asked not in self._transductive:
            self._transductive[asked] = self._has_learnt(name, fold, task, test)
        return self._transductive[asked]

    def embedding(
        self, name: str, fold: int, task: Task, *, k: int, pooling: Pooling, seed: int = 0
    ) -> tuple[Float32[np.ndarray, "n d"], Cost]:
        """Of every cell of a task, seen with its `k` neighbours, and what it took when it was made.

        A row is NaN where the model knows none of the cell's genes.
        """
        model = self.open(name, task.name, fold, seed).with_neighbours(k)
        made_of = hashlib.sha256(f"{model.hash} {task.cohort.corpus.hash}".encode()).hexdigest()[:12]
        file = self._out / "embeddings" / f"{task.name}-{name}-k{k}-{pooling}-{made_of}.npz"
        if not file.exists():
            self._report(f"{task.name}, fold {fold}: cells as {name} sees them, k = {k}")
            corpus, number = task.cohort.seen_by(model)
            there = np.flatnonzero(number >= 0)
            embedded = np.full((task.cohort.corpus.n_cells, model.width), np.nan, np.float32)
            with Meter() as meter:
                config = EmbeddingConfig(pooling=pooling)
                embedded[there] = embed_cells(
                    model, corpus, number[there], config=config, progress=self._progress
                )
            file.parent.mkdir(exist_ok=True)
            partial = file.with_suffix(".partial.npz")
            cost = np.array([np.nan if part is None else part for part in meter.cost])
            np.savez(partial, embedding=embedded, cells=np.arange(len(embedded)), cost=cost)
            partial.replace(file)
        with np.load(file) as stored:
            seconds, mib = stored["cost"].tolist()
            return stored["embedding"], Cost(seconds, None if np.isnan(mib) else mib)

    def _has_learnt(self, name: str, fold: int, task: Task, test: Int64[np.ndarray, " m"]) -> bool:
        """Of the run and of those that its weights started from."""
        asked, folder = _places(task.cohort.corpus, test), self._folder(name, fold)
        while True:
            try:
                config, of_corpus = read_run(folder)
                corpus = Corpus.open(config.corpus)
            except InputError:
                return not self._suite.models[name].unseen
            # Weights that were merged or imported, or a corpus that has grown since: no one knows.
            if corpus.hash != of_corpus:
                return not self._suite.models[name].unseen
            if asked & _places(corpus, split_cells(corpus, config.split).train):
                return True
            if not config.initial_weights:
                return False
            folder = Path(config.initial_weights)

    def _folder(self, name: str, fold: int) -> Path:
        return self._suite.resolve(self._filled(self._suite.models[name].run, fold))

    def _filled(self, text: str, fold: int) -> str:
        return text.replace("{fold}", str(fold)).replace("{out}", str(self._out.absolute()))

    def _open(self, name: str, fold: int) -> TrainedModel:
        config, folder = self._suite.models[name], self._folder(name, fold)
        if config.pretraining:
            # Of two processes that want a run, one trains it, and the other finds it done.
            with locked(self._out / "corpora" / f".{name}-{fold}.lock"):
                self._pretrain(name, fold, folder)
        return open_model(folder, checkpoint=config.checkpoint)

    def _pretrain(self, name: str, fold: int, folder: Path) -> None:
        """Train, or go on training, a run; nothing happens to one that is done."""
        config = self._suite.models[name]
        how = config.pretraining
        assert how is not None
        files = how.files or tuple(self._suite.files)
        sources = [self._suite.files[file] for file in files]
        corpus = open_cohort(
            self._out / "corpora" / "-".join(files), sources, **read_tables(self._suite)
        ).corpus
        of_task = self._suite.tasks[(config.tasks or tuple(self._suite.tasks))[0]].split.groups
        group = of_task[fold] if fold < len(of_task) else ""
        flags = [self._filled(flag, fold).replace("{group}", group) for flag in how.flags]
        recipe = self._suite.resolve(how.recipe)
        run = override(load_recipe(recipe), ["--corpus", str(corpus.path), *flags], str(recipe))
        started = (folder / "config.json").exists()
        self._report(f"pretraining {name}, fold {fold}: {folder}")
        if train(run, folder, resume=started) < run.optimiser.steps:
            raise KeyboardInterrupt  # it has saved, and the next call goes on


def _places(corpus: Corpus, cells: np.ndarray) -> set[tuple[str, int]]:
    """File and row of cells."""
    source = [slide.source for slide in corpus.slides]
    rows = corpus.column("source_row", cells)
    return {(source[slide], int(row)) for slide, row in zip(corpus.slide_of(cells), rows)}
