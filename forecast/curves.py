"""The figures of the scores: skill by lead time, and power by wavelength."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from forecast.plots import STYLE, axis_label, every

# Okabe and Ito's colours for all kinds of colour vision (jfly.uni-koeln.de/color), the yellow left out.
_MODELS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_VALUES = ("mse", "mae", "correlation")


def skill_figure(skill: xr.Dataset) -> Figure:
    """Scores by lead time, one line per model: values on top, then CSI and frequency bias by threshold.

    Scores that the dataset lacks are left out.

    Args:
        skill: from `forecast.skill.Skill.dataset`.
    """
    thresholds = every(skill.sizes["threshold"], 6) if "csi" in skill else []
    values = [name for name in _VALUES if name in skill]
    models = [str(name) for name in skill["model"].values]
    columns = max(3, len(thresholds))
    # With one threshold, its CSI and its bias share a row.
    rows = bool(values) + min(2, len(thresholds))
    units = skill["threshold"].attrs["units"]
    with rc_context(STYLE):
        figure = Figure(figsize=(2.5 * columns + 0.4, 2.05 * rows + 0.75), layout="constrained")
        cells = figure.add_gridspec(max(1, rows), columns)

        def panel(row: int, column: int, scores: xr.DataArray, title: str) -> Axes:
            ax = figure.add_subplot(cells[row, column])
            for index, name in enumerate(models):
                _line(ax, scores["lead_time"].values, scores.isel(model=index).values, name, index)
            ax.set_title(title, loc="left")
            ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 3, 5, 6, 10], integer=True))
            return ax

        for column, name in enumerate(values):
            score = skill[name]
            ax = panel(0, column, score, str(score.attrs["long_name"]))
            ax.set_ylabel(axis_label({"correlation": "r"}.get(name, name.upper()), score.attrs["units"]))
            if name == "correlation":
                ax.set_ylim(min(0.0, _least(score) - 0.05), 1.02)
            else:
                ax.set_ylim(bottom=0.0)

        limit = _bias_limit(skill["frequency_bias"]) if thresholds else 1.0
        for column, index in enumerate(thresholds):
            chosen = skill.isel(threshold=index)
            event = f"≥ {float(chosen['threshold']):g} {units}".removesuffix(" 1")
            first = int(bool(values))
            ax = panel(first, column, chosen["csi"], event)
            ax.set_ylim(0.0, 1.02)
            shared = len(thresholds) == 1
            bias = panel(first + (not shared), column + shared, chosen["frequency_bias"], event)
            bias.set_yscale("log", base=2)
            bias.set_ylim(1 / limit, limit)
            bias.axhline(1.0, color="0.35", linewidth=0.9, zorder=1.5)
            bias.yaxis.set_major_locator(FixedLocator([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]))
            bias.yaxis.set_minor_locator(NullLocator())
            bias.yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
            )
            if column == 0:
                ax.set_ylabel("CSI")
                bias.set_ylabel("frequency bias")
        _legend(figure)
        figure.supxlabel(axis_label("lead time", skill["lead_time"].attrs["units"]), fontsize=9)
        figure.align_ylabels()
    return figure


def spectrum_figure(skill: xr.Dataset) -> Figure:
    """Power by wavelength, of the truth and of every model, at the first and at the last lead time.

    A forecast that blurs lies below the truth where waves are short. A flat one has no waves, and is left out.

    Args:
        skill: from `forecast.skill.Skill.dataset`; has the scores of `forecast.metrics.spectral.Spectrum`.
    """
    waves = skill.isel(wavenumber=slice(1, None))  # the first is the mean, which has no wavelength
    wavelength = 1 / waves["wavenumber"].values
    models = [str(name) for name in skill["model"].values]
    leads = [0, -1] if skill.sizes["lead_time"] > 1 else [0]
    frames = skill["lead_time"].attrs["units"] == "frames"
    least = np.nanmin(_positive(waves["power_truth"].values), initial=np.inf)
    seen = bool(np.isfinite(least))  # else there is no power at all to be drawn
    with rc_context(STYLE):
        figure = Figure(figsize=(3.9 * len(leads) + 0.4, 3.6), layout="constrained")
        cells = figure.add_gridspec(1, len(leads))
        first: Axes | None = None
        for column, lead in enumerate(leads):
            at = waves.isel(lead_time=lead)
            ax = first = figure.add_subplot(cells[0, column], sharex=first, sharey=first)
            truth = at["power_truth"].isel(model=0).values
            ax.plot(wavelength, _positive(truth), color="0.6", linewidth=4, label="truth", solid_capstyle="round")
            for index, name in enumerate(models):
                power = _positive(at["power_forecast"].isel(model=index).values)
                if np.isfinite(power).any():
                    _line(ax, wavelength, power, name, index, mark=False)
            ax.set(xscale="log", yscale="log" if seen else "linear")
            time = f"{float(at['lead_time']):g}"
            ax.set_title(f"frame +{time}" if frames else f"+{time} min", loc="left")
            ticks = [size for size in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if size <= wavelength.max()]
            ax.xaxis.set_major_locator(FixedLocator(ticks))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        assert first is not None
        first.set_xlim(wavelength.max(), wavelength.min())  # from long waves to short, as is the custom
        if seen:
            first.set_ylim(bottom=least / 100)  # what is a hundred times weaker cannot be told from nothing
        figure.axes[0].set_ylabel(axis_label("power", skill["power_forecast"].attrs["units"]))
        _legend(figure)
        figure.supxlabel("wavelength (pixels)", fontsize=9)
    return figure


def _legend(figure: Figure) -> None:
    """The names of the models in their colours, above all panels."""
    if figure.axes:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 6), frameon=False,
                      labelcolor="linecolor", handlelength=1.8, columnspacing=1.6, fontsize=10.5)  # fmt: skip


def _line(ax: Axes, x: NDArray[Any], score: NDArray[Any], name: str, index: int, mark: bool = True) -> None:
    # Colours come round after seven models, dashes tell the rounds apart.
    dashes = ("-", "--", ":")[index // len(_MODELS) % 3]
    marker = "o" if mark and len(x) <= 12 else ""
    ax.plot(x, score, dashes, marker=marker, color=_MODELS[index % len(_MODELS)], label=name, clip_on=True)


def _positive(power: NDArray[Any]) -> NDArray[Any]:
    """A logarithmic axis has no 0."""
    return np.where(power > 0, power, np.nan)


def _least(score: xr.DataArray) -> float:
    finite = score.values[np.isfinite(score.values)]
    return float(finite.min()) if finite.size else 0.0


def _bias_limit(bias: xr.DataArray) -> float:
    """The same axis for all panels, equally far above and below 1: from 2 to 8."""
    values = bias.values[np.isfinite(bias.values) & (bias.values > 0)]
    away = np.abs(np.log2(values)).max() if values.size else 1.0
    return float(2 ** np.clip(np.ceil(away), 1, 3))
