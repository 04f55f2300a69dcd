"""Frames in a file of plain numbers, looked at through a map of the file in memory: only what is asked for is read.

Axes: T time, H W space.
"""

import mmap
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEPT = 2**29
"""Bytes of files, of all together, whose maps a process keeps."""


class MappedFrames:
    """Packed frames, T H W in C order, as they lie in a file.

    A map that is kept shows a frame again at no cost. But gauges count all that it ever showed as memory of the process,
    and clusters may end a job by that, though it is the operating system's copy of the file, which all processes share. So
    the files read first stay mapped, `KEPT` bytes in all, and others are mapped anew at each time.

    Args:
        path: of the file.
        shape: T H W.
        dtype: of a number.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self._frames: NDArray[Any] | None = None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize

    def __getitem__(self, part: tuple[slice, slice, slice]) -> NDArray[Any]:
        """A view of the file, of which nothing is read before it is looked at.

        Raises:
            OSError, ValueError: the file is not there, or too short.
        """
        if self._frames is not None:
            return self._frames[part]
        frames = self._mapped()
        if self.size + sum(other.size for other in _kept) <= KEPT:
            self._frames = frames
            _kept.add(self)
        return frames[part]

    def _mapped(self) -> NDArray[Any]:
        with self.path.open("rb", buffering=0) as file:
            numbers = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(numbers, self.dtype, self.size // self.dtype.itemsize).reshape(self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frames": None}


_kept: weakref.WeakSet[MappedFrames] = weakref.WeakSet()
"""Those whose maps are kept."""
