"""An archive of packed radar frames on disk, of which only what is asked for is read, and windows of such frames.

Axes: B batch, T time or past frames, S forecast frames, C = 1 channel, K static fields, H W space.
"""

import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from datamodules.cf import Dims, Packing, find_rain, grid_of, packing_of, times_of
from datamodules.sampler import Draw
from datamodules.windows import Times, WindowIndex
from forecast.batch import Batch
from forecast.errors import UserError
from forecast.units import Grid, Quantity

Packed = NDArray[Any]
EVERYTHING = slice(None)
WET = {"dBZ": 10.0, "mm/h": 0.1}
"""A pixel with at least so much is wet."""


class Archive:
    """What is known of an archive, and its frames. Its file is opened when frames are first read, by each process."""

    def __init__(
        self,
        path: str,
        variable: str,
        dims: Dims,
        packing: Packing,
        quantity: Quantity,
        grid: Grid,
        times: Times,
        chunks: tuple[int, int, int],
    ) -> None:
        self.path = path
        self.variable = variable
        self.dtype = packing.dtype
        """Of the packed numbers as they are dealt."""
        self.quantity = quantity
        self.grid = grid
        self.times = times
        """T seconds UTC."""
        self.chunks = chunks
        """T H W of the pieces that can be unpacked on their own; 1 where the file has none."""
        self._dims = dims
        self._packing = packing
        self._opened: xr.Dataset | None = None

    def read(self, frames: slice, rows: slice = EVERYTHING, columns: slice = EVERYTHING) -> Packed:
        """Packed frames, T H W; a missing pixel is `quantity.missing`, or NaN where the numbers are floats.

        Nothing is kept here: the HDF5 library holds the chunks unpacked last (64 MiB), so that windows which overlap
        cost little.
        """
        try:
            if self._opened is None:
                self._opened = open_raw(self.path)
                _opened.add(self)
            part = self._opened[self.variable].isel(dict(zip(self._dims, (frames, rows, columns), strict=True)))
            packed: Packed = part.transpose(*self._dims).values
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"Frames {frames.start} to {frames.stop - 1} of {self.path} cannot be read ({error}); the archive is "
                "damaged: fetch or write it again."
            ) from error
        dtype, unsigned, codes = self._packing
        if unsigned:
            packed = packed.astype(packed.dtype.newbyteorder("=")).view(f"u{packed.dtype.itemsize}")
        one = np.nan if self.quantity.missing is None else self.quantity.missing
        others = [packed == np.asarray(code, dtype=packed.dtype) for code in codes if code != one]
        packed = packed.astype(dtype, copy=False)
        for other in others:
            packed[other] = one
        return packed

    def valid(self, packed: Packed) -> NDArray[np.bool_]:
        """Which of the packed numbers were observed."""
        # Where there is no code for missing, every number differs from None.
        valid: NDArray[np.bool_] = np.isfinite(packed) if packed.dtype.kind == "f" else packed != self.quantity.missing
        return valid

    def wet(self, packed: Packed) -> NDArray[np.bool_]:
        """Which of the packed numbers were observed and are wet (`WET`)."""
        scale, offset = self.quantity.scale, self.quantity.offset
        # Thresholds are met within rounding: 0.1 is no binary fraction, and neither is its quotient by a scale.
        edge = (WET[self.quantity.units] * (1 - 1e-6) - offset) / scale
        rounded, is_wet = (ceil, np.greater_equal) if scale > 0 else (floor, np.less_equal)
        wet: NDArray[np.bool_] = is_wet(packed, edge if packed.dtype.kind == "f" else rounded(edge))
        return wet & self.valid(packed)

    def fields(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Variables that do not change in time, decoded, K H W; NaN where they are missing.

        Raises:
            UserError: one is absent, has other dimensions than y and x, or holds nothing.
        """
        _, y, x = self._dims
        result = np.empty((len(names), *self.grid.size), dtype=np.float32)
        with open_raw(self.path) as opened:
            for k, name in enumerate(names):
                if name not in opened.variables or set(opened[name].dims) != {y, x}:
                    maps = [str(key) for key, data in opened.variables.items() if set(data.dims) == {y, x}]
                    raise UserError(
                        f"data.static names {name!r}, which is no variable of {self.path} over {y} and {x} alone; "
                        f"of that kind there are: {', '.join(maps) or 'none'}."
                    )
                result[k] = xr.decode_cf(opened[[name]])[name].transpose(y, x).values
                if not np.isfinite(result[k]).any():
                    raise UserError(f"Every pixel of {name!r} in {self.path} is missing; take it out of data.static.")
        return result

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
        self._opened = None
        _opened.discard(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


# HDF5 must not pass through a fork with a file open, since parent and child would share its caches and its place in the
# file. So every file is closed just before a fork, and whoever reads next opens it again.
_opened: weakref.WeakSet[Archive] = weakref.WeakSet()


def _close_all() -> None:
    for archive in list(_opened):
        archive.close()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_close_all)


def open_raw(path: str) -> xr.Dataset:
    """The dataset as it is stored: packed, times as numbers, nothing read yet."""
    zarr = Path(path).is_dir()
    return xr.open_dataset(
        path,
        engine="zarr" if zarr else "netcdf4",
        mask_and_scale=False,
        decode_times=False,
        cache=False,
        chunks=None,
        backend_kwargs={"consolidated": False} if zarr else None,
    )


def open_archive(path: str, variable: str | None = None) -> Archive:
    """Understand a NetCDF file or a Zarr directory.

    Args:
        path: of the file or the directory.
        variable: its name, where several could be meant or the CF attributes do not tell.

    Raises:
        UserError: nothing is there, it cannot be read, or it is no archive of rain.
    """
    if not Path(path).exists():
        raise UserError(f"There is no archive {path}; set data.archive to a NetCDF file or a Zarr directory.")
    try:
        opened = open_raw(path)
    except Exception as error:  # each backend has errors of its own
        raise UserError(
            f"{path} cannot be opened as NetCDF or Zarr ({type(error).__name__}: {error}); it is damaged or of another "
            "format: fetch it again or convert it."
        ) from error
    with opened:
        data, meaning, dims = find_rain(opened, path, variable)
        times = times_of(opened, path, dims[0])
        packing, quantity = packing_of(data, meaning, path)
        grid = grid_of(opened, data, dims, path)
        sizes = data.encoding.get("preferred_chunks", {})
        chunks = (sizes.get(dims[0], 1), sizes.get(dims[1], 1), sizes.get(dims[2], 1))
        return Archive(path, str(data.name), dims, packing, quantity, grid, times, chunks)


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
            random = np.random.default_rng([self.seed & 0xFFFF_FFFF_FFFF_FFFF, epoch, position])
            corners = random.integers(0, room, size=(self.draws, 2), endpoint=True).tolist()
        return [(slice(y, y + self.size), slice(x, x + self.size)) for y, x in corners]


class RadarWindows:
    """The windows of one split, read as they are asked for, a batch at a time."""

    def __init__(
        self,
        archives: Sequence[Archive],
        fields: Sequence[NDArray[np.float32]],
        index: WindowIndex,
        past: int,
        future: int,
        crop: Crop,
    ) -> None:
        self.archives = archives
        self.fields = fields
        """K H W of each archive."""
        self.index = index
        self.blocks = index.blocks
        self.past = past
        self.future = future
        self.crop = crop

    def __len__(self) -> int:
        return len(self.index.start)

    def __getitem__(self, draw: Draw) -> Batch:
        frames, fields, times, blocks = [], [], [], []
        for position in draw.positions:
            window = max(position, 0)  # padding shows the first window, and its block says that it counts for nothing
            number, start = int(self.index.archive[window]), int(self.index.start[window])
            archive = self.archives[number]
            places = self.crop.places(archive.grid.size, draw.epoch, window)
            rows, columns = places[0]
            span = slice(start, start + self.past + self.future)
            if len(places) == 1:
                frames.append(archive.read(span, rows, columns))
            else:
                whole = archive.read(span)
                rows, columns = max(places, key=lambda place: np.count_nonzero(archive.wet(whole[:, *place])))
                frames.append(whole[:, rows, columns])
            fields.append(self.fields[number][:, rows, columns])
            times.append(int(archive.times[start + self.past - 1]))
            blocks.append(int(self.index.block[window]) if position >= 0 else -1)
        sequence = torch.from_numpy(np.stack(frames)).unsqueeze(2)
        return Batch(
            past=sequence[:, : self.past],
            future=sequence[:, self.past :],
            static=torch.from_numpy(np.stack(fields)),
            time=torch.tensor(times),
            block=torch.tensor(blocks),
            first=torch.ones(len(blocks), dtype=torch.bool),
        )

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


def cropped(grid: Grid, rows: slice, columns: slice) -> Grid:
    """The part of a grid that a crop keeps."""
    (y, x), (dy, dx) = grid.origin, grid.spacing
    origin = (y + rows.start * dy, x + columns.start * dx)
    return replace(grid, size=(rows.stop - rows.start, columns.stop - columns.start), origin=origin)
