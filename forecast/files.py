"""Files that are written whole or not at all."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.part(\.[^.]+)?")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write to the path that is given, and it becomes `path` when all went well.

        with whole(folder / "skill.nc") as temporary:
            dataset.to_netcdf(temporary)

    Whoever opens `path` meanwhile sees the old file or none, never half of one. The temporary lies in the same folder
    (a rename across file systems is a copy), has the same suffix (writers choose their format by it), and a name that
    begins with a dot and says `.part`, so that one left over by a killed process is not listed as a result. Folders
    that are wanting are made.

    Args:
        path: the file to write; one that is there is replaced.

    Raises:
        FileNotFoundError: nothing was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            # Else the rename may reach the disk before the content, and a power cut leaves an empty file.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Removes the temporaries of `whole` that killed processes left in a folder and the folders in it.

    Nobody else may be writing there.
    """
    for path in [*folder.glob(".*.part*"), *folder.glob("*/.*.part*")]:
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
