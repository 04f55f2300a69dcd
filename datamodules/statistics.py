"""What is known of each frame of an archive: computed once, and kept beside it as one small file.

Axes: T time, H W space.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch  # type: ignore[import-untyped]  # it ships no types
import xarray as xr
from filelock import FileLock
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from datamodules.reader import WET, Archive, Packed
from datamodules.windows import utc
from forecast.errors import UserError
from forecast.files import whole

RULE = 1
"""Version of what is computed below; files of another one are computed anew."""
LEAST_RATE = -1e-3
"""mm/h; below it a negative rain rate is no matter of rounding."""

BLOCK = 128 * 2**20
"""Bytes of packed numbers that a process reads at once, at most."""
A_MOMENT = 256 * 2**20
"""Bytes of packed numbers, a second's work or two: from here on its progress is shown."""
WORTH_PROCESSES = 8 * 2**30
"""Bytes of packed numbers, half a minute of one core: from here on helping processes save more than their start costs."""
MOST_PROCESSES = 16
"""However many processors there are: each holds a block or two."""


class FrameStatistics(NamedTuple):
    """One number for each of the T frames of an archive, in its own units (dBZ or mm/h, before any Z-R relation)."""

    valid: NDArray[np.float64]
    """Share of pixels that were observed."""
    wet: NDArray[np.float64]
    """Share of the observed pixels that are wet (`WET`); NaN where nothing was observed."""
    least: NDArray[np.float64]
    """NaN where nothing was observed."""
    greatest: NDArray[np.float64]
    """NaN where nothing was observed."""
    digest: NDArray[np.uint64]
    """Of the packed numbers: the same for frames that are the same pixel by pixel."""


def statistics_of(archive: Archive) -> FrameStatistics:
    """The statistics of every frame: those that are kept, if they are whole and the archive is still the same.

    Else they are computed, by one process while others wait, and kept in `ARCHIVE.frames.nc`: beside the archive, or in
    the user's cache ($STORMCELL_CACHE) where that folder cannot be written.

    Raises:
        UserError: frames that cannot be read, no pixel observed, a negative rain rate, or nowhere to write.
    """
    path = Path(archive.path).resolve()
    source = {"rule": str(RULE), "variable": archive.variable, "source": _state(path)}
    beside = path.with_name(f"{path.name}.frames.nc")
    cache = Path(os.environ.get("STORMCELL_CACHE") or pooch.os_cache("stormcell")).expanduser()
    cached = cache / f"{path.name}.{hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()}.frames.nc"
    for place in (beside, cached):
        if (known := _recall(place, source)) is not None:
            return known
    place = beside if _may_be_written(path.parent) else cached
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{place.name}.lock")):
            known = _recall(place, source)
            if known is None:
                known = computed(archive)
                _check(archive, known)
                _keep(place, source, archive, known)
    except OSError as error:
        raise UserError(
            f"What is known of the frames of {archive.path} cannot be kept in {place.parent} ({error}); set the "
            "environment variable STORMCELL_CACHE to a folder that can be written."
        ) from error
    return known


def fingerprint(
    archives: Sequence[Archive], known: Sequence[FrameStatistics], fields: Sequence[NDArray[np.float32]]
) -> str:
    """16 hexadecimal digits that change with any number, time or place in the archives, and not with their paths."""
    result = hashlib.blake2b(digest_size=8)
    for archive, own, static in zip(archives, known, fields, strict=True):
        quantity = archive.quantity
        packing = (archive.dtype.name, quantity.scale, quantity.offset, quantity.missing)
        about = (archive.variable, quantity.name, quantity.long_name, quantity.units, *packing, archive.grid.to_dict())
        result.update(json.dumps([*about, archive.times.shape, static.shape], sort_keys=True).encode())
        for numbers in (archive.times, own.digest, static):
            result.update(np.ascontiguousarray(numbers).data)
    return result.hexdigest()


def computed(archive: Archive) -> FrameStatistics:
    """The statistics of every frame, from the frames themselves, each chunk of which is unpacked once."""
    length, (height, width) = len(archive.times), archive.grid.size
    frames, rows = block_of((length, height, width), archive.dtype.itemsize, archive.chunks)
    blocks = [slice(first, min(first + frames, length)) for first in range(0, length, frames)]
    size = length * height * width * archive.dtype.itemsize
    with ExitStack() as stack:
        parts: Iterable[FrameStatistics]
        if size < WORTH_PROCESSES:
            parts = map(partial(summary, archive, rows=rows), blocks)
        else:
            # Not a fork: the libraries' threads and locks would come along. Not threads: HDF5 reads one at a time.
            method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
            # The archive, with all its times, travels once to each process, not with each block.
            pool = ProcessPoolExecutor(
                min(_processors(), MOST_PROCESSES, len(blocks)),
                get_context(method),
                initializer=_take,
                initargs=(archive, rows),
            )
            parts = stack.enter_context(pool).map(_summary_of_taken, blocks)
        shown = track(
            parts,
            description=f"Looking at the frames of {Path(archive.path).name}, once",
            total=len(blocks),
            console=Console(stderr=True),
            transient=True,
            disable=size < A_MOMENT,
        )
        columns = [np.concatenate(column) for column in zip(*shown, strict=True)]
    archive.close()
    return FrameStatistics(*columns)


def block_of(shape: tuple[int, int, int], itemsize: int, chunks: tuple[int, int, int]) -> tuple[int, int]:
    """How many frames and how many rows of them, over their whole width, to read at once.

    As many whole chunks as `BLOCK` bytes hold; a part of a chunk only where a row of chunks is larger than that.

    Args:
        shape: T H W of the archive.
        itemsize: bytes of a number.
        chunks: T H W of a chunk.
    """
    row = shape[2] * itemsize
    rows = _fit(shape[1], chunks[1], max(BLOCK // (row * chunks[0]), min(chunks[1], BLOCK // row)))
    return _fit(shape[0], chunks[0], BLOCK // (row * rows)), rows


def _fit(length: int, chunk: int, room: int) -> int:
    """The longest stretch of a length that has room, of whole chunks if one has."""
    if room >= length:
        return length
    return max(room // chunk * chunk or room, 1)


def summary(archive: Archive, frames: slice, rows: int) -> FrameStatistics:
    """The statistics of some frames, read in bands of so many rows."""
    scale, offset = archive.quantity.scale, archive.quantity.offset
    number = archive.dtype
    low, high = (-np.inf, np.inf) if number.kind == "f" else (np.iinfo(number).min, np.iinfo(number).max)
    count = frames.stop - frames.start
    valid, wet = np.zeros(count, np.int64), np.zeros(count, np.int64)
    ends = np.tile(np.array([high, low], number), (count, 1))
    digests = [hashlib.blake2b(digest_size=8) for _ in range(count)]
    height, width = archive.grid.size
    for top in range(0, height, rows):
        band: Packed
        for frame, band in enumerate(archive.read(frames, slice(top, top + rows))):
            digests[frame].update(np.ascontiguousarray(band).data)
            observed = archive.valid(band)
            valid[frame] += np.count_nonzero(observed)
            wet[frame] += np.count_nonzero(archive.wet(band))
            ends[frame, 0] = min(ends[frame, 0], np.where(observed, band, ends[frame, 0]).min())
            ends[frame, 1] = max(ends[frame, 1], np.where(observed, band, ends[frame, 1]).max())
    seen = valid > 0
    values = np.sort(ends * np.float64(scale) + offset, axis=1)
    return FrameStatistics(
        valid=valid / (height * width),
        wet=np.where(seen, wet / np.maximum(valid, 1), np.nan),
        least=np.where(seen, values[:, 0], np.nan),
        greatest=np.where(seen, values[:, 1], np.nan),
        digest=np.array([int.from_bytes(each.digest(), "big") for each in digests], np.uint64),
    )


_taken: tuple[Archive, int]


def _take(archive: Archive, rows: int) -> None:
    global _taken
    _taken = archive, rows


def _summary_of_taken(frames: slice) -> FrameStatistics:
    archive, rows = _taken
    return summary(archive, frames, rows)


def _processors() -> int:
    """Those that this process may use, which on a shared machine are not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(archive: Archive, known: FrameStatistics) -> None:
    if not known.valid.any():
        raise UserError(
            f"Every pixel of {archive.variable!r} in {archive.path} is missing; check _FillValue, or write it again."
        )
    worst = int(np.nanargmin(known.least))
    if archive.quantity.units == "mm/h" and known.least[worst] < LEAST_RATE:
        raise UserError(
            f"Frame {worst} of {archive.path} ({utc(archive.times[worst])}) holds a rain rate of "
            f"{known.least[worst]:g} mm/h; rates begin at 0: mark such pixels as missing by _FillValue, or write 0."
        )


def _may_be_written(folder: Path) -> bool:
    """A folder marked as read-only is left alone by root too, who could write there."""
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def _state(path: Path) -> str:
    """Changes when the file does, or any file in the directory."""
    state = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            about = file.stat()
            state.update(json.dumps([file.relative_to(path).as_posix(), about.st_size, about.st_mtime_ns]).encode())
    return state.hexdigest()


def _keep(place: Path, source: dict[str, str], archive: Archive, known: FrameStatistics) -> None:
    units = {"units": archive.quantity.units}
    about: dict[str, dict[str, Any]] = {
        "valid": {"long_name": "share of pixels that were observed", "units": "1"},
        "wet": {"long_name": f"share of observed pixels with {WET[units['units']]:g} {units['units']} or more"},
        "least": {"long_name": "least value", **units},
        "greatest": {"long_name": "greatest value", **units},
        "digest": {"long_name": "digest of the packed numbers (BLAKE2b, 64 bits)"},
    }
    columns = {name: ("time", column, about[name]) for name, column in known._asdict().items()}
    time = ("time", archive.times, {"standard_name": "time", "units": "seconds since 1970-01-01"})
    title = f"What is known of each frame of {Path(archive.path).name}; made by stormcell, may be deleted"
    attributes = {"title": title, **source, "checksum": _checksum(source, known)}
    with whole(place) as temporary:
        xr.Dataset(columns, {"time": time}, attributes).to_netcdf(temporary, engine="netcdf4")


def _recall(place: Path, source: dict[str, str]) -> FrameStatistics | None:
    """What was kept there; nothing if it is absent, damaged, or of another state of the archive."""
    if not place.is_file():
        return None
    try:
        with xr.open_dataset(place, engine="netcdf4", decode_times=False, cache=False) as stored:
            known = FrameStatistics(*(stored[name].values for name in FrameStatistics._fields))
            expected = {**source, "checksum": _checksum(source, known)}
            return known if all(stored.attrs.get(key) == value for key, value in expected.items()) else None
    except Exception:  # a damaged file fails in many ways, and is made anew after each of them
        return None


def _checksum(source: dict[str, str], known: FrameStatistics) -> str:
    checksum = hashlib.blake2b(json.dumps(source, sort_keys=True).encode(), digest_size=16)
    for column in known:
        checksum.update(f"{column.dtype.name} {column.shape}".encode())
        checksum.update(np.ascontiguousarray(column).data)
    return checksum.hexdigest()
