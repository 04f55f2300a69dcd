"""What every datamodule of stormcell has: three splits of windows, dealt by our own sampler as whole batches."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from datamodules.decoding import decode
from datamodules.sampler import BatchSampler, Draw
from datamodules.streams import LaneSampler, Streams
from forecast.batch import Batch, Frames
from forecast.errors import UserError
from forecast.units import Grid, Quantity, Transform

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Windows(Protocol):
    """The windows of one split."""

    blocks: int
    """Number of rain events (or groups of sequences): `Batch.block` runs from 0 to blocks-1."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw) -> Batch: ...

    def issue_times(self) -> NDArray[np.int64]:
        """`Batch.time` of each window, in their order, without reading a frame."""


class FrameData(pl.LightningDataModule):
    """A Lightning datamodule that deals `Batch`, and knows what its numbers mean.

    A subclass sets the attributes below by the end of `setup` and answers `windows(split)` and `terms(split)`.

    Args:
        past: frames given, T.
        future: frames to forecast, S.
        batch_size: windows in a batch, on each process.
        workers: processes that make batches beside the training; 0 makes them in the training process.
        seed: of everything random in the samples.
        after: frames given that follow those to forecast, which then fill a gap, A.
    """

    quantity: Quantity
    grid: Grid
    """Of the frames that are dealt (after cropping)."""
    transform: Transform
    """Physical values <-> what the network sees."""
    cadence: int | None
    """Seconds between frames; None where frames have no time (digits)."""
    static_channels: int = 0
    """Number of static fields, K."""
    accumulate: int = 1
    """Frames whose mean is one frame to forecast."""

    def __init__(self, past: int, future: int, batch_size: int, workers: int, seed: int, after: int = 0) -> None:
        super().__init__()
        for name, value, least in (
            ("past", past, 1),
            ("future", future, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("after", after, 0),
        ):
            if value < least:
                raise UserError(f"data.{name} is {value}; it must be at least {least}.")
        self.past = past
        self.future = future
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.after = after
        self._resumed_at = (0, 0)
        self._streams: Streams | None = None

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Opens and checks everything; a second call does nothing."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal for equal data: no path, no date, and not the run's seed."""

    @abstractmethod
    def windows(self, split: Split) -> Windows:
        """The windows of that split; the same object at each call."""

    @abstractmethod
    def terms(self, split: Split) -> dict[str, Any]:
        """What is scored in that split, as plain values by name: equal where scores may stand side by side.

        What a model is given (past frames, static fields, training data) is none of it.
        """

    @property
    def following(self) -> int:
        """Frames of a window that follow its past: `Batch.future` has so many."""
        return self.future * self.accumulate + self.after

    @property
    def lead(self) -> int | None:
        """Seconds between frames to forecast; None where frames have no time."""
        return None if self.cadence is None else self.cadence * self.accumulate

    @property
    def task(self) -> str:
        """How many frames are given, and how many are to be forecast from them, in words."""
        given = f"{self.past} before + {self.after} after" if self.after else f"{self.past}"
        mean = f"x the mean of {self.accumulate} " if self.accumulate > 1 else ""
        return f"{given} -> {self.future} {mean}frames"

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Frames:
        """Decodes a batch on the device: packed numbers travel, physical values do not.

        The last `after` frames of a window are given like its past, and those before them are the truth, `accumulate` of
        them in each of its frames: their mean, valid where all of them are.
        """
        past, known = decode(self.quantity, batch.past)
        truth, valid = decode(self.quantity, batch.future)
        if self.after:
            gap = truth.shape[1] - self.after
            past, known = torch.cat([past, truth[:, gap:]], dim=1), torch.cat([known, valid[:, gap:]], dim=1)
            truth, valid = truth[:, :gap], valid[:, :gap]
        if self.accumulate > 1:
            truth, valid = (one.unflatten(1, (-1, self.accumulate)) for one in (truth, valid))
            truth, valid = truth.mean(2), valid.all(2)
            truth = torch.where(valid, truth, self.quantity.floor)
        valid = valid & (batch.block >= 0).view(-1, 1, 1, 1, 1)
        return Frames(past, known, truth, valid, batch.static, batch.time, batch.block, batch.first)

    def decoded(self, split: Split, positions: Sequence[int]) -> Iterator[Frames]:
        """Those windows of a split in that order, decoded, `batch_size` at a time and the rest at last: no padding."""
        windows = self.unweighted(split)
        for first in range(0, len(positions), self.batch_size):
            part = tuple(positions[first : first + self.batch_size])
            yield self.on_after_batch_transfer(windows[Draw(0, part)], 0)

    @abstractmethod
    def streams(self, chunk: int, length: int | None) -> Streams:
        """The streams of the training split, of whole chunks.

        Args:
            chunk: frames of a chunk.
            length: frames of a stream at most; None: as long as the data have it.

        Raises:
            UserError: there is none.
        """

    def train_along_streams(self, chunk: int, length: int | None) -> None:
        """From now on training batches are chunks of streams, one stream in each lane, and no windows.

        Raises:
            UserError: a window is not the frames of a stream in their order.
        """
        if self.after or self.accumulate > 1:
            raise UserError(
                f"tbptt.steps trains along streams, in which the next frames are to be forecast, but data.after is "
                f"{self.after} and one frame is the mean of {self.accumulate}; set tbptt.steps=null."
            )
        self._streams = self.streams(chunk, length)

    def unweighted(self, split: Split) -> Windows:
        """The windows of that split, drawn by chance alone where training favours some."""
        return self.windows(split)

    def references(self) -> Mapping[str, Any]:
        """Forecasters that only this data can offer (an oracle that knows how the frames were made), by name."""
        return {}

    def state_dict(self) -> dict[str, int]:
        """Where training goes on: an epoch, the number of its batches that are done, and how its samples are dealt."""
        assert self.trainer is not None
        done = self.trainer.fit_loop.epoch_loop.batch_progress
        epoch, batch = self.trainer.current_epoch, done.current.ready
        if done.is_last_batch:
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, **self._dealt()}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Goes on where a training was left.

        Raises:
            UserError: inside an epoch whose samples would be dealt otherwise now.
        """
        for name, now in self._dealt().items() if self.trainer is not None else ():
            then = state_dict.get(name)
            if state_dict["batch"] and then != now:
                raise UserError(
                    f"The checkpoint lies inside an epoch with {name.replace('_', ' ')} {then}, but this run has {now}; go "
                    "on with the same, or train anew from its weights by init_from."
                )
        self._resumed_at = (state_dict["epoch"], state_dict["batch"])

    def _dealt(self) -> dict[str, int]:
        """What the order of the samples hangs on, beside the epoch."""
        assert self.trainer is not None
        dealt = {"seed": self.seed, "samples_a_batch_of_all_processes": self.batch_size * self.trainer.world_size}
        return dealt if self._streams is None else {**dealt, "chunks_of_streams": len(self._streams)}

    def _begin_at(self) -> tuple[int, int]:
        """Epoch and batch that are drawn next. Lightning draws the first ones before it knows where a run goes on."""
        assert self.trainer is not None
        return max((self.trainer.current_epoch, 0), self._resumed_at)

    def _loader(self, split: Split) -> DataLoader[Batch]:
        trainer = self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        begin_at = self._begin_at if trainer is not None and split == "train" else None
        dealt: Windows | Streams
        sampler: LaneSampler | BatchSampler
        if split == "train" and self._streams is not None:
            dealt = self._streams
            sampler = LaneSampler(
                dealt.chunks,
                self.batch_size * world_size,
                seed=self.seed,
                rank=rank,
                world_size=world_size,
                begin_at=begin_at,
            )
        else:
            dealt = self.windows(split)
            sampler = BatchSampler(
                len(dealt),
                self.batch_size,
                shuffle=split == "train",
                seed=self.seed,
                rank=rank,
                world_size=world_size,
                begin_at=begin_at,
            )
        return DataLoader(
            dealt,  # type: ignore[arg-type]  # a map of draws, not of integers, which torch's types do not foresee
            sampler=sampler,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader("test")
