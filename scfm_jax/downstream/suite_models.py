"""The models of a suite in a fold: pretrained where they are missing, opened, and kept from test cells."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32

from scfm_jax.corpus import Corpus
from scfm_jax.corpus.split import split_cells
from scfm_jax.downstream.cohort import open_cohort
from scfm_jax.downstream.embed import EmbeddingConfig, embed_cells
from scfm_jax.downstream.model import TrainedModel, open_model
from scfm_jax.downstream.question import Question
from scfm_jax.downstream.suite_config import EXPRESSION, UNTRAINED, Suite
from scfm_jax.downstream.suite_tasks import Task, read_tables
from scfm_jax.errors import InputError
from scfm_jax.models.functional import initialise
from scfm_jax.models.heads import Pooling
from scfm_jax.training.config import load_recipe, override
from scfm_jax.training.run import read_run
from scfm_jax.training.task import model_builder
from scfm_jax.training.train import train

Report = Callable[[str], None]


class Models:
    """The models of a suite; what they say of a task's cells is kept in the results' folder.

    Parameters
    ----------
    suite, out
        The suite and its results.
    report
        Told what takes long.
    """

    def __init__(self, suite: Suite, out: Path, report: Report) -> None:
        self._suite, self._out, self._report = suite, out, report
        self._opened = functools.lru_cache(maxsize=4)(self._open)

    def open(self, name: str, fold: int, seed: int = 0) -> TrainedModel:
        """A model of the suite in a fold; an untrained one has the geometry of the first.

        Raises
        ------
        InputError
            A run that is not there, without a way to make it.
        """
        if name == UNTRAINED:
            trained = self._opened(next(iter(self._suite.models)), fold)
            build = model_builder(trained.config, len(trained.vocabulary))
            return replace(trained, parameters=initialise(build, jax.random.key(seed)))
        return self._opened(name, fold)

    def transductive(self, name: str, fold: int, task: Task, question: Question) -> bool:
        """Whether the model may have learnt from test cells, as far as its own corpus tells."""
        if name in (UNTRAINED, EXPRESSION):
            return False
        config, _ = read_run(self._folder(name, fold))
        try:
            corpus = Corpus.open(config.corpus)
        except InputError:
            return not self._suite.models[name].unseen
        learnt = split_cells(corpus, config.split)
        mine = _places(task.cohort.corpus, question.fold.test)
        return bool(mine & _places(corpus, learnt.train))

    def embedding(
        self, name: str, fold: int, task: Task, *, k: int, pooling: Pooling, seed: int = 0
    ) -> Float32[np.ndarray, "n d"]:
        """Of every cell of a task, seen with its `k` neighbours; NaN where the model knows no gene."""
        model = self.open(name, fold, seed).with_neighbours(k)
        file = self._out / "embeddings" / f"{task.name}-{name}-k{k}-{pooling}-{model.hash[:12]}.npz"
        if file.exists():
            with np.load(file) as stored:
                return stored["embedding"]
        self._report(f"{task.name}, fold {fold}: cells as {name} sees them, k = {k}")
        corpus, number = task.cohort.seen_by(model)
        there = np.flatnonzero(number >= 0)
        embedded = np.full((task.cohort.corpus.n_cells, model.width), np.nan, np.float32)
        embedded[there] = embed_cells(model, corpus, number[there], config=EmbeddingConfig(pooling=pooling))
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, embedding=embedded, cells=np.arange(len(embedded)))
        partial.replace(file)
        return embedded

    def _folder(self, name: str, fold: int) -> Path:
        return self._suite.resolve(self._suite.models[name].run.format(fold=fold, out=self._out.absolute()))

    def _open(self, name: str, fold: int) -> TrainedModel:
        config, folder = self._suite.models[name], self._folder(name, fold)
        if config.pretraining:
            self._pretrain(name, fold, folder)
        return open_model(folder, checkpoint=config.checkpoint)

    def _pretrain(self, name: str, fold: int, folder: Path) -> None:
        """Train, or go on training, a run; nothing happens to one that is done."""
        how = self._suite.models[name].pretraining
        assert how is not None
        files = how.files or tuple(self._suite.files)
        sources = [self._suite.files[file] for file in files]
        corpus = open_cohort(
            self._out / "corpora" / "-".join(files), sources, **read_tables(self._suite)
        ).corpus
        config = self._suite.models[name]
        of_task = self._suite.tasks[(config.tasks or tuple(self._suite.tasks))[0]].split.groups
        group = of_task[fold] if of_task else ""
        flags = [flag.format(fold=fold, group=group, out=self._out.absolute()) for flag in how.flags]
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
