"""The loader: the batch of step t as a pure function of (seed, t), on any number of hosts.

A window is a run of consecutive steps. Every virtual shard reads the samples of a window at once, sorts them
by the tokens that survive the mask, and deals them to the window's steps in that order, so that rows of a
batch are about equally long and little is padding; the steps of a window then follow in an order drawn by the
seed.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import grain
import jax
import numpy as np
from jaxtyping import Int64

from scfm_jax.corpus import BLOCK, Corpus
from scfm_jax.data.batch import Batch
from scfm_jax.data.ladder import Ladder, fit_ladder
from scfm_jax.data.masks import MaskRates
from scfm_jax.data.mixture import MixedStreams, slide_weights
from scfm_jax.data.ranks import RankConfig, TokenMask
from scfm_jax.data.stream import CellBlocks
from scfm_jax.data.tokens import Ragged, SampleConfig
from scfm_jax.errors import DataWarning, InputError, check_least

_CALIBRATION_WINDOWS, _CALIBRATION_SEED = 2, 0
_WINDOW_ORDER = 3  # beside the purposes of `stream`

# (name of a window, this host's lengths) to the greatest lengths of any host.
Exchange: TypeAlias = Callable[[str, Int64[np.ndarray, "steps 2"]], Int64[np.ndarray, "steps 2"]]


@dataclass(frozen=True)
class DataConfig:
    """How samples become batches.

    Attributes
    ----------
    sample
        What a sample holds: a cell and its neighbours, or a sentence of genes by rank.
    batch_size
        Samples of a step, over all hosts.
    virtual_shards
        V independent streams, fixed for the life of a run: V divides the batch size, and the number of hosts
        divides V.
    window
        Steps whose samples are sorted by length together.
    rungs
        Static lengths that typical batches are padded to; each costs a compilation.
    length_multiple
        Lengths are multiples of it (128 suits an accelerator).
    lengths
        Static lengths of the encoder's rows, and of what is decoded, ascending, in place of those that suit
        the training cells: runs on different cells then share their compilations. They go on as fitted ones
        do where a row is longer. Empty: fitted.
    pool_blocks
        Blocks of 64 cells that are shuffled together.
    prefetch
        Batches made ahead of the step.
    cache_mib
        Memory for decoded cells.
    readers
        Threads that read the corpus, a shard of a window each; they change nothing in the batches.
    weights
        How often cells are drawn, relative to others: ``field=value=weight`` with a field of technology,
        species, modality (spatial, dissociated) and tissue. Several that name a slide multiply; without any,
        every cell counts alike.
    """

    sample: SampleConfig | RankConfig = field(default_factory=SampleConfig)
    batch_size: int = 32
    virtual_shards: int = 1
    window: int = 64
    rungs: int = 16
    length_multiple: int = 8
    lengths: tuple[tuple[int, ...], ...] = ()
    pool_blocks: int = 256
    prefetch: int = 2
    cache_mib: int = 1_024
    readers: int = 2
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_least(
            self,
            1,
            "batch_size",
            "virtual_shards",
            "window",
            "rungs",
            "length_multiple",
            "pool_blocks",
            "readers",
            "cache_mib",
        )
        check_least(self, 0, "prefetch")
        if self.batch_size % self.virtual_shards:
            raise InputError(
                "data.virtual_shards",
                f"{self.virtual_shards} does not divide data.batch_size, {self.batch_size}",
                "choose a divisor",
            )
        if self.lengths and (
            len(self.lengths) != 2 or any(not of or list(of) != sorted(set(of)) for of in self.lengths)
        ):
            raise InputError(
                "data.lengths", f"{self.lengths} are not two ascending lists", "give two, or none to fit them"
            )

    def ladders(self, longest: tuple[int, int]) -> list[Ladder]:
        """Those of `lengths`, which hold what a reader may come with at the longest."""
        return [
            Ladder(rungs).reaching(most, self.length_multiple)
            for rungs, most in zip(self.lengths, longest, strict=True)
        ]


class Read(Protocol):
    """Samples that a reader has read, before they are padded: `Samples`, `Sentences`."""

    tokens: Ragged
    panel: Int64[np.ndarray, " n"]

    @property
    def lengths(self) -> Int64[np.ndarray, "n 2"]: ...

    def collate(self, rows: Int64[np.ndarray, " b"], first: int, second: int, size: int, /) -> Batch: ...


class Reader(Protocol):
    """What reads the samples of a family: `SampleReader`, `RankReader`."""

    @property
    def longest(self) -> tuple[int, int]: ...

    def read(self, cells: Int64[np.ndarray, " n"], /, *, draw: int, seed: int, rates: Any) -> Read: ...


@dataclass
class _Part:
    """One shard's samples of a window, and which of them go to which step."""

    samples: Read
    rows: list[Int64[np.ndarray, " r"]]  # by step of the window
    lengths: Int64[np.ndarray, "steps 2"]  # longest row of each step


@dataclass
class _Window:
    """This host's parts of a window, and the longest row of each step over all hosts."""

    parts: list[_Part]
    lengths: Int64[np.ndarray, "steps 2"]


class Loader:
    """Training batches.

    Parameters
    ----------
    corpus
        Open corpus.
    centres
        Cells to train on: their numbers, ascending, or what holds them in a bit each.
    config
        How samples become batches.
    seed
        Of the experiment: order and masks.
    rates
        Of the mask.
    host
        This host's number and how many there are; it gets a contiguous run of shards and their rows of the
        batch.
    exchange
        How hosts tell each other the lengths of their rows, which the static length of a step must hold. If
        not given, each host reads the samples of all shards instead: the same batches, at a cost that grows
        with the hosts.

    Raises
    ------
    InputError
        No cells, fewer blocks than shards, hosts that do not divide the shards, or weights that no slide has.
    """

    def __init__(
        self,
        corpus: Corpus,
        centres: Int64[np.ndarray, " n"] | CellBlocks,
        config: DataConfig,
        *,
        seed: int,
        rates: MaskRates | TokenMask | None,
        host: tuple[int, int] = (0, 1),
        exchange: Exchange | None = None,
    ) -> None:
        if not len(centres):
            raise InputError(corpus.path, "has no cell to train on", "loosen the split or the filters")
        number, hosts = host
        if config.virtual_shards % hosts:
            raise InputError(
                "data.virtual_shards",
                f"{hosts} hosts do not divide {config.virtual_shards} shards",
                "choose a multiple of the hosts",
            )
        self.config, self._seed, self._rates = config, seed, rates
        self._rows = config.batch_size // config.virtual_shards
        own = config.virtual_shards // hosts
        self._own = range(number * own, (number + 1) * own)
        self._read = self._own if exchange or hosts == 1 else range(config.virtual_shards)
        self._exchange: Exchange = exchange or (lambda name, lengths: lengths)
        self._pool = ThreadPoolExecutor(config.readers, thread_name_prefix="scfm-reader")
        _check_cache(corpus, config, own)
        self._reader: Reader = config.sample.reader(corpus)
        cells = centres if isinstance(centres, CellBlocks) else CellBlocks.of(corpus, centres)
        weights = None
        if config.weights:
            weights = slide_weights(corpus, config.weights)[corpus.slide_of(cells.first)]
        self._streams, calibration = (
            MixedStreams(
                cells,
                weights,
                n_shards=config.virtual_shards,
                seed=number,
                pool_blocks=config.pool_blocks,
            )
            for number in (seed, _CALIBRATION_SEED)
        )
        self._asked: OrderedDict[int, list[Future[_Part]]] = OrderedDict()
        self._windows: OrderedDict[int, _Window] = OrderedDict()
        self._lock = threading.Lock()
        if config.lengths:
            self.ladders = config.ladders(self._reader.longest)
            return
        # Not with the run's seed: runs that differ in the seed alone share their shapes, and so their
        # compilations.
        observed = np.concatenate(
            [
                self._join(f"calibration {number}", self._ask(calibration, _CALIBRATION_SEED, number)).lengths
                for number in range(_CALIBRATION_WINDOWS)
            ]
        )
        self.ladders = [
            fit_ladder(lengths, n_rungs=config.rungs, multiple=config.length_multiple, longest=longest)
            for lengths, longest in zip(observed.T, self._reader.longest, strict=True)
        ]

    def batch(self, step: int, *, stop: int = 0) -> Batch:
        """This host's rows of the batch of `step`, NumPy arrays.

        The next window is read meanwhile if it begins before step `stop`.
        """
        number, place = divmod(step, self.config.window)
        window = self._window(number, stop)
        first, second = (
            ladder.rung(int(longest))
            for ladder, longest in zip(self.ladders, window.lengths[place], strict=True)
        )
        rows = [part.samples.collate(part.rows[place], first, second, self._rows) for part in window.parts]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *rows) if len(rows) > 1 else rows[0]

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps `start` to `stop`, made ahead in a thread (Grain)."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self.config.prefetch)
        steps = grain.MapDataset.source(_Steps(self, stop))[start:]
        return iter(steps.to_iter_dataset(options))

    def _window(self, number: int, stop: int) -> _Window:
        with self._lock:
            if number not in self._windows:
                for ahead in (number, number + 1):
                    if ahead not in self._asked and (ahead == number or ahead * self.config.window < stop):
                        self._asked[ahead] = self._ask(self._streams, self._seed, ahead)
                self._windows[number] = self._join(str(number), self._asked.pop(number))
                for kept in (self._windows, self._asked):
                    if len(kept) > 2:
                        kept.popitem(last=False)
            return self._windows[number]

    def _ask(self, streams: MixedStreams, seed: int, number: int) -> list[Future[_Part]]:
        return [self._pool.submit(self._read_part, streams, seed, number, shard) for shard in self._read]

    def _join(self, name: str, asked: list[Future[_Part]]) -> _Window:
        parts = [part.result() for part in asked]
        lengths = self._exchange(name, np.max([part.lengths for part in parts], axis=0))
        own = slice(self._own.start - self._read.start, self._own.stop - self._read.start)
        return _Window(parts[own], lengths)

    def _read_part(self, streams: MixedStreams, seed: int, number: int, shard: int) -> _Part:
        steps, per_window = self.config.window, self.config.window * self._rows
        order = np.random.default_rng([seed, _WINDOW_ORDER, number]).permutation(steps)
        cells = streams.draw(shard, number * per_window, (number + 1) * per_window)
        read = self._reader.read(cells, draw=number * steps, seed=seed, rates=self._rates)
        groups = order_by_length(read).reshape(steps, self._rows)
        lengths = np.empty((steps, 2), np.int64)
        lengths[order] = read.lengths[groups].max(1)
        return _Part(read, [groups[rank] for rank in np.argsort(order)], lengths)


def _check_cache(corpus: Corpus, config: DataConfig, shards: int) -> None:
    """Warn where blocks will be read again in every window, since memory does not hold the pools."""
    slides = corpus.manifest["slides"]
    of_block = BLOCK * corpus.entry_bytes * sum(slide["nnz"] for slide in slides) / corpus.n_cells
    # A block's neighbours lie in about as many blocks again.
    halo = 2 if config.sample.stored_neighbours else 1
    needed = min(shards * config.pool_blocks, corpus.n_cells / BLOCK / halo) * halo * of_block
    if needed > corpus.cache_bytes / 2:
        warnings.warn(
            f"{corpus.path}: the pools of {shards} shards take {needed / 2**20:,.0f} MiB, half of "
            f"data.cache_mib is {corpus.cache_bytes / 2**21:,.0f}: raise it or lower data.pool_blocks",
            DataWarning,
            stacklevel=3,
        )


class _Steps:
    """Grain's random-access source whose element t is the batch of step t."""

    def __init__(self, loader: Loader, n_steps: int) -> None:
        self._loader, self._n_steps = loader, n_steps

    def __len__(self) -> int:
        return self._n_steps

    def __getitem__(self, step: int) -> Batch:
        return self._loader.batch(int(step), stop=self._n_steps)


def evaluation_batches(
    corpus: Corpus,
    centres: Int64[np.ndarray, " n"],
    config: DataConfig,
    *,
    seed: int,
    rates: MaskRates | TokenMask | None,
    draw: int,
) -> Iterator[tuple[Int64[np.ndarray, " b"], Batch]]:
    """Every centre once, in batches of about equal length, with the place of each row in `centres`.

    The mask is that of step `draw`, the same at every evaluation. Only the last batch is filled up, with rows
    of weight 0.
    """
    reader: Reader = config.sample.reader(corpus)
    window = config.window * config.batch_size
    multiple, ladders = config.length_multiple, config.ladders(reader.longest) if config.lengths else None
    for start in range(0, len(centres), window):
        samples = reader.read(centres[start : start + window], draw=draw, seed=seed, rates=rates)
        order = order_by_length(samples)
        for first in range(0, len(order), config.batch_size):
            rows = order[first : first + config.batch_size]
            longest = samples.lengths[rows].max(0).tolist()
            first_length, second = (
                (ladder.rung(length) for ladder, length in zip(ladders, longest, strict=True))
                if ladders
                else (min(_coarse(length, multiple), most) for length, most in zip(longest, reader.longest))
            )
            yield start + rows, samples.collate(rows, first_length, second, config.batch_size)


def order_by_length(samples: Read) -> Int64[np.ndarray, " n"]:
    """Samples by panel, and within one by tokens: shortest first and longest first in turn.

    Where one panel ends and the next begins, rows of like length meet, and a batch across the border pads
    little.
    """
    direction = np.where(samples.panel % 2, -1, 1)
    return np.lexsort((direction * samples.tokens.lengths, samples.panel))


def _coarse(length: int, multiple: int) -> int:
    """`length` rounded up to an eighth of its power of two, so that an evaluation compiles few shapes."""
    step = max(multiple, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step
