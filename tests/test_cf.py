"""Archives are understood as CF says, read as xarray reads them, and refused in one sentence where they hold no rain."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import DBZ, RATE, WriteArchive, every, labelled, rain
from numpy.typing import NDArray

from datamodules.cf import meaning_of
from datamodules.reader import open_archive
from forecast.errors import UserError
from forecast.units import Grid, Quantity


def decoded(path: str, variable: str) -> NDArray[np.float64]:
    """What anyone else would read."""
    engine = "zarr" if path.endswith(".zarr") else "netcdf4"
    with xr.open_dataset(
        path, engine=engine, backend_kwargs={"consolidated": False} if engine == "zarr" else None
    ) as d:
        return d[variable].values.astype(np.float64)


def read(path: str, variable: str | None = None) -> tuple[Quantity, NDArray[np.float64], NDArray[np.bool_]]:
    archive = open_archive(path, variable)
    values, valid = archive.quantity.decode(torch.from_numpy(archive.read(slice(0, len(archive.times)))))
    return archive.quantity, values.numpy().astype(np.float64), valid.numpy()


@pytest.mark.parametrize("units", ["mm/h", "mm h-1", "mm hr-1", "mm/hr", "mm hour-1", "mm h^-1", "mm h**-1", "mm.h-1"])
def test_millimetres_per_hour_in_every_spelling(units: str) -> None:
    assert meaning_of(units) == ("mm/h", 1.0)


@pytest.mark.parametrize(
    ("units", "meaning"),
    [
        ("dBZ", ("dBZ", 1.0)),
        ("dBz", ("dBZ", 1.0)),
        ("DBZ", ("dBZ", 1.0)),
        ("m s-1", ("mm/h", 3.6e6)),
        ("m/s", ("mm/h", 3.6e6)),
        ("kg m-2 s-1", ("mm/h", 3600.0)),
        ("kg/m2/s", ("mm/h", 3600.0)),
        ("kg m^-2 h^-1", ("mm/h", 1.0)),
        ("mm s-1", ("mm/h", 3600.0)),
        ("mm day-1", ("mm/h", 1 / 24)),
        ("mm", ("mm", 1.0)),
        ("kg m-2", ("mm", 1.0)),
        ("m", ("mm", 1000.0)),
        ("mm h", None),
        ("m2 s-1", None),
        ("K", None),
        ("0.1 mm/h", None),
        ("mm/(5 min)", None),
        ("1", None),
        ("", None),
    ],
)
def test_units(units: str, meaning: tuple[str, float] | None) -> None:
    assert meaning_of(units) == (meaning if meaning is None else pytest.approx(meaning))


def _int16(add_offset: float) -> tuple[NDArray[np.int16], dict[str, Any]]:
    numbers = labelled(30, 12, 14).astype(np.int16) - 20
    numbers[::3, 0] = -32768
    fill = {"scale_factor": np.float32(0.01), "add_offset": np.float32(add_offset), "_FillValue": np.int16(-32768)}
    return numbers, {**RATE, **fill}


def _uint16() -> tuple[NDArray[np.uint16], dict[str, Any]]:
    numbers = labelled(30, 12, 14).astype(np.uint16) * 200
    numbers[::3, 0] = 65535
    numbers[1::3, 0] = 65534
    codes = {"_FillValue": np.uint16(65535), "missing_value": np.uint16(65534), "scale_factor": 0.001}
    return numbers, {**RATE, **codes}


CASES = {
    "uint8 dBZ": (labelled(30, 12, 14), DBZ, torch.uint8, 1.0),
    "float mm/h with NaN": (rain(), RATE, torch.float32, 1.0),
    "float64 with a fill value": (
        np.nan_to_num(rain().astype(np.float64), nan=-999.9),
        {**RATE, "_FillValue": -999.9},
        torch.float32,
        1.0,
    ),
    "flux": (
        rain() / 3600,
        {"standard_name": "convective_rainfall_flux", "units": "kg m-2 s-1"},
        torch.float32,
        3600.0,
    ),
    "metres per second": (
        rain() / 3.6e6,
        {"standard_name": "lwe_precipitation_rate", "units": "m s-1"},
        torch.float32,
        3.6e6,
    ),
    "int16 with an offset": (*_int16(0.5), torch.int16, 1.0),
    "uint16 with two missing codes": (*_uint16(), torch.int32, 1.0),
    "signed bytes meant as unsigned": (
        labelled(30, 12, 14).view(np.int8),
        {**DBZ, "_Unsigned": "true", "_FillValue": np.int8(-1)},
        torch.uint8,
        1.0,
    ),
    "big-endian": (labelled(30, 12, 14).astype(">i2"), {**DBZ, "_FillValue": np.int16(255)}, torch.int16, 1.0),
}


@pytest.mark.filterwarnings("ignore:variable 'dbz' has multiple fill values")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["radar.nc", "radar.zarr"])
def test_frames_decode_to_what_xarray_decodes(write_archive: WriteArchive, case: str, name: str) -> None:
    numbers, attributes, dtype, factor = CASES[case]
    path = write_archive(name, numbers=numbers, attributes=attributes)
    archive = open_archive(path)
    assert torch.from_numpy(archive.read(slice(0, 2))).dtype == dtype
    quantity, values, valid = read(path)
    truth = decoded(path, "dbz") * factor
    if "two missing codes" in case:  # the netCDF backend of xarray masks both, as the conventions say
        assert np.isnan(truth).mean() > 1 / 40
    np.testing.assert_array_equal(valid, np.isfinite(truth))
    np.testing.assert_allclose(values, np.fmax(truth, quantity.floor), rtol=2e-6, atol=1e-5)
    archive.close()


def test_a_window_of_a_crop_is_that_part_of_the_archive(write_archive: WriteArchive) -> None:
    archive = open_archive(write_archive())
    part = archive.read(slice(4, 9), slice(2, 7), slice(3, 11))
    np.testing.assert_array_equal(part, labelled(30, 12, 14)[4:9, 2:7, 3:11])


@pytest.mark.parametrize(
    ("dims", "coordinates"),
    [
        (("time", "lat", "lon"), {}),
        (("time", "latitude", "longitude"), {}),
        (("t", "rows", "cols"), {"rows": {"axis": "Y"}, "cols": {"axis": "X"}}),
        (
            ("time", "a", "b"),
            {"a": {"standard_name": "projection_y_coordinate"}, "b": {"standard_name": "projection_x_coordinate"}},
        ),
    ],
)
def test_dimensions_are_known_by_name_axis_or_standard_name(
    write_archive: WriteArchive, dims: tuple[str, str, str], coordinates: Mapping[str, Mapping[str, str]]
) -> None:
    archive = open_archive(write_archive(dims=dims, coordinates=coordinates))
    np.testing.assert_array_equal(archive.read(slice(0, 30)), labelled(30, 12, 14))
    assert archive.grid.units == "pixel"


def test_the_order_of_dimensions_does_not_matter(write_archive: WriteArchive, tmp_path: Path) -> None:
    with xr.open_dataset(write_archive(), mask_and_scale=False) as stored:
        stored.transpose("x", "time", "y").to_netcdf(tmp_path / "turned.nc")
    np.testing.assert_array_equal(open_archive(str(tmp_path / "turned.nc")).read(slice(0, 30)), labelled(30, 12, 14))


def test_the_grid_is_that_of_the_coordinates_and_plain_enough_for_a_checkpoint(write_archive: WriteArchive) -> None:
    grid = open_archive(write_archive()).grid
    assert grid.size == (12, 14)
    assert grid.units == "degrees"
    assert grid.origin == pytest.approx((46.0, 11.0))
    assert grid.spacing == pytest.approx((-0.01, 0.014))
    assert grid.projection == {"grid_mapping_name": "latitude_longitude", "semi_major_axis": 6378137.0}
    assert type(grid.projection["semi_major_axis"]) is float
    assert all(type(number) is float for number in (*grid.origin, *grid.spacing))
    assert Grid.from_dict(grid.to_dict()) == grid


def test_rain_among_other_variables(write_archive: WriteArchive) -> None:
    numbers = labelled(30, 12, 14)
    others = {
        "snow": (("time", "y", "x"), rain(), {"standard_name": "lwe_snowfall_rate", "units": "mm h-1"}),
        "wind": (("time", "y", "x"), rain(), {"units": "m s-1"}),
        "total": (("time", "y", "x"), rain(), {"units": "mm"}),
        "climate": (("y", "x"), rain()[1], {"standard_name": "rainfall_rate", "units": "mm h-1"}),
    }
    path = write_archive(more=others)
    assert open_archive(path).variable == "dbz"
    np.testing.assert_array_equal(open_archive(path).read(slice(0, 30)), numbers)
    assert open_archive(path, "snow").quantity.units == "mm/h"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attributes": {"units": "K"}},
            "no rain rate or reflectivity .* but dbz.time, y, x. in K; .*set data.variable",
        ),
        ({"attributes": {"units": "mm"}}, "holds accumulations .mm.; divide them by the interval"),
        ({"attributes": {"standard_name": "rainfall_amount", "units": "kg m-2"}}, "holds accumulations"),
        ({"attributes": {**RATE, "units": "inches"}}, "units of 'dbz' .* are 'inches'; allowed are dBZ, .* mm/h"),
        (
            {"more": {"other": (("time", "y", "x"), rain(), RATE)}},
            "several variables of rain, dbz, other; choose one by data.variable",
        ),
        ({"dims": ("time", "level", "x")}, "has the dimensions .time, level, x.; it must have time, y and x only"),
        ({"times": every(0)}, "is empty: its time has length 0"),
    ],
)
def test_archives_that_are_not_of_rain_are_refused(
    write_archive: WriteArchive, changes: dict[str, Any], message: str
) -> None:
    path = write_archive(**changes)
    with pytest.raises(UserError, match=message):
        open_archive(path)


def test_a_variable_that_is_not_there_is_refused(write_archive: WriteArchive) -> None:
    with pytest.raises(UserError, match=r"data.variable is 'rain', which is not in .* it holds dbz"):
        open_archive(write_archive(), "rain")


def test_frames_without_a_date_are_refused(write_archive: WriteArchive, tmp_path: Path) -> None:
    with xr.open_dataset(write_archive(), mask_and_scale=False, decode_times=False) as stored:
        stored["time"].attrs["_FillValue"] = stored["time"].values[7]
        stored.to_netcdf(tmp_path / "undated.nc")
        stored["time"].attrs.update(calendar="360_day", _FillValue=-1)
        stored.to_netcdf(tmp_path / "model.nc")
        stored.drop_vars("time").to_netcdf(tmp_path / "timeless.nc")
    with pytest.raises(UserError, match=r"Frame 7 of .* has no time"):
        open_archive(str(tmp_path / "undated.nc"))
    with pytest.raises(UserError, match=r"no dates .* standard calendar"):
        open_archive(str(tmp_path / "model.nc"))
    with pytest.raises(UserError, match="no coordinate variable"):
        open_archive(str(tmp_path / "timeless.nc"))


def test_files_that_are_absent_cut_short_or_of_another_format_are_refused(
    write_archive: WriteArchive, tmp_path: Path
) -> None:
    whole = Path(write_archive()).read_bytes()
    (tmp_path / "short.nc").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.nc").write_text("rain, rain, go away")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"There is no archive .*nowhere.nc; set data.archive"):
        open_archive(str(tmp_path / "nowhere.nc"))
    for name in ("short.nc", "text.nc", "folder"):
        with pytest.raises(UserError, match=f"{name} cannot be opened as NetCDF or Zarr"):
            open_archive(str(tmp_path / name))


def test_frames_damaged_on_disk_are_named_when_they_are_read(write_archive: WriteArchive, tmp_path: Path) -> None:
    path = tmp_path / "packed.nc"
    noise = np.random.default_rng(0).integers(0, 255, (30, 12, 14), dtype=np.uint8)
    with xr.open_dataset(write_archive(numbers=noise), mask_and_scale=False) as stored:
        stored.to_netcdf(path, encoding={"dbz": {"zlib": True, "chunksizes": (10, 12, 14)}})
    whole = path.read_bytes()
    chunks = [place for place in range(len(whole)) if whole[place : place + 2] == b"\x78\x5e"]  # zlib's first bytes
    assert len(chunks) >= 3
    path.write_bytes(whole[: chunks[-1] + 100] + bytes(200) + whole[chunks[-1] + 300 :])
    archive = open_archive(str(path))
    assert archive.read(slice(0, 10)).shape == (10, 12, 14)
    with pytest.raises(UserError, match=r"Frames 15 to 26 of .*packed.nc cannot be read .* damaged"):
        archive.read(slice(15, 27))
