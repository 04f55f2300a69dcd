"""What a test leaves in its folder: skill.nc, skill.csv and two figures and a film, each written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xarray as xr
from numpy.typing import NDArray

from forecast.files import whole
from forecast.film import write_film
from forecast.plots import forecast_figure, skill_figure
from forecast.skill import to_csv
from forecast.units import Grid, Quantity

_DPI = 150


class Sample(NamedTuple):
    """One window and what the models made of it, in physical units. Axes: T past, S forecast, C channels, H W space."""

    past: NDArray[Any]
    """T C H W; NaN where missing."""
    truth: NDArray[Any]
    """S C H W."""
    valid: NDArray[Any]
    """S C H W bool, of the truth."""
    forecasts: Mapping[str, NDArray[Any]]
    """S C H W by model's name."""


def write(
    folder: Path,
    skill: xr.Dataset,
    sample: Sample | None,
    quantity: Quantity,
    cadence: int | None,
    grid: Grid | None = None,
) -> None:
    """Write skill.nc (NetCDF-4), skill.csv, figures/skill.png and, of a sample, figures/forecast.png and forecast.gif.

    Args:
        folder: made where it is wanting; files of the same names are replaced.
        skill: from `forecast.skill.Skill.dataset`.
        sample: the window to show.
        quantity: of the sample.
        cadence: seconds between frames; None where frames have no time.
        grid: of the sample; see `forecast.plots.forecast_figure`.
    """
    # Counts by event are mostly zeros; coordinates have no missing values.
    encoding: dict[str, dict[str, Any]] = {str(name): {"zlib": True, "complevel": 1} for name in skill.data_vars}
    encoding |= {name: {"_FillValue": None} for name in ("lead_time", "threshold")}
    with whole(folder / "skill.nc") as path:
        skill.to_netcdf(path, engine="netcdf4", encoding=encoding)
    with whole(folder / "skill.csv") as path:
        path.write_text(to_csv(skill), encoding="utf-8")
    with whole(folder / "figures" / "skill.png") as path:
        skill_figure(skill).savefig(path, dpi=_DPI)
    if sample is not None:
        with whole(folder / "figures" / "forecast.png") as path:
            forecast_figure(*sample, quantity, cadence, grid).savefig(path, dpi=_DPI)
        with whole(folder / "figures" / "forecast.gif") as path:
            write_film(path, *sample, quantity, cadence, grid)
