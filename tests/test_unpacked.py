"""Unpacked frames are those of the archive, written once, whole or not at all, and shared."""

import gc
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from conftest import DBZ, RATE, WriteArchive, every, labelled, rain
from numpy.typing import NDArray

from datamodules import mapped, unpacked
from datamodules.radar import RadarData
from datamodules.reader import Archive, Packed, open_archive
from datamodules.sampler import Draw
from datamodules.unpacked import unpack
from forecast.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STORMCELL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frames"


def radar(path: str, **options: Any) -> RadarData:
    settings: dict[str, Any] = {"past": 3, "future": 4, "batch_size": 5, "workers": 0, "seed": 0}
    return RadarData(path, **{**settings, **options})


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("*/*") if path.name != ".lock")


@pytest.mark.parametrize("name", ["radar.nc", "radar.zarr"])
@pytest.mark.parametrize(
    ("numbers", "attributes"),
    [
        (labelled(30, 12, 14), DBZ),
        (labelled(30, 12, 14).astype(">i2"), {**DBZ, "_FillValue": np.int16(255)}),
        (rain(30), RATE),
    ],
)
def test_frames_are_those_of_the_archive(
    name: str, numbers: NDArray[Any], attributes: Any, write_archive: WriteArchive
) -> None:
    path = write_archive(name, numbers=numbers, attributes=attributes)
    parts = (
        (slice(0, 30),),
        (slice(7, 19), slice(2, 9), slice(3, 14)),
        (slice(29, 30), slice(None), slice(13, 14)),
    )
    archive = open_archive(path)
    expected = [archive.read(*part) for part in parts]
    unpack(archive, "key")
    Path(path).rename(f"{path}.gone")  # so that nothing is read there
    archive = pickle.loads(pickle.dumps(archive))
    for part, right in zip(parts, expected, strict=True):
        ours = archive.read(*part)
        assert ours.dtype == right.dtype
        np.testing.assert_array_equal(ours, right)


@pytest.mark.parametrize("crop", [None, 5])
def test_batches_are_the_same_with_the_cache_and_without_it(crop: int | None, write_archive: WriteArchive) -> None:
    path = write_archive(times=every(400))
    batches = []
    for cached in (True, False):
        data = radar(path, crop=crop, crop_draws=3 if crop else 1, cache=cached)
        data.setup("fit")
        assert (data.windows("train").archives[0].unpacked is not None) == cached
        batches.append(data.windows("train")[Draw(1, (4, 90, -1))])
    for ours, expected in zip(*batches, strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


def test_chunks_larger_than_a_block_are_written_in_bands(
    write_archive: WriteArchive, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacked, "block_of", lambda *_: (7, 5))
    archive = open_archive(write_archive())
    unpack(archive, "key")
    written = np.fromfile(cache / "radar.nc.key" / "frames.raw", np.uint8).reshape(30, 12, 14)
    np.testing.assert_array_equal(written, labelled(30, 12, 14))


def test_a_file_is_written_once_and_shared_by_archives_of_the_same_numbers(
    write_archive: WriteArchive, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_archive(times=every(400))
    radar(path).setup("fit")
    (written,) = files(cache)
    before = written.stat().st_mtime_ns
    monkeypatch.setattr(unpacked, "write", lambda *_: pytest.fail("it is there already"))
    again = radar(path, past=2, crop=5)
    again.setup("fit")
    again.setup("test")
    assert files(cache) == [written]
    assert written.stat().st_mtime_ns == before


def test_other_numbers_are_another_file(write_archive: WriteArchive, cache: Path) -> None:
    numbers = labelled(400, 12, 14)
    radar(write_archive(times=every(400), numbers=numbers)).setup("fit")
    numbers[399, 11, 13] ^= 1
    changed = radar(write_archive(times=every(400), numbers=numbers))
    changed.setup("fit")
    assert len(files(cache)) == 2
    np.testing.assert_array_equal(changed.windows("train").archives[0].read(slice(399, 400))[0], numbers[399])


def test_what_is_only_described_is_not_unpacked(write_archive: WriteArchive, cache: Path) -> None:
    radar(write_archive(times=every(400))).setup()
    assert not cache.exists()


def test_a_file_of_another_size_is_written_anew(write_archive: WriteArchive, cache: Path) -> None:
    path = write_archive()
    for size in (100, 30 * 12 * 14 + 1):
        unpack(open_archive(path), "key")
        with (cache / "radar.nc.key" / "frames.raw").open("rb+") as file:
            file.truncate(size)
    archive = open_archive(path)
    unpack(archive, "key")
    np.testing.assert_array_equal(archive.read(slice(0, 30)), labelled(30, 12, 14))


def test_nothing_is_left_of_a_file_that_could_not_be_finished(
    write_archive: WriteArchive, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(archive: Archive, frames: slice, rows: slice) -> Iterator[Packed]:
        yield np.zeros((12, 14), np.uint8)
        raise OSError(28, "No space left on device")

    archive = open_archive(write_archive())
    with monkeypatch.context() as broken:
        broken.setattr(Archive, "read", full)
        with pytest.raises(UserError, match=r"radar.nc cannot be unpacked into .*No space left.*data.cache=false"):
            unpack(archive, "key")
    assert files(cache) == []
    assert archive.unpacked is None
    (cache / "radar.nc.key" / ".frames.0123abcd.part.raw").touch()  # as a process that was killed leaves it
    unpack(archive, "key")
    assert files(cache) == [cache / "radar.nc.key" / "frames.raw"]


def test_a_disk_without_room_is_told_before_anything_is_written(
    write_archive: WriteArchive, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3000))
    with pytest.raises(UserError, match=r"take 5.04e-06 GB unpacked, but .* has room for 3e-06 GB; .*data.cache=false"):
        unpack(open_archive(write_archive()), "key")
    assert files(cache) == []


def test_frames_that_are_deleted_meanwhile_are_told(write_archive: WriteArchive, cache: Path) -> None:
    archive = open_archive(write_archive())
    unpack(archive, "key")
    (cache / "radar.nc.key" / "frames.raw").unlink()
    with pytest.raises(UserError, match=r"unpacked frames of .*radar.nc in .* cannot be read .*data.cache=false"):
        archive.read(slice(0, 3))


def test_small_files_stay_mapped_and_of_all_together_no_more_than_are_kept(
    write_archive: WriteArchive, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = [open_archive(write_archive(f"{number}.nc")) for number in range(3)]
    for archive in archives:
        unpack(archive, "key")
    monkeypatch.setattr(mapped, "KEPT", 2 * labelled(30, 12, 14).nbytes)
    monkeypatch.setattr(mapped, "_kept", WeakSet())  # not those of other tests

    def stay() -> list[bool]:
        """A map that is kept shows one frame in one place."""
        shown = [(archive.read(slice(3, 9)), archive.read(slice(3, 9))) for archive in archives]
        return [np.shares_memory(*twice) for twice in shown]

    sent = len(pickle.dumps(archives))
    assert stay() == [True, True, False]
    assert stay() == [True, True, False]
    assert len(pickle.dumps(archives)) == sent  # to another process go no frames
    del archives[0]
    gc.collect()
    assert stay() == [True, True]
    for archive in archives:
        np.testing.assert_array_equal(archive.read(slice(3, 9)), labelled(30, 12, 14)[3:9])


def test_a_frame_that_is_shown_cannot_be_changed(write_archive: WriteArchive, cache: Path) -> None:
    archive = open_archive(write_archive())
    unpack(archive, "key")
    with pytest.raises(ValueError, match="read-only"):
        archive.read(slice(0, 1))[0, 0, 0] = 1
