"""An archive of packed radar frames on disk, of which only what is asked for is read.

Axes: T time, K static fields, H W space.
"""

import os
import weakref
from collections.abc import Sequence
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from datamodules.cf import Dims, Packing, find_rain, grid_of, packing_of, times_of
from datamodules.mapped import MappedFrames
from datamodules.windows import Times
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
        self.unpacked: MappedFrames | None = None
        """The same packed numbers in a file of their own, which is read instead."""
        self._dims = dims
        self._packing = packing
        self._opened: xr.Dataset | None = None

    def read(self, frames: slice, rows: slice = EVERYTHING, columns: slice = EVERYTHING) -> Packed:
        """Packed frames, T H W; a missing pixel is `quantity.missing`, or NaN where the numbers are floats.

        Nothing is kept here. Of the archive itself the HDF5 library holds the chunks unpacked last (64 MiB), so that
        windows which overlap cost little; Zarr holds none.
        """
        if self.unpacked is not None:
            return self._read_unpacked(self.unpacked, (frames, rows, columns))
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

    def _read_unpacked(self, unpacked: MappedFrames, part: tuple[slice, slice, slice]) -> Packed:
        try:
            return unpacked[part]
        except (OSError, ValueError) as error:
            raise UserError(
                f"The unpacked frames of {self.path} in {unpacked.path} cannot be read ({error}); leave them there while a "
                "run goes on, or set data.cache=false."
            ) from error

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
