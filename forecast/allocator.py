"""The C library's memory, for training on CPUs."""

import ctypes
import platform

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1  # bytes; the largest that it takes


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed for the next request: each training step asks for the same sizes again.

    Otherwise it hands large pieces back to the system, which fills new ones with zeros page by page: up to a quarter of a
    step. What a process holds then stays at its peak. Elsewhere than on Linux with glibc nothing is done.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _NEVER)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)
