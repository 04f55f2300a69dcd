"""The frames of an archive, unpacked once into a file from which windows are cut without reading anything else.

Axes: T time, H W space.
"""

import os
import shutil
from contextlib import closing
from pathlib import Path

import pooch  # type: ignore[import-untyped]  # it ships no types
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import track

from datamodules.mapped import MappedFrames
from datamodules.reader import Archive, Packed
from datamodules.statistics import A_MOMENT, block_of
from forecast.errors import UserError
from forecast.files import clear, whole


def unpack(archive: Archive, fingerprint: str) -> None:
    """Let an archive's frames be read from a file of plain numbers in the user's cache ($STORMCELL_CACHE).

    In a compressed archive a window costs all the chunks that it touches, anew each time it is drawn; here it costs its
    own pixels. The file is written by one process while others wait, and shared by all.

    Args:
        archive: to be read from the file from now on.
        fingerprint: changes with any of its numbers; archives that share it share the file.

    Raises:
        UserError: no room for the file, nowhere to write it, or frames that cannot be read.
    """
    cache = Path(os.environ.get("STORMCELL_CACHE") or pooch.os_cache("stormcell")).expanduser()
    place = cache / "frames" / f"{Path(archive.path).name}.{fingerprint}" / "frames.raw"
    unpacked = MappedFrames(place, (len(archive.times), *archive.grid.size), archive.dtype)
    size = unpacked.size
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(".lock")):
            clear(place.parent)
            if not (place.is_file() and place.stat().st_size == size):
                free = shutil.disk_usage(place.parent).free
                if size > free:
                    raise UserError(
                        f"The frames of {archive.path} take {_gigabytes(size)} unpacked, but {place.parent} has room for "
                        f"{_gigabytes(free)}; set STORMCELL_CACHE to a folder with more, or data.cache=false to read from "
                        "the archive."
                    )
                rank_zero_info(
                    f"The frames of {archive.path} are unpacked into {place}, {_gigabytes(size)}, once; it may be deleted "
                    "after the run (data.cache=false reads from the archive)."
                )
                with whole(place) as temporary:
                    write(archive, temporary, size)
    except OSError as error:
        raise UserError(
            f"The frames of {archive.path} cannot be unpacked into {place.parent} ({error}); set STORMCELL_CACHE to a "
            f"folder that can be written and has {_gigabytes(size)}, or data.cache=false to read from the archive."
        ) from error
    archive.unpacked = unpacked


def write(archive: Archive, path: Path, size: int) -> None:
    """The packed numbers of all frames, T H W in C order, each chunk of the archive unpacked once."""
    length, (height, width) = len(archive.times), archive.grid.size
    frames, rows = block_of((length, height, width), archive.dtype.itemsize, archive.chunks)
    blocks = [(first, top) for first in range(0, length, frames) for top in range(0, height, rows)]
    shown = track(
        blocks,
        description=f"Unpacking the frames of {Path(archive.path).name}, once",
        console=Console(stderr=True),
        transient=True,
        disable=size < A_MOMENT,
    )
    with path.open("wb") as file, closing(archive):
        for first, top in shown:
            band: Packed
            for frame, band in enumerate(archive.read(slice(first, first + frames), slice(top, top + rows)), first):
                file.seek((frame * height + top) * width * archive.dtype.itemsize)
                file.write(band.tobytes())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
