"""Which samples a process draws, and in which order: one rule for one process and for many."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One batch to be made. A dataset answers `dataset[draw]` with a whole `Batch`."""

    epoch: int
    """A sample is a function of (seed, split, epoch, position) alone, whichever worker process makes it."""
    positions: tuple[int, ...]
    """Positions in the dataset; `PADDING` asks for a sample that is scored nowhere (block -1)."""


PADDING = -1


class BatchSampler(Sampler[Draw]):
    """Deals the positions 0 .. length-1 to `world_size` processes, each once.

    Where they do not come out even, the last batches are filled up with padding, marked as such: every process takes the
    same number of batches, every batch has the same shape, and no sample is scored twice. The order is a function of
    (seed, epoch).

    Use it as `DataLoader(dataset, sampler=BatchSampler(...), batch_size=None)` with Lightning's
    `use_distributed_sampler=False`. The epoch, and the batch of it to begin with, are what `begin_at` says when drawing
    begins; else the epoch is what `set_epoch` said, from its first batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        begin_at: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.begin_at = begin_at

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def share(self) -> int:
        """Samples per process, padding included."""
        return len(self) * self.batch_size

    def __len__(self) -> int:
        return -(-self.length // (self.world_size * self.batch_size))

    def __iter__(self) -> Iterator[Draw]:
        begin = 0
        if self.begin_at is not None:
            self.epoch, begin = self.begin_at()
        epoch = self.epoch
        if self.shuffle:
            # A prime between the seeds keeps epoch 1 of seed 0 from being epoch 0 of seed 1.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) & 0x7FFF_FFFF_FFFF_FFFF)
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length))
        order += [PADDING] * (self.share * self.world_size - self.length)
        mine = order[self.rank :: self.world_size]
        for start in range(begin * self.batch_size, self.share, self.batch_size):
            yield Draw(epoch, tuple(mine[start : start + self.batch_size]))
