"""What a test leaves in its folder: skill.nc, tables, figures and a film, each written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import xarray as xr
from numpy.typing import NDArray

from forecast.curves import skill_figure, spectrum_figure
from forecast.files import whole
from forecast.film import write_film
from forecast.plots import forecast_figure
from forecast.protocol import ROOT
from forecast.tables import to_csv
from forecast.units import Grid, Quantity

_DPI = 150


class Sample(NamedTuple):
    """One window and what the models made of it, in physical units. Axes: T past, S forecast, C channels, H W space."""

    past: NDArray[Any]
    """T C H W, what was given; NaN where missing."""
    truth: NDArray[Any]
    """S C H W."""
    valid: NDArray[Any]
    """S C H W bool, of the truth."""
    forecasts: Mapping[str, NDArray[Any]]
    """S C H W by model's name."""


def write(
    folder: Path,
    skills: Mapping[str, xr.Dataset],
    sample: Sample | None,
    quantity: Quantity,
    cadence: int | None,
    grid: Grid | None = None,
    figures: bool = True,
    after: int = 0,
    span: int = 1,
) -> None:
    """Write skill.nc (NetCDF-4), skill.csv, and the figures: the skill, the spectrum, and of a sample a picture and a film.

    Args:
        folder: made where it is wanting; files of the same names are replaced.
        skills: by section, from `forecast.sections.Sections.datasets`; each is a group of skill.nc and has a CSV of its own.
        sample: the window to show.
        quantity: of the sample.
        cadence: seconds between frames that were given; None where frames have no time.
        grid, after, span: of the sample; see `forecast.plots.forecast_figure`.
        figures: draw them, too.
    """
    with whole(folder / "skill.nc") as path:
        for section, skill in skills.items():
            # Counts by event are mostly zeros; coordinates have no missing values.
            encoding: dict[str, dict[str, Any]] = {
                str(name): {"zlib": True, "complevel": 1} for name in skill.data_vars if skill[name].ndim
            }
            encoding |= {str(name): {"_FillValue": None} for name in skill.coords if skill[name].dtype.kind == "f"}
            mode: Literal["a", "w"] = "a" if path.exists() else "w"
            skill.to_netcdf(path, mode, engine="netcdf4", group=section, encoding=encoding)
    for section, skill in skills.items():
        with whole(folder / csv_name(section)) as path:
            path.write_text(to_csv(skill), encoding="utf-8")
    if not figures:
        return
    drawn = {"skill": skill_figure(skills[ROOT])}
    if "power_forecast" in skills[ROOT]:
        drawn["spectrum"] = spectrum_figure(skills[ROOT])
    if sample is not None:
        drawn["forecast"] = forecast_figure(*sample, quantity, cadence, grid, after, span)
        with whole(folder / "figures" / "forecast.gif") as path:
            write_film(path, *sample, quantity, cadence, grid, after, span)
    for name, figure in drawn.items():
        with whole(folder / "figures" / f"{name}.png") as path:
            figure.savefig(path, dpi=_DPI)


def csv_name(section: str) -> str:
    """Of the file that holds the scores of a section."""
    return "skill.csv" if section == ROOT else f"skill_{section}.csv"
