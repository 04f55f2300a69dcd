"""What is known of each frame is what its pixels say, is computed once, and is never believed of another archive."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import xarray as xr
from conftest import DBZ, RATE, START, WriteArchive, labelled, rain
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from datamodules import statistics
from datamodules.reader import Archive, open_archive
from datamodules.statistics import BLOCK, WET, FrameStatistics, block_of, computed, statistics_of
from forecast.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, for these tests."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("STORMCELL_CACHE", str(folder))
    return folder


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process may read no frame."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("a frame was read")

    monkeypatch.setattr(Archive, "read", refuse)


def assert_same(one: FrameStatistics, other: FrameStatistics) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def shower() -> NDArray[np.float32]:
    """T 12 14, mm/h; frame 11 is missing as a whole."""
    values = rain()
    values[11] = np.nan
    return values


def downwards() -> NDArray[np.int16]:
    """The shower, packed by a negative scale."""
    return np.where(np.isnan(shower()), -999, np.rint((2 - np.nan_to_num(shower())) / 0.01)).astype(np.int16)


CASES: dict[str, tuple[NDArray[Any], Mapping[str, Any], float]] = {
    "uint8 dBZ": (labelled(30, 12, 14), DBZ, 1.0),
    "uint8 dBZ, nothing missing": (labelled(30, 12, 14), {**DBZ, "_FillValue": np.uint8(254)}, 1.0),
    "float32 mm/h": (shower(), RATE, 1.0),
    "float64 m/s": (shower() / 3.6e6, {**RATE, "units": "m s-1"}, 3.6e6),
    "int16 downwards": (
        downwards(),
        {**RATE, "_FillValue": np.int16(-999), "scale_factor": -0.01, "add_offset": 2.0},
        1.0,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["radar.nc", "radar.zarr"])
def test_statistics_are_what_xarray_reads(write_archive: WriteArchive, case: str, name: str) -> None:
    numbers, attributes, factor = CASES[case]
    archive = open_archive(write_archive(name, numbers=numbers, attributes=attributes))
    known = statistics_of(archive)
    with xr.open_dataset(archive.path, **({"consolidated": False} if name.endswith("zarr") else {})) as opened:
        values = opened.dbz.values.astype(np.float64) * factor
    observed = np.isfinite(values).sum((1, 2))
    wet = (values > WET[archive.quantity.units] - 1e-6).sum((1, 2))
    np.testing.assert_allclose(known.valid, observed / (12 * 14))
    np.testing.assert_allclose(known.wet, wet / np.where(observed, observed, np.nan))
    assert (np.nanmin(known.wet) < 1) & (np.nanmax(known.wet) > 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice")
        np.testing.assert_allclose(known.least, np.nanmin(values, (1, 2)), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(known.greatest, np.nanmax(values, (1, 2)), rtol=1e-6)


def test_digests_are_equal_where_frames_are(write_archive: WriteArchive) -> None:
    numbers = labelled(30, 12, 14)
    numbers[17] = numbers[4]
    numbers[18] = numbers[4]
    numbers[18, -1, -1] ^= 1
    digest = statistics_of(open_archive(write_archive(numbers=numbers))).digest
    assert digest[17] == digest[4]
    assert len(set(digest.tolist())) == 29
    as_zarr = statistics_of(open_archive(write_archive("other.zarr", numbers=numbers))).digest
    np.testing.assert_array_equal(as_zarr, digest)


@pytest.mark.parametrize("block", [1, 14, 100, 700, 4000])
def test_statistics_do_not_depend_on_how_frames_are_read(
    write_archive: WriteArchive, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    archive = open_archive(write_archive("radar.zarr"))
    whole = computed(archive)
    monkeypatch.setattr(statistics, "BLOCK", block)
    assert_same(computed(archive), whole)


sizes = st.integers(1, 9000)


@given(shape=st.tuples(sizes, sizes, sizes), chunks=st.tuples(sizes, sizes), itemsize=st.sampled_from([1, 2, 4]))
def test_a_block_is_bounded_and_of_whole_chunks_where_they_fit(
    shape: tuple[int, int, int], chunks: tuple[int, int], itemsize: int
) -> None:
    T, H, W = shape
    t, h = min(chunks[0], T), min(chunks[1], H)
    frames, rows = block_of(shape, itemsize, (t, h, W))
    assert 1 <= frames <= T
    assert 1 <= rows <= H
    assert frames * rows * W * itemsize <= BLOCK
    if t * h * W * itemsize <= BLOCK:
        assert frames == T or frames % t == 0
        assert rows == H or rows % h == 0
    if T * H * W * itemsize <= BLOCK:
        assert (frames, rows) == (T, H)


def test_helping_processes_find_the_same(write_archive: WriteArchive, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = open_archive(write_archive())
    alone = computed(archive)
    monkeypatch.setattr(statistics, "WORTH_PROCESSES", 0)
    monkeypatch.setattr(statistics, "BLOCK", 12 * 14 * 7)
    forbid_reading(monkeypatch)
    assert_same(computed(archive), alone)


@pytest.mark.parametrize("name", ["radar.nc", "radar.zarr"])
def test_statistics_are_kept_beside_the_archive_and_not_computed_again(
    write_archive: WriteArchive, name: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = write_archive(name)
    known = statistics_of(open_archive(path))
    forbid_reading(monkeypatch)
    assert_same(statistics_of(open_archive(path)), known)
    assert not cache.exists()
    with xr.open_dataset(f"{path}.frames.nc") as kept:  # times and units are for people
        assert kept.time.values[0] == np.datetime64(START, "s")
        assert kept.greatest.units == "dBZ"


@pytest.mark.parametrize("change", ["a chunk is written again", "a chunk is gone", "another rule"])
def test_statistics_of_another_state_are_not_believed(
    write_archive: WriteArchive, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = write_archive("radar.zarr")
    statistics_of(open_archive(path))
    forbid_reading(monkeypatch)
    statistics_of(open_archive(path))
    chunk = next(file for file in Path(path).rglob("*") if file.is_file() and "dbz/c" in file.as_posix())
    if change == "another rule":
        monkeypatch.setattr(statistics, "RULE", statistics.RULE + 1)
    elif change == "a chunk is gone":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes())
    with pytest.raises(AssertionError, match="a frame was read"):
        statistics_of(open_archive(path))


def test_an_archive_that_is_written_anew_or_read_otherwise_is_looked_at_anew(write_archive: WriteArchive) -> None:
    other = {"rate": (("time", "y", "x"), rain(), RATE)}
    dbz = statistics_of(open_archive(write_archive(more=other), "dbz"))
    rate = statistics_of(open_archive(write_archive(more=other), "rate"))
    assert rate.greatest.max() == pytest.approx(25.0)
    assert dbz.greatest.max() == pytest.approx(115.0)
    path = write_archive(numbers=np.full((30, 12, 14), 60, np.uint8))
    assert statistics_of(open_archive(path)).greatest.tolist() == [20.0] * 30
    os.utime(path, ns=(0, 0))
    assert statistics_of(open_archive(path)).greatest.tolist() == [20.0] * 30


def test_a_damaged_file_is_made_anew(write_archive: WriteArchive) -> None:
    archive = open_archive(write_archive())
    known = statistics_of(archive)
    kept = Path(f"{archive.path}.frames.nc")
    whole = kept.read_bytes()
    with xr.open_dataset(kept, decode_times=False) as stored:
        loaded = stored.load()
    loaded.wet[3] = 0.0
    loaded.to_netcdf(kept)
    assert_same(statistics_of(archive), known)
    for end in (0, 1, 600, len(whole) // 2, len(whole) - 1):
        kept.write_bytes(whole[:end])
        assert_same(statistics_of(archive), known)
    wet = whole.index(known.wet.tobytes())
    kept.write_bytes(whole[: wet + 5] + bytes([whole[wet + 5] ^ 1]) + whole[wet + 6 :])
    assert_same(statistics_of(archive), known)
    assert_same(FrameStatistics(*(xr.open_dataset(kept)[name].values for name in FrameStatistics._fields)), known)


def test_where_the_archive_may_not_be_touched_the_cache_is_used(
    write_archive: WriteArchive, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    Path(write_archive()).rename(folder / "radar.nc")
    archive = open_archive(str(folder / "radar.nc"))
    folder.chmod(0o555)
    try:
        known = statistics_of(archive)
        assert [path.name for path in folder.iterdir()] == ["radar.nc"]
        assert len([*cache.glob("radar.nc.*.frames.nc")]) == 1
        forbid_reading(monkeypatch)
        assert_same(statistics_of(archive), known)
    finally:
        folder.chmod(0o755)


def test_nowhere_to_write_is_said(write_archive: WriteArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_archive()
    monkeypatch.setattr(statistics, "_may_be_written", lambda folder: False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("STORMCELL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"radar.nc cannot be kept in .*; set the environment variable STORMCELL_CACHE"):
        statistics_of(open_archive(path))


def test_processes_that_start_together_compute_once_and_leave_one_whole_file(
    write_archive: WriteArchive, tmp_path: Path
) -> None:
    path = write_archive()
    program = """
import sys, time
from pathlib import Path
from datamodules import statistics
from datamodules.reader import open_archive

folder, name, path = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
plain = statistics.computed

def slow(archive):
    (folder / f"{name}.computed").touch()
    time.sleep(1)
    return plain(archive)

statistics.computed = slow
archive = open_archive(path)
(folder / f"{name}.ready").touch()
while len([*folder.glob("*.ready")]) < 2:
    time.sleep(0.01)
print(statistics.statistics_of(archive).digest.tolist())
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(number), path],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert len({printed for printed, _ in ended}) == 1
    assert len([*tmp_path.glob("*.computed")]) == 1
    assert not [*tmp_path.glob("*.part*")]
    assert json.loads(ended[0][0]) == statistics_of(open_archive(path)).digest.tolist()


def test_negative_rain_rates_are_refused_and_rounding_is_not(write_archive: WriteArchive) -> None:
    numbers = rain()
    numbers[17, 3, 4] = -0.25
    with pytest.raises(
        UserError,
        match=r"Frame 17 of .*radar.nc \(2025-02-27 02:50:00\) holds a rain rate of -0.25 mm/h; .* _FillValue",
    ):
        statistics_of(open_archive(write_archive(numbers=numbers, attributes=RATE)))
    numbers[17, 3, 4] = -1e-5
    assert statistics_of(open_archive(write_archive(numbers=numbers, attributes=RATE))).least[17] < 0


@pytest.mark.parametrize(
    ("numbers", "attributes"),
    [(np.full((30, 12, 14), 255, np.uint8), DBZ), (np.full((30, 12, 14), np.nan, np.float32), RATE)],
)
def test_an_archive_in_which_everything_is_missing_is_refused(
    write_archive: WriteArchive, numbers: NDArray[Any], attributes: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"Every pixel of 'dbz' .* is missing; check _FillValue"):
        statistics_of(open_archive(write_archive(numbers=numbers, attributes=attributes)))
