"""Windows and streams cut from radar archives: read as they are asked for, a batch at a time.

Axes: B batch, L frames, C = 1 channel, K static fields, N windows or streams, H W space.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.generators import integers
from datamodules.reader import Archive
from datamodules.sampler import Draw
from datamodules.streams import Whole, drawn, locate, unsigned
from datamodules.windows import RunIndex, Times, WindowIndex
from forecast.batch import Batch
from forecast.units import Grid


class Crop(NamedTuple):
    """A square of `size` pixels: at random where there is a seed, in the middle otherwise. No size: the whole frame."""

    size: int | None
    seed: int | None = None
    draws: int = 1
    """Places drawn, of which the wettest is taken."""

    def corners(self, frames: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The upper left corners of each draw, for each of N windows: a function of (seed, epoch, its number).

        Args:
            frames: N 2, heights and widths of the frames that the windows are cut from.
            epoch: of the training.

        Returns:
            N draws 2, rows and columns.
        """
        if self.size is None:
            return np.zeros((len(frames), 1, 2), dtype=np.int64)
        room = frames - self.size
        if self.seed is None:
            return room[:, None] // 2
        # Those of an epoch together: to draw them window by window takes longer than to cut the windows.
        most = np.tile(room, self.draws)
        return integers((unsigned(self.seed), epoch), np.arange(len(frames)), most).reshape(-1, self.draws, 2)


class RadarCuts:
    """Archives, and the squares that are cut from them for N windows or streams.

    Args:
        archives: to read from.
        fields: static ones, K H W of each archive.
        crop: what is cut from each frame.
        sources: N, which archive each is cut from.
    """

    def __init__(
        self,
        archives: Sequence[Archive],
        fields: Sequence[NDArray[np.float32]],
        crop: Crop,
        sources: NDArray[np.int64],
    ) -> None:
        self.archives = archives
        self.fields = fields
        self.crop = crop
        self.sources = sources
        self._corners: tuple[int, NDArray[np.int64]] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """H W of what is cut."""
        return self.archives[0].grid.size if self.crop.size is None else (self.crop.size, self.crop.size)

    def places(self, epoch: int, number: int) -> list[tuple[slice, slice]]:
        """The rows and columns of each draw, for one of the N in an epoch."""
        if self._corners is None or self._corners[0] != epoch:
            frames = np.array([archive.grid.size for archive in self.archives])[self.sources]
            self._corners = epoch, self.crop.corners(frames, epoch)
        height, width = self.size
        return [(slice(y, y + height), slice(x, x + width)) for y, x in self._corners[1][number].tolist()]

    def cut(
        self, epoch: int, numbers: Sequence[int], spans: Sequence[slice], judged: Sequence[slice]
    ) -> tuple[Tensor, Tensor]:
        """Frames and static fields of B of the N.

        Args:
            epoch: of the training.
            numbers: B, which of the N.
            spans: B, their frames, L of each.
            judged: B, the frames by which the wettest of several places is chosen.

        Returns:
            B L C H W packed, and B K H W.
        """
        shape = (len(numbers), spans[0].stop - spans[0].start, *self.size)
        frames = np.empty(shape, np.result_type(*(archive.dtype for archive in self.archives)))
        static = np.empty((len(numbers), len(self.fields[0]), *self.size), np.float32)
        for b, (number, span, seen) in enumerate(zip(numbers, spans, judged, strict=True)):
            source = int(self.sources[number])
            archive, places = self.archives[source], self.places(epoch, number)
            if len(places) == 1:
                (place,) = places
                frames[b] = archive.read(span, *place)
            else:
                shown = archive.read(seen)
                place = max(places, key=lambda one: np.count_nonzero(archive.wet(shown[:, *one])))
                frames[b] = shown[:, *place] if seen == span else archive.read(span, *place)
            static[b] = self.fields[source][:, *place]
        return torch.from_numpy(frames).unsqueeze(2), torch.from_numpy(static)


class RadarWindows(RadarCuts):
    """The windows of one split.

    Args:
        archives, fields, crop: as in `RadarCuts`.
        index: of the windows.
        past: frames, T.
        future: all that follow.
    """

    def __init__(
        self,
        archives: Sequence[Archive],
        fields: Sequence[NDArray[np.float32]],
        index: WindowIndex,
        past: int,
        future: int,
        crop: Crop,
    ) -> None:
        super().__init__(archives, fields, crop, index.archive)
        self.index = index
        self.blocks = index.blocks
        self.past = past
        self.future = future
        self._issues = np.empty(len(index.start), dtype=np.int64)
        for number, archive in enumerate(archives):
            own = index.archive == number
            self._issues[own] = archive.times[index.start[own] + past - 1]

    def __len__(self) -> int:
        return len(self.index.start)

    def __getitem__(self, draw: Draw) -> Batch:
        positions = np.array(draw.positions)
        # Padding shows the first window, and its block says that it counts for nothing.
        windows = np.maximum(positions, 0)
        length = self.past + self.future
        spans = [slice(start, start + length) for start in self.index.start[windows].tolist()]
        frames, static = self.cut(draw.epoch, windows.tolist(), spans, judged=spans)
        blocks = np.where(positions < 0, -1, self.index.block[windows])
        first = torch.ones(len(positions), dtype=torch.bool)
        return _batch(frames, self.past, static, self._issues[windows], blocks, first)

    def issue_times(self) -> Times:
        """Of each window the time of its last past frame: N seconds UTC, ascending."""
        return self._issues

    def frames(self) -> list[NDArray[np.int64]]:
        """Of each archive, the frames that lie in a window, ascending."""
        length = np.arange(self.past + self.future)
        starts = (self.index.start[self.index.archive == number] for number in range(len(self.archives)))
        return [np.unique(own[:, None] + length) for own in starts]


class RadarStreams(RadarCuts):
    """Streams of a split: its runs, cut into stretches of `length` frames at most. No stream crosses a gap in time.

    A run is as long as its whole chunks and the frames that follow the last of them. What is left over is skipped at its
    beginning or at its end, by chance anew in each epoch. A lane sees one crop as long as it goes along one stream; of
    several draws that is the wettest in the middle of the stream.

    Args:
        archives, fields, crop: as in `RadarCuts`.
        runs: of the split.
        chunk: frames of a chunk.
        future: frames that follow a chunk, S.
        length: frames of a stream at most; none: a whole run.
    """

    def __init__(
        self,
        archives: Sequence[Archive],
        fields: Sequence[NDArray[np.float32]],
        runs: RunIndex,
        chunk: int,
        future: int,
        crop: Crop,
        length: int | None = None,
    ) -> None:
        whole = np.maximum(runs.frames - future, 0) // chunk
        most = int(whole.max(initial=1)) if length is None else max(1, length // chunk)
        stretches = [(run, begin) for run, count in enumerate(whole.tolist()) for begin in range(0, count, most)]
        self._run, self._begin = np.array(stretches, dtype=np.int64).reshape(-1, 2).T
        super().__init__(archives, fields, crop, runs.archive[self._run])
        self.runs = runs
        self.chunk = chunk
        self.future = future
        self._left = np.maximum(runs.frames - future, 0) - whole * chunk
        self.chunks: Whole = np.minimum(whole[self._run] - self._begin, most)

    def __len__(self) -> int:
        return int(self.chunks.sum())

    def __getitem__(self, draw: Draw) -> Batch:
        spans, middles, times = [], [], []
        streams, numbers = locate(self.chunks, draw.positions)
        for stream, number in zip(streams.tolist(), numbers.tolist(), strict=True):
            run = int(self._run[stream])
            begin = int(self.runs.start[run])
            if self.crop.seed is not None:
                begin += int(drawn(draw.epoch, self.crop.seed, run, 1).integers(self._left[run], endpoint=True))
            begin += int(self._begin[stream]) * self.chunk
            middle = begin + int(self.chunks[stream]) * self.chunk // 2
            middles.append(slice(middle, middle + 1))
            start = begin + number * self.chunk
            spans.append(slice(start, start + self.chunk + self.future))
            times.append(int(self.archives[self.sources[stream]].times[start + self.chunk - 1]))
        frames, static = self.cut(draw.epoch, streams.tolist(), spans, judged=middles)
        blocks = np.where(np.array(draw.positions) < 0, -1, 0)
        return _batch(frames, self.chunk, static, np.array(times), blocks, torch.from_numpy(numbers == 0))


def cropped(grid: Grid, crop: Crop) -> Grid:
    """The part of a grid that a crop in its middle keeps."""
    if crop.size is None:
        return grid
    top, left = crop.corners(np.array([grid.size]), 0)[0, 0].tolist()
    (y, x), (dy, dx) = grid.origin, grid.spacing
    return replace(grid, size=(crop.size, crop.size), origin=(y + top * dy, x + left * dx))


def _batch(frames: Tensor, past: int, static: Tensor, times: Times, blocks: NDArray[np.int64], first: Tensor) -> Batch:
    # In one piece of memory: to fetch a batch from a worker process takes half a millisecond for each piece.
    time, block = torch.from_numpy(np.stack([times, blocks]))
    return Batch(frames[:, :past], frames[:, past:], static, time, block, first)
