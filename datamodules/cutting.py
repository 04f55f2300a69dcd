"""Windows and streams cut from radar archives: read as they are asked for, a batch at a time.

Axes: B batch, T past frames, S forecast frames, C = 1 channel, K static fields, N windows or streams, H W space.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.reader import Archive, Packed
from datamodules.sampler import Draw
from datamodules.streams import Whole, drawn, locate
from datamodules.windows import RunIndex, Times, WindowIndex
from forecast.batch import Batch
from forecast.units import Grid


class Crop(NamedTuple):
    """A square of `size` pixels: at random where there is a seed, in the middle otherwise. No size: the whole frame."""

    size: int | None
    seed: int | None = None
    draws: int = 1
    """Places drawn, of which the wettest is taken."""

    def places(self, frame: tuple[int, int], epoch: int, position: int) -> list[tuple[slice, slice]]:
        """The rows and columns of each draw in a frame of H, W; a function of (seed, epoch, position)."""
        if self.size is None:
            return [(slice(0, frame[0]), slice(0, frame[1]))]
        room = [length - self.size for length in frame]
        corners = [[free // 2 for free in room]]
        if self.seed is not None:
            corners = drawn(epoch, self.seed, position).integers(0, room, (self.draws, 2), endpoint=True).tolist()
        return [(slice(y, y + self.size), slice(x, x + self.size)) for y, x in corners]


class RadarCuts:
    """Archives, and the squares that are cut from them.

    Args:
        archives: to read from.
        fields: static ones, K H W of each archive.
        crop: what is cut from each frame.
    """

    def __init__(self, archives: Sequence[Archive], fields: Sequence[NDArray[np.float32]], crop: Crop) -> None:
        self.archives = archives
        self.fields = fields
        self.crop = crop

    def cut(
        self, archive: int, span: slice, epoch: int, position: int, judged: slice
    ) -> tuple[Packed, NDArray[np.float32]]:
        """Frames of an archive and its static fields, cropped.

        Args:
            archive: which.
            span: the frames.
            epoch, position: what the place of the crop is drawn by.
            judged: the frames by which the wettest of several places is chosen.
        """
        source = self.archives[archive]
        places = self.crop.places(source.grid.size, epoch, position)
        rows, columns = places[0]
        if len(places) > 1:
            seen = source.read(judged)
            rows, columns = max(places, key=lambda place: np.count_nonzero(source.wet(seen[:, *place])))
            frames = seen[:, rows, columns] if judged == span else source.read(span, rows, columns)
        else:
            frames = source.read(span, rows, columns)
        return frames, self.fields[archive][:, rows, columns]


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
        super().__init__(archives, fields, crop)
        self.index = index
        self.blocks = index.blocks
        self.past = past
        self.future = future

    def __len__(self) -> int:
        return len(self.index.start)

    def __getitem__(self, draw: Draw) -> Batch:
        frames, fields, times, blocks = [], [], [], []
        for position in draw.positions:
            window = max(position, 0)  # padding shows the first window, and its block says that it counts for nothing
            archive, start = int(self.index.archive[window]), int(self.index.start[window])
            span = slice(start, start + self.past + self.future)
            own, still = self.cut(archive, span, draw.epoch, window, judged=span)
            frames.append(own)
            fields.append(still)
            times.append(int(self.archives[archive].times[start + self.past - 1]))
            blocks.append(int(self.index.block[window]) if position >= 0 else -1)
        return _batch(frames, self.past, fields, times, blocks, first=[True] * len(blocks))

    def issue_times(self) -> Times:
        """Of each window the time of its last past frame: N seconds UTC, ascending."""
        times = np.empty(len(self), dtype=np.int64)
        for number, archive in enumerate(self.archives):
            own = self.index.archive == number
            times[own] = archive.times[self.index.start[own] + self.past - 1]
        return times

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
        super().__init__(archives, fields, crop)
        self.runs = runs
        self.chunk = chunk
        self.future = future
        whole = np.maximum(runs.frames - future, 0) // chunk
        self._left = np.maximum(runs.frames - future, 0) - whole * chunk
        most = int(whole.max(initial=1)) if length is None else max(1, length // chunk)
        stretches = [(run, begin) for run, count in enumerate(whole.tolist()) for begin in range(0, count, most)]
        self._run, self._begin = np.array(stretches, dtype=np.int64).reshape(-1, 2).T
        self.chunks: Whole = np.minimum(whole[self._run] - self._begin, most)

    def __len__(self) -> int:
        return int(self.chunks.sum())

    def __getitem__(self, draw: Draw) -> Batch:
        frames, fields, times = [], [], []
        streams, numbers = locate(self.chunks, draw.positions)
        for stream, number in zip(streams.tolist(), numbers.tolist(), strict=True):
            run = int(self._run[stream])
            archive, begin = int(self.runs.archive[run]), int(self.runs.start[run])
            if self.crop.seed is not None:
                begin += int(drawn(draw.epoch, self.crop.seed, run, 1).integers(self._left[run], endpoint=True))
            begin += int(self._begin[stream]) * self.chunk
            middle = begin + int(self.chunks[stream]) * self.chunk // 2
            start = begin + number * self.chunk
            span = slice(start, start + self.chunk + self.future)
            own, still = self.cut(archive, span, draw.epoch, stream, judged=slice(middle, middle + 1))
            frames.append(own)
            fields.append(still)
            times.append(int(self.archives[archive].times[start + self.chunk - 1]))
        blocks = np.where(np.array(draw.positions) < 0, -1, 0).tolist()
        return _batch(frames, self.chunk, fields, times, blocks, first=(numbers == 0).tolist())


def cropped(grid: Grid, rows: slice, columns: slice) -> Grid:
    """The part of a grid that a crop keeps."""
    (y, x), (dy, dx) = grid.origin, grid.spacing
    origin = (y + rows.start * dy, x + columns.start * dx)
    return replace(grid, size=(rows.stop - rows.start, columns.stop - columns.start), origin=origin)


def _batch(
    frames: Sequence[Packed],
    past: int,
    fields: Sequence[NDArray[np.float32]],
    times: Sequence[int],
    blocks: Sequence[int],
    first: Sequence[bool],
) -> Batch:
    sequence = torch.from_numpy(np.stack(frames)).unsqueeze(2)
    return Batch(
        past=sequence[:, :past],
        future=sequence[:, past:],
        static=torch.from_numpy(np.stack(fields)),
        time=torch.tensor(times),
        block=torch.tensor(blocks),
        first=torch.tensor(first),
    )
