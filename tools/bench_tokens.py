"""Speed of tokens on the host: a table, and JSON.

    python tools/bench_tokens.py ranks
    python tools/bench_tokens.py tissue

Both build a small corpus of random counts once, in ``--folder``. ``ranks``: cells a second from rows, held in
memory, to masked sentences. ``tissue``: tokens a second through `Loader.batch`, where the corpus reads from
its warm cache and where its answers are held; and of what the authors' code does with such cells, in plain
NumPy: a dense row of all genes for each cell of a sample, of which the non-zero ones are gathered.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import tyro

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.data.batch import Batch
from scfm_jax.data.loader import DataConfig, Loader
from scfm_jax.data.masks import MaskRates
from scfm_jax.data.ranks import RankConfig, TokenMask
from scfm_jax.data.tokens import SampleConfig
from scfm_jax.genes import Vocabulary

N_GENES, DENSE_GENES = 20_000, 19_266
RATES = MaskRates(0.30, 0.03)


@dataclass
class Arguments:
    """Measure sentences or tissue samples."""

    what: Annotated[Literal["ranks", "tissue"], tyro.conf.Positional]
    folder: Path = Path("bench_tokens")
    """Where the corpora are kept."""
    cells: int = 4_096
    """Cells of a reading of sentences."""
    neighbours: int = 32
    repeats: int = 5
    json: Path | None = None


class Held:
    """A corpus whose answers are kept once given: what reads from it is measured without it."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus, self._answers = corpus, dict[Any, Any]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._corpus, name)
        if name not in ("cells", "neighbours", "column", "slide_of"):
            return found

        def answer(*arguments: Any) -> Any:
            of = name, *(x.tobytes() if isinstance(x, np.ndarray) else x for x in arguments)
            if of not in self._answers:
                self._answers[of] = found(*arguments)
            return self._answers[of]

        return answer


def corpus_of(folder: Path, *, n_cells: int, panel: int, expressed: int) -> Corpus:
    """Random counts: cells on a square, with half to one and a half times `expressed` genes of the panel."""
    path = folder / f"{n_cells}_{panel}_{expressed}"
    if not (path / "corpus").exists():
        random = np.random.default_rng(0)
        names = [f"ENSG{number:011d}" for number in range(N_GENES)]
        measured = np.sort(random.permutation(N_GENES)[:panel])
        often = np.log(random.gamma(0.5, size=panel) + 1e-3)
        rows = []
        for _ in range(n_cells // 200):
            order = (often + random.gumbel(size=(200, panel))).argsort(1)[:, ::-1]
            number = random.integers(expressed // 2, 1 + 3 * expressed // 2, (200, 1))
            row, rank = np.nonzero(np.arange(panel) < number)
            counts = 1 + random.geometric(0.4, len(row)) * random.geometric(0.7, len(row)) // 2
            rows.append(sp.csr_array((counts.astype(np.float32), (row, order[row, rank])), (200, panel)))
        data = anndata.AnnData(
            sp.csr_matrix(sp.vstack(rows)),
            var=pd.DataFrame(index=[names[gene] for gene in measured]),
            obsm={"spatial": random.uniform(0, 15 * n_cells**0.5, (n_cells, 2))},
        )
        path.mkdir(parents=True, exist_ok=True)
        data.write_h5ad(path / "cells.h5ad")
        source = Source(path=str(path / "cells.h5ad"), species="human", technology="xenium", um_per_unit=1.0)
        vocabulary = Vocabulary.from_names([(names, "human")])
        build_corpus(path / "corpus", [source], vocabulary=vocabulary, n_neighbours=32)
    return Corpus.open(path / "corpus")


def ranks(arguments: Arguments) -> dict[str, Any]:
    corpus: Any = Held(corpus_of(arguments.folder, n_cells=8_000, panel=N_GENES, expressed=800))
    reader = RankConfig().reader(corpus)
    cells = np.random.default_rng(0).permutation(corpus.n_cells)[: arguments.cells]
    mask = TokenMask(0.15)
    calls = {
        "sentences and masked places": lambda: reader.read(cells, draw=1, seed=0, rates=mask),
        "sentences alone": lambda: reader.read(cells),
    }
    return {
        name: measured(name, "cells", call, lambda _: len(cells), arguments.repeats)
        for name, call in calls.items()
    }


def tissue(arguments: Arguments) -> dict[str, Any]:
    corpus = corpus_of(arguments.folder, n_cells=20_000, panel=1_000, expressed=150)
    config = DataConfig(sample=SampleConfig(neighbours=arguments.neighbours), window=16)
    every = np.arange(corpus.n_cells)
    corpus.cells(every)
    result, held = {}, Held(corpus)
    for name, source in (("through Loader.batch", corpus), ("the same, corpus held", held)):
        loader = Loader(source, every, config, seed=0, rates=RATES)  # type: ignore[arg-type]
        # New windows where the corpus reads, the same one where its answers are held.
        windows = itertools.repeat(0) if source is held else itertools.count()

        def batches(loader: Loader = loader, windows: Iterator[int] = windows) -> list[Batch]:
            loader._windows.clear()
            first = config.window * next(windows)
            return [loader.batch(first + step) for step in range(config.window)]

        result[name] = measured(
            name, "tokens", batches, lambda found: sum(batch.real[0] for batch in found), arguments.repeats
        )
    result["the authors' dense rows"] = measured(
        "the authors' dense rows",
        "tokens",
        lambda: dense(corpus, 32, arguments.neighbours),
        int,
        arguments.repeats,
    )
    median = {name: np.median(found["a second"]) for name, found in result.items()}
    print(
        {name: round(float(value / median["the authors' dense rows"]), 1) for name, value in median.items()}
    )
    return result


def dense(corpus: Corpus, n_samples: int, k: int) -> int:
    """Tokens of samples by way of dense rows of all genes, unmasked."""
    centres = np.arange(n_samples) * (corpus.n_cells // n_samples)
    n_tokens = 0
    for members in np.concatenate([centres[:, None], corpus.neighbours(centres, k)], axis=1):
        rows = corpus.cells(members)
        values = np.zeros((k + 1, DENSE_GENES), np.float32)
        cell = np.repeat(np.arange(k + 1), np.diff(rows.offsets))
        inside = rows.genes < DENSE_GENES
        values[cell[inside], rows.genes[inside]] = rows.counts[inside]
        cells, genes = np.nonzero(values)
        counts = values[cells, genes]
        n_tokens += len(counts)
    return n_tokens


def measured(
    name: str, unit: str, call: Callable[[], Any], count: Callable[[Any], int], repeats: int
) -> dict[str, list[float]]:
    """What a call makes in a second of the clock, and of processor time, after one that is not counted."""
    count(call())
    wall, core = [], []
    for _ in range(repeats):
        clock, processor = time.perf_counter(), time.process_time()
        found = call()
        seconds = time.perf_counter() - clock, time.process_time() - processor
        wall.append(count(found) / seconds[0])
        core.append(count(found) / seconds[1])
    for of, speeds in (("second", wall), ("core-second", core)):
        print(
            f"{name:<32}{unit + ' / ' + of:<24}"
            f"{np.median(speeds):14,.0f}{min(speeds):14,.0f}{max(speeds):14,.0f}",
            flush=True,
        )
    return {"a second": wall, "a core-second": core}


def main(arguments: Arguments) -> None:
    print(f"{'':<56}{'median':>14}{'least':>14}{'most':>14}")
    result = {"ranks": ranks, "tissue": tissue}[arguments.what](arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
