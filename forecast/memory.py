"""What references scored, kept for later runs: a sweep of many runs computes the same optical flow once.

What is kept are counts, not scores, so that a run which recalls them gives what it would have computed, to the last bit.
"""

import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pooch  # type: ignore[import-untyped]  # it ships no types
from numpy.typing import NDArray

from forecast.files import whole
from forecast.provenance import SOURCES

Counts = Mapping[str, NDArray[Any]]
PACKAGES = ("torch", "numpy", "pysteps", "opencv-python-headless")

log = logging.getLogger(__name__)


def key(terms: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of all that counts hang on: what is told here, our source code, and the packages used.

    Args:
        terms: plain values; the protocol and the configuration of the reference.
    """
    result = hashlib.blake2b(json.dumps(terms, sort_keys=True).encode(), digest_size=8)
    for path in sorted(path for room in ("forecast", "datamodules") for path in (SOURCES / room).rglob("*.py")):
        result.update(f"{path.relative_to(SOURCES).as_posix()} {path.stat().st_size} ".encode())
        result.update(path.read_bytes())
    result.update(json.dumps({name: _version(name) for name in PACKAGES}).encode())
    return result.hexdigest()


def recall(name: str) -> Counts | None:
    """The counts kept under a key; None where there are none, or the file is damaged."""
    try:
        with np.load(_place(name), allow_pickle=False) as stored:
            return {part: stored[part] for part in stored.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):  # the archive checks its sums
        return None


def keep(name: str, counts: Counts) -> None:
    """Keeps counts under a key; a folder that cannot be written only costs time, and is told."""
    place = _place(name)
    try:
        with whole(place) as temporary:
            np.savez_compressed(temporary, **dict(counts))  # type: ignore[arg-type]  # a name is no option of numpy's
    except OSError as error:
        log.warning(
            "The scores of the references cannot be kept for later runs (%s); set the environment variable "
            "STORMCELL_CACHE to a folder that can be written.",
            error,
        )


def _place(name: str) -> Path:
    cache = Path(os.environ.get("STORMCELL_CACHE") or pooch.os_cache("stormcell")).expanduser()
    return cache / "references" / f"{name}.npz"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
