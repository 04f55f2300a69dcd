"""Tiny radar archives whose every number tells the frame and the pixel that it comes from, and the way to real ones."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import settings
from jaxtyping import install_import_hook
from numpy.typing import NDArray

# Shapes and types are checked while testing, and only then.
install_import_hook(
    [f"forecast.{room}" for room in ("cells", "networks", "recurrence", "heads", "losses")], "beartype.beartype"
)

# The same examples on each machine, however slow it is.
settings.register_profile("stormcell", derandomize=True, deadline=None)
settings.load_profile("stormcell")

START = 1_740_614_400  # 2025-02-27 00:00 UTC
CADENCE = 600

DBZ: Mapping[str, Any] = {
    "standard_name": "equivalent_reflectivity_factor",
    "units": "dBZ",
    "scale_factor": 0.5,
    "add_offset": -10.0,
    "_FillValue": np.uint8(255),
}
RATE: Mapping[str, Any] = {"standard_name": "rainfall_rate", "units": "mm h-1"}
DEGREES: Mapping[str, Mapping[str, str]] = {
    "y": {"standard_name": "latitude", "units": "degrees_north"},
    "x": {"standard_name": "longitude", "units": "degrees_east"},
}

WriteArchive = Callable[..., str]


def every(frames: int, start: int = START, cadence: int = CADENCE) -> NDArray[np.int64]:
    """Times without a gap, seconds UTC."""
    return start + cadence * np.arange(frames, dtype=np.int64)


def labelled(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """T H W, 0..250, no two frames alike; its first row of pixels is missing (255) in every third frame."""
    t, y, x = np.ogrid[:frames, :height, :width]
    numbers = ((37 * t + 11 * y + 3 * x) % 251).astype(np.uint8)
    numbers[::3, 0] = 255
    return numbers


def rain(frames: int = 30) -> NDArray[np.float32]:
    """T 12 14, mm/h with NaN where `labelled` is missing."""
    numbers = labelled(frames, 12, 14).astype(np.float32) / 10
    numbers[labelled(frames, 12, 14) == 255] = np.nan
    return numbers


@pytest.fixture
def write_archive(tmp_path: Path) -> WriteArchive:
    """Writes an archive exactly as told (packed numbers, attributes as they stand) and returns its path."""

    def write(
        name: str = "radar.nc",
        *,
        times: NDArray[np.int64] | None = None,
        size: tuple[int, int] = (12, 14),
        numbers: NDArray[Any] | None = None,
        attributes: Mapping[str, Any] = DBZ,
        variable: str = "dbz",
        dims: Sequence[str] = ("time", "y", "x"),
        coordinates: Mapping[str, Mapping[str, str]] = DEGREES,
        more: Mapping[str, tuple[Sequence[str], NDArray[Any], Mapping[str, Any]]] | None = None,
    ) -> str:
        times = every(30) if times is None else times
        numbers = labelled(len(times), *size) if numbers is None else numbers
        data = {variable: (dims, numbers, {**attributes, "grid_mapping": "crs"}), **(more or {})}
        dataset = xr.Dataset({key: (axes, values, dict(notes)) for key, (axes, values, notes) in data.items()})
        time, y, x = dims
        dataset[time] = (time, times, {"standard_name": "time", "units": "seconds since 1970-01-01"})
        for dim, first, step in ((y, 46.0, -0.01), (x, 11.0, 0.014)):
            dataset[dim] = (dim, first + step * np.arange(dataset.sizes[dim]), dict(coordinates.get(dim, {})))
        mapping = {"grid_mapping_name": "latitude_longitude", "semi_major_axis": np.float64(6378137.0)}
        dataset["crs"] = ((), np.int32(0), mapping)
        path = tmp_path / name
        if name.endswith(".zarr"):
            dataset.to_zarr(path, zarr_format=3, consolidated=False)
        else:
            dataset.to_netcdf(path, engine="netcdf4")
        return str(path)

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real observations: $STORMCELL_DATA, or `../shared/data` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("STORMCELL_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real observations: {folder} is not a folder (set STORMCELL_DATA)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept for a user is kept apart for the tests."""
    os.environ["STORMCELL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
