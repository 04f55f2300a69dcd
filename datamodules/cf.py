"""Understanding CF: which variable of an archive is rain, what its numbers mean, when they were, where they are.

Everything here looks at a dataset opened raw (packed, times undecoded) and reads coordinates at most.
"""

import json
import re
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from datamodules.windows import Times
from forecast.errors import UserError
from forecast.units import Grid, Quantity

Axis = Literal["T", "Y", "X"]
Dims = tuple[Hashable, Hashable, Hashable]
"""The names of the dimensions time, y and x."""

# Rates in m s-1 and fluxes in kg m-2 s-1. Snowfall is not rain, and what reaches a canopy is not what a radar sees.
_RAIN = re.compile(r"(lwe_)?((convective|stratiform|large_scale)_)?(rainfall|precipitation)_(rate|flux)")
_REFLECTIVITY = "equivalent_reflectivity_factor"

_AXES: Mapping[str, Axis] = {
    "time": "T",
    **dict.fromkeys(("projection_y_coordinate", "latitude", "grid_latitude", "y", "lat", "rlat", "south_north"), "Y"),
    **dict.fromkeys(("projection_x_coordinate", "longitude", "grid_longitude", "x", "lon", "rlon", "west_east"), "X"),
}
THRESHOLDS = {"dBZ": (10.0, 20.0, 30.0, 40.0), "mm/h": (0.5, 2.0, 5.0, 10.0, 30.0)}  # rain: HKO-7, arXiv 1706.03458
FLOORS = {"dBZ": -10.0, "mm/h": 0.0}

_POWER = re.compile(r"([/.*]?)\s*([a-zA-Z]+)\s*(?:\^|\*\*)?\s*([-+]?\d+)?\s*")
_SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
}
# Millimetres of water in each unit of amount; a kilogram on a square metre is one.
_DEPTHS: Mapping[tuple[tuple[str, int], ...], float] = {
    (("mm", 1),): 1.0,
    (("cm", 1),): 10.0,
    (("m", 1),): 1000.0,
    (("kg", 1), ("m", -2)): 1.0,
}
_LENGTHS = {**dict.fromkeys(("m", "metre", "meter", "metres", "meters"), "m"), "km": "km", "kilometre": "km"}


class Meaning(NamedTuple):
    """Values in `units` = factor * the archive's own."""

    units: Literal["dBZ", "mm/h", "mm"]
    factor: float


def meaning_of(units: str) -> Meaning | None:
    """Reflectivity, a rain rate or an amount of rain, in any usual spelling; None where it is neither."""
    units = units.strip()
    if units.lower() == "dbz":
        return Meaning("dBZ", 1.0)
    powers: dict[str, int] = {}
    position = 0
    while position < len(units):
        part = _POWER.match(units, position)
        if part is None:
            return None
        position = part.end()
        sign, name, power = part.groups()
        powers[name] = powers.get(name, 0) + int(power or 1) * (-1 if sign == "/" else 1)
    depth = _DEPTHS.get(tuple(sorted((name, power) for name, power in powers.items() if name not in _SECONDS)))
    times = [(_SECONDS[name], power) for name, power in powers.items() if name in _SECONDS]
    if depth is None or len(times) > 1:
        return None
    if not times:
        return Meaning("mm", depth)
    seconds, power = times[0]
    return Meaning("mm/h", depth * 3600 / seconds) if power == -1 else None


def find_rain(opened: xr.Dataset, path: str, variable: str | None) -> tuple[xr.DataArray, Meaning, Dims]:
    """The one variable of rain, what its unit says, and its dimensions.

    Raises:
        UserError: none, several, an accumulation, an unknown unit, or dimensions other than time, y and x.
    """
    listed = "; ".join(_describe(data) for data in opened.data_vars.values()) or "no variables"
    if variable is None:
        name = _rain_name(opened, path, listed)
    elif variable in opened.data_vars:
        name = variable
    else:
        raise UserError(f"data.variable is {variable!r}, which is not in {path}; it holds {listed}.")
    data = opened[name]
    units = str(data.attrs.get("units", ""))
    meaning = meaning_of(units)
    if meaning is None:
        raise UserError(
            f"The units of {name!r} in {path} are {units!r}; allowed are dBZ, and rates such as mm/h, mm h-1, m s-1 "
            "or kg m-2 s-1: convert the values, or correct the attribute."
        )
    if meaning.units == "mm":
        raise UserError(
            f"{name!r} in {path} holds accumulations ({units}); divide them by the interval over which they were "
            "gathered, and store rain rates with units mm/h."
        )
    roles = {_axis(opened, dim): dim for dim in data.dims}
    if len(data.dims) != 3 or set(roles) != {"T", "Y", "X"}:
        raise UserError(
            f"{name!r} in {path} has the dimensions ({', '.join(map(str, data.dims))}); it must have time, y and x "
            "only: select one level, and name the dimensions so or give their coordinates a CF standard_name or axis."
        )
    return data, meaning, (roles["T"], roles["Y"], roles["X"])


def _rain_name(opened: xr.Dataset, path: str, listed: str) -> str:
    rain, amounts = [], []
    for key, data in opened.data_vars.items():
        standard_name = str(data.attrs.get("standard_name", ""))
        units = str(data.attrs.get("units", "")).strip().lower()
        meaning = meaning_of(units)
        if data.ndim < 3:  # a map that does not change, or a series at one place
            continue
        if standard_name == _REFLECTIVITY or _RAIN.fullmatch(standard_name):
            rain.append(str(key))
        elif standard_name.endswith(("rainfall_amount", "precipitation_amount")):
            amounts.append(str(key))
        # Without a name, only units that tell: m s-1 may be wind, and kg m-2 s-1 any water.
        elif not standard_name and meaning is not None and units.startswith(("dbz", "mm")):
            (amounts if meaning.units == "mm" else rain).append(str(key))
    if len(rain) > 1:
        raise UserError(f"{path} holds several variables of rain, {', '.join(rain)}; choose one by data.variable.")
    if not rain and not amounts:
        raise UserError(
            f"{path} holds no rain rate or reflectivity that its CF standard_name or units would tell, but {listed}; "
            "correct the attributes, or set data.variable."
        )
    return (rain or amounts)[0]


def _describe(data: xr.DataArray) -> str:
    units = f" in {data.attrs['units']}" if "units" in data.attrs else ""
    return f"{data.name}({', '.join(map(str, data.dims))}){units}"


def _axis(opened: xr.Dataset, dim: Hashable) -> Axis | None:
    attributes = opened[dim].attrs if dim in opened.variables else {}
    if " since " in str(attributes.get("units", "")):
        return "T"
    axes: Mapping[str, Axis] = {"T": "T", "Y": "Y", "X": "X"}
    return (
        axes.get(str(attributes.get("axis", "")).upper())
        or _AXES.get(str(attributes.get("standard_name", "")))
        or _AXES.get(str(dim).lower())
    )


def times_of(opened: xr.Dataset, path: str, dim: Hashable) -> Times:
    """Seconds UTC of every frame.

    Raises:
        UserError: no frames, no times, or times that are no dates of the usual calendar.
    """
    cure = "store times as CF does, such as 'seconds since 1970-01-01' in the standard calendar"
    if opened.sizes[dim] == 0:
        raise UserError(f"{path} is empty: its {dim} has length 0; write frames into it.")
    if dim not in opened.variables:
        raise UserError(f"The dimension {dim} of {path} has no coordinate variable; {cure}.")
    try:
        times = xr.decode_cf(opened[[dim]])[dim].values
    except (ValueError, OverflowError) as error:
        raise UserError(f"The times of {path} are not understood ({error}); {cure}.") from error
    if not np.issubdtype(times.dtype, np.datetime64):
        raise UserError(f"The times of {path} are no dates (units {opened[dim].attrs.get('units')!r}); {cure}.")
    if np.isnat(times).any():
        raise UserError(f"Frame {int(np.argmax(np.isnat(times)))} of {path} has no time; drop the frame or date it.")
    # Rounded: times stored as a fraction of days miss the second by a little.
    seconds: Times = (times.astype("datetime64[ns]").astype(np.int64) + 500_000_000) // 1_000_000_000
    return seconds


class Packing(NamedTuple):
    """How packed numbers are read."""

    dtype: np.dtype[Any]
    """What frames are dealt as; one that torch takes."""
    unsigned: bool
    """Stored as signed integers, meant as unsigned ones: the classic netCDF formats have no others."""
    missing: tuple[float, ...]
    """Every number that means missing; NaN does in any case."""


def packing_of(data: xr.DataArray, meaning: Meaning, path: str) -> tuple[Packing, Quantity]:
    """How to read the packed numbers, and what they mean in dBZ or mm/h. valid_min and its like are not looked at.

    Raises:
        UserError: they are not numbers.
    """
    attributes = data.attrs
    if data.dtype.kind not in "uif":
        raise UserError(f"{data.name!r} in {path} holds values of type {data.dtype}; it must hold numbers.")
    unsigned = data.dtype.kind == "i" and str(attributes.get("_Unsigned", "")).lower() == "true"
    stored = np.dtype(f"u{data.dtype.itemsize}") if unsigned else data.dtype.newbyteorder("=")
    # Torch has no full uint16. Of the wide types, 32-bit floats hold all that decoding would keep.
    taken = {"uint8": "uint8", "int8": "int8", "int16": "int16", "uint16": "int32", "int32": "int32"}
    dtype = np.dtype(taken.get(stored.name, "float32"))

    missing: dict[float, None] = {}
    for key in ("_FillValue", "missing_value"):
        for code in np.ravel(attributes.get(key, [])).tolist():
            code = code + 256**stored.itemsize if unsigned and code < 0 else code
            if np.isfinite(code) and (stored.kind == "f" or np.iinfo(stored).min <= code <= np.iinfo(stored).max):
                missing[float(code)] = None
    quantity = Quantity(
        name=str(attributes.get("standard_name", data.name)),
        long_name=str(attributes.get("long_name", data.name)),
        units=meaning.units,
        thresholds=THRESHOLDS[meaning.units],
        floor=FLOORS[meaning.units],
        scale=float(np.ravel(attributes.get("scale_factor", 1.0))[0]) * meaning.factor,
        offset=float(np.ravel(attributes.get("add_offset", 0.0))[0]) * meaning.factor,
        missing=next(iter(missing), None) if dtype.kind != "f" else None,
    )
    return Packing(dtype, unsigned, tuple(missing)), quantity


def grid_of(opened: xr.Dataset, data: xr.DataArray, dims: Dims, path: str) -> Grid:
    """Where the pixels are; counted in pixels where no coordinates in lengths or degrees say it.

    Raises:
        UserError: unevenly spaced coordinates.
    """
    height, width = (opened.sizes[dim] for dim in dims[1:])
    mapping = str(data.attrs.get("grid_mapping", "")).split(" ")[0].removesuffix(":")
    projection = {key: _plain(value) for key, value in opened[mapping].attrs.items()} if mapping in opened else {}
    grid = Grid((height, width), projection=projection)
    units = {_length(opened, dim) for dim in dims[1:]}
    unit = units.pop()
    if units or unit is None:
        return grid
    (top, down), (left, right) = (_even_spacing(opened, dim, path) for dim in dims[1:])
    return replace(grid, origin=(top, left), spacing=(down, right), units=unit)


def _length(opened: xr.Dataset, dim: Hashable) -> str | None:
    units = str(opened[dim].attrs.get("units", "")) if dim in opened.variables else ""
    return "degrees" if units.startswith("degree") else _LENGTHS.get(units)


def _even_spacing(opened: xr.Dataset, dim: Hashable, path: str) -> tuple[float, float]:
    """The first coordinate and the step."""
    places: NDArray[np.float64] = xr.decode_cf(opened[[dim]])[dim].values.astype(np.float64)
    step = float(places[-1] - places[0]) / (len(places) - 1) if len(places) > 1 else 1.0
    # Single precision and rounded degrees are allowed for; a grid that stretches is not.
    if step == 0 or not np.allclose(places, places[0] + step * np.arange(len(places)), rtol=0, atol=0.1 * abs(step)):
        raise UserError(f"The coordinate {dim} of {path} is not evenly spaced; interpolate the frames to an even grid.")
    return float(places[0]), step


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays -> Python's, which JSON and a checkpoint hold; anything else as text."""
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    try:
        json.dumps(plain)
    except TypeError:
        return str(plain)
    return plain
