"""Streams: long stretches of frames, dealt in consecutive chunks, so that a state can be carried from chunk to chunk.

Each place in a batch is a lane. A lane goes along one stream, chunk after chunk; where that ends it starts anew with
another one, whatever its neighbours do.

Axes: N streams, B batch (lanes of a process).
"""

from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heapreplace
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from datamodules.sampler import PADDING, Draw
from forecast.batch import Batch

Whole = NDArray[np.int64]


class Streams(Protocol):
    """The streams of the training split. Their chunks are numbered through, stream after stream."""

    chunks: Whole
    """N: chunks of each stream."""

    def __len__(self) -> int:
        """All chunks."""
        ...

    def __getitem__(self, draw: Draw) -> Batch:
        """The chunks of those numbers: `past` is a chunk, `future` what follows it, `first` where it begins a stream."""
        ...


class Chunks(NamedTuple):
    """Where chunks lie."""

    stream: Whole
    """B."""
    number: Whole
    """B: of the chunk in its stream, from 0."""


def locate(chunks: Whole, positions: Sequence[int]) -> Chunks:
    """The streams, and the chunks within them, of chunks that are numbered through; `PADDING` is shown the first one."""
    begins = np.concatenate([[0], np.cumsum(chunks)])
    position = np.maximum(np.asarray(positions, dtype=np.int64), 0)
    stream = np.searchsorted(begins, position, side="right") - 1
    return Chunks(stream, position - begins[stream])


def unsigned(seed: int) -> int:
    """A seed as NumPy takes it, which may be below 0 here."""
    return seed & 0xFFFF_FFFF_FFFF_FFFF


def drawn(epoch: int, seed: int, *further: int) -> np.random.Generator:
    """What is random in the streams of an epoch."""
    return np.random.default_rng([unsigned(seed), epoch, *further])


class LaneSampler(Sampler[Draw]):
    """Deals streams to `lanes` lanes, and the lanes to `world_size` processes.

    The longest streams are dealt first, each to the lane that has least, so that the lanes end together as nearly as whole
    streams allow; those that end earlier are filled up with padding. Which of several streams of one length a lane gets, and
    in which order it takes its own, is a function of (seed, epoch); the number of batches is the same in all epochs.

    Args:
        chunks: of each stream.
        lanes: of all processes together.
        seed, rank, world_size, begin_at: as in `datamodules.sampler.BatchSampler`.
    """

    def __init__(
        self,
        chunks: Whole,
        lanes: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        begin_at: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self.chunks = chunks
        self.lanes = lanes
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.begin_at = begin_at
        self._length = max(int(chunks[own].sum()) for own in self._streams(0))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Draw]:
        begin = 0
        if self.begin_at is not None:
            self.epoch, begin = self.begin_at()
        epoch = self.epoch
        begins = np.concatenate([[0], np.cumsum(self.chunks)])
        mine = []
        for own in self._streams(epoch)[self.rank :: self.world_size]:
            positions = list(chain.from_iterable(range(begins[one], begins[one + 1]) for one in own))
            mine.append(positions + [PADDING] * (len(self) - len(positions)))
        for step in range(begin, len(self)):
            yield Draw(epoch, tuple(lane[step] for lane in mine))

    def _streams(self, epoch: int) -> list[list[int]]:
        """The streams of each lane, in their order."""
        random = drawn(epoch, self.seed)
        shuffled = random.permutation(len(self.chunks))
        order = shuffled[np.argsort(-self.chunks[shuffled], kind="stable")]
        loads = [(0, lane) for lane in range(self.lanes)]
        heapify(loads)
        dealt: list[list[int]] = [[] for _ in range(self.lanes)]
        for stream in order.tolist():
            load, lane = loads[0]
            dealt[lane].append(stream)
            heapreplace(loads, (load + int(self.chunks[stream]), lane))
        return [random.permutation(own).tolist() for own in dealt]
