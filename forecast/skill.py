"""The skill of several models over the same windows: counts and sums, the labelled dataset, the table, the CSV.

The road is one way: metric states on the device -> an xarray Dataset of counts and sums by model, block, lead time
(and threshold) -> `derive`, which reads scores off any pool of them. Pools are sums of counts, never means of scores.

Axes: B batch, S forecast frames, C channels, H W space.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import xarray as xr
from rich.table import Table
from torch import Tensor, nn

from forecast.batch import Forecast
from forecast.metrics import contingency, continuous
from forecast.metrics.contingency import Contingency
from forecast.metrics.continuous import Continuous
from forecast.units import Quantity

# Long name, and units as a power of the quantity's.
_COUNTS: dict[str, tuple[str, int]] = {
    "pixels": ("valid pixels", 0),
    "undefined": ("valid pixels where the forecast or the truth is not a finite number", 0),
    "error_sum": ("sum of forecast - truth", 1),
    "absolute_error_sum": ("sum of |forecast - truth|", 1),
    "squared_error_sum": ("sum of (forecast - truth)^2", 2),
    "forecast_sum": ("sum of the forecast", 1),
    "truth_sum": ("sum of the truth", 1),
    "forecast_square_sum": ("sum of forecast^2", 2),
    "truth_square_sum": ("sum of truth^2", 2),
    "product_sum": ("sum of forecast * truth", 2),
}
_EVENTS: dict[str, tuple[str, int]] = {
    "hits": ("events that were forecast", 0),
    "misses": ("events that were not forecast", 0),
    "false_alarms": ("forecast events that were none", 0),
    "correct_negatives": ("pixels without event, and none forecast", 0),
}
_SCORES: dict[str, tuple[str, int]] = {
    "mse": ("mean squared error", 2),
    "rmse": ("root mean squared error", 1),
    "mae": ("mean absolute error", 1),
    "mean_error": ("mean error", 1),
    "correlation": ("Pearson correlation", 0),
}
_EVENT_SCORES: dict[str, tuple[str, int]] = {
    "csi": ("critical success index", 0),
    "pod": ("probability of detection", 0),
    "far": ("false alarm ratio", 0),
    "frequency_bias": ("frequency bias", 0),
    "hss": ("Heidke skill score", 0),
}
# In the tables: heading, and the value that is best.
_COLUMNS: dict[str, tuple[str, float]] = {
    "mse": ("MSE", 0.0),
    "rmse": ("RMSE", 0.0),
    "mae": ("MAE", 0.0),
    "correlation": ("correlation", 1.0),
    "csi": ("CSI", 1.0),
    "pod": ("POD", 1.0),
    "far": ("FAR", 0.0),
    "hss": ("HSS", 1.0),
    "frequency_bias": ("bias", 1.0),
}


class Skill(nn.Module):
    """Scores several models over the same windows.

    `summary` and `dataset` add up over all processes: under DDP every process has to call them.

    Args:
        models: their names, in the order in which they are shown.
        quantity: of the values; its thresholds are the events.
        steps: forecast frames, S.
        blocks: number of rain events (or sequences), the pools that can still be told apart afterwards.
        cadence: seconds between frames; None where frames have no time.
    """

    def __init__(self, models: Sequence[str], quantity: Quantity, steps: int, blocks: int, cadence: int | None) -> None:
        super().__init__()
        self.models = tuple(models)
        self.quantity = quantity
        self.steps = steps
        self.blocks = blocks
        self.cadence = cadence
        # Lists, since names such as "convlstm.v2" or "update" are no keys of a ModuleDict.
        self.contingency = nn.ModuleList(Contingency(quantity.thresholds, steps, blocks) for _ in models)
        self.continuous = nn.ModuleList(Continuous(steps, blocks) for _ in models)

    def update(self, model: str, forecast: Forecast, truth: Tensor, valid: Tensor, block: Tensor) -> None:
        """Score one batch of one model.

        Args:
            model: its name.
            forecast: in physical units.
            truth: B S C H W, in physical units.
            valid: B S C H W bool; other pixels are scored nowhere.
            block: B int64; -1 marks a padded sample, scored nowhere.
        """
        for metric in self._metrics(model):
            metric.update(forecast, truth, valid, block)

    def reset(self) -> None:
        """Forget everything."""
        for model in self.models:
            for metric in self._metrics(model):
                metric.reset()

    def summary(self, model: str) -> dict[str, float]:
        """One number per score for the training log, pooled over blocks and lead times.

        Returns:
            mse, mae, csi_<threshold>, bias_<threshold>; NaN where nothing was scored or a forecast was not finite.
        """
        scores = derive(self._counts([model]).sum(["block", "lead_time"], skipna=False)).isel(model=0)
        numbers = {name: float(scores[name]) for name in ("mse", "mae")}
        for name, score in (("csi", scores["csi"]), ("bias", scores["frequency_bias"])):
            numbers |= {f"{name}_{float(one.threshold):g}": float(one) for one in score}
        return numbers

    def curves(self, model: str) -> dict[str, float]:
        """CSI and frequency bias of every threshold and lead time for the training log, pooled over blocks.

        Returns:
            csi_<threshold>/<lead time> and bias_<threshold>/<lead time>, with the lead time as 30min, or as frame3 where
            frames have no time; NaN as in `summary`.
        """
        scores = derive(self._counts([model]).sum("block", skipna=False)).isel(model=0)
        leads = scores["lead_time"].values
        labels = [f"frame{lead}" if self.cadence is None else f"{lead:g}min" for lead in leads]
        return {
            f"{name}_{float(one.threshold):g}/{label}": float(value)
            for name, score in (("csi", scores["csi"]), ("bias", scores["frequency_bias"]))
            for one in score.transpose("threshold", "lead_time")
            for label, value in zip(labels, one.values, strict=True)
        }

    def dataset(self) -> xr.Dataset:
        """Counts and sums by model, block, lead time (and threshold), and the scores of all blocks pooled."""
        counts = self._counts(self.models)
        scores = derive(counts.sum("block", skipna=False))
        attributes = {
            "title": f"Forecast skill: {self.quantity.long_name}",
            "quantity": self.quantity.name,
            "units": self.quantity.units,
            "events": "forecast >= threshold and truth >= threshold: a value equal to the threshold is an event",
            "pooling": "counts and sums are added up over blocks, then scores are computed: every valid pixel weighs "
            "the same; nothing to divide by gives NaN",
        }
        return xr.merge([counts, scores]).assign_attrs(attributes)

    def _metrics(self, model: str) -> tuple[Contingency, Continuous]:
        row = self.models.index(model)
        return cast(Contingency, self.contingency[row]), cast(Continuous, self.continuous[row])

    def _counts(self, models: Sequence[str]) -> xr.Dataset:
        by_model = [{**events.compute(), **sums.compute()} for events, sums in map(self._metrics, models)]
        by_lead = ("model", "block", "lead_time")
        by_threshold = (*by_lead, "threshold")
        sizes = (len(models), self.blocks, self.steps, len(self.quantity.thresholds))
        variables = {}
        for name, (long_name, power) in (_COUNTS | _EVENTS).items():
            dims = by_threshold if name in _EVENTS else by_lead
            # The shape is given, since torchmetrics squeezes a state of one element to a scalar.
            values = np.stack([states[name].cpu().numpy() for states in by_model]).reshape(sizes[: len(dims)])
            attributes = {"long_name": long_name, "units": _power(self.quantity.units, power)}
            variables[name] = xr.Variable(dims, values, attributes)
        return xr.Dataset(variables, self._coordinates(models))

    def _coordinates(self, models: Sequence[str]) -> dict[str, xr.Variable]:
        frames = np.arange(1, self.steps + 1)
        if self.cadence is None:
            lead_time = xr.Variable("lead_time", frames, {"long_name": "lead time", "units": "frames"})
        else:
            # "min", not "minutes", which xarray would decode to timedelta64 when the file is read.
            minutes = frames * self.cadence / 60
            lead_time = xr.Variable("lead_time", minutes, {"long_name": "lead time", "units": "min"})
        threshold = np.asarray(self.quantity.thresholds, dtype=np.float64)
        return {
            "model": xr.Variable("model", list(models), {"long_name": "model"}),
            "block": xr.Variable("block", np.arange(self.blocks), {"long_name": "rain event or sequence"}),
            "lead_time": lead_time,
            "threshold": xr.Variable(
                "threshold", threshold, {"long_name": "event threshold", "units": self.quantity.units}
            ),
        }


def derive(counts: xr.Dataset) -> xr.Dataset:
    """Scores from any pool of counts and sums.

    `derive(skill)` gives scores by block; `derive(skill.sum(["block", "lead_time"]))` one score for everything.

    Args:
        counts: a Dataset with the variables of `Skill.dataset`, summed over whichever dimensions.

    Returns:
        mse, rmse, mae, mean_error, correlation, and csi, pod, far, frequency_bias, hss by threshold, on the
        dimensions that are left. NaN where there is nothing to divide by, or where any pixel of the pool is undefined.
    """
    n = counts["pixels"]
    a, b, c, d = (counts[name] for name in ("hits", "false_alarms", "misses", "correct_negatives"))
    moments = ("forecast_sum", "truth_sum", "forecast_square_sum", "truth_square_sum", "product_sum")
    scores = {
        "mse": continuous.mse(counts["squared_error_sum"], n),
        "rmse": continuous.rmse(counts["squared_error_sum"], n),
        "mae": continuous.mae(counts["absolute_error_sum"], n),
        "mean_error": continuous.mean_error(counts["error_sum"], n),
        "correlation": continuous.correlation(n, *(counts[name] for name in moments)),
        "csi": contingency.csi(a, c, b),
        "pod": contingency.pod(a, c),
        "far": contingency.far(a, b),
        "frequency_bias": contingency.frequency_bias(a, c, b),
        "hss": contingency.hss(a, c, b, d),
    }
    # Sums in xarray skip NaN unless told otherwise; the count of undefined pixels cannot be skipped.
    defined = counts["undefined"] == 0
    units = counts["threshold"].attrs.get("units", "1")
    derived = xr.Dataset({name: score.where(defined) for name, score in scores.items()})
    for name, (long_name, power) in (_SCORES | _EVENT_SCORES).items():
        derived[name].attrs = {"long_name": long_name, "units": _power(units, power)}
    return derived


def tables(skill: xr.Dataset) -> list[Table]:
    """The models side by side at each lead time, and their mean over all lead times: values first, then each threshold.

    The best value of each is bold. Of more than 12 lead times some are left out; skill.csv has them all.

    Args:
        skill: from `Skill.dataset`.
    """
    title, units = skill.attrs["title"], skill.attrs["units"].removeprefix("1")
    made = [_table(title, skill[[name for name in _COLUMNS if name in _SCORES]])]
    for threshold in skill["threshold"].values:
        events = skill[[name for name in _COLUMNS if name in _EVENT_SCORES]].sel(threshold=threshold)
        made.append(_table(f"{title}; events: at least {threshold:g} {units}".rstrip(), events))
    return made


def _table(title: str, scores: xr.Dataset) -> Table:
    """Scores over model and lead_time."""
    shown = Table(title=title)
    shown.add_column(f"lead time ({scores['lead_time'].attrs['units']})", justify="right")
    shown.add_column("model")
    for name in scores:
        shown.add_column(_COLUMNS[str(name)][0], justify="right")
    leads = scores.sizes["lead_time"]
    # All lead times up to 12, of more every n-th and the last.
    rows = range(leads - 1, -1, -max(1, -(-leads // 12)))[::-1]
    groups = [(f"{float(scores['lead_time'][row]):g}", scores.isel(lead_time=row)) for row in rows]
    for label, group in [*groups, ("mean", scores.mean("lead_time", skipna=False))]:
        cells = [_cells(group[name].values, _COLUMNS[str(name)][1]) for name in scores]
        for index, model in enumerate(scores["model"].values):
            shown.add_row(label if index == 0 else "", str(model), *(column[index] for column in cells))
        shown.add_section()
    return shown


def wide(skill: xr.Dataset) -> Any:
    """The pooled scores as a pandas DataFrame: one row per model and lead time, one column per score.

    Scores of events have their threshold in the column's name, as in the training log: csi_20.

    Args:
        skill: from `Skill.dataset`.
    """
    columns = skill[list(_SCORES)]
    for name in _EVENT_SCORES:
        for one in skill[name].transpose("threshold", ...):
            columns[f"{name}_{float(one.threshold):g}"] = one.drop_vars("threshold")
    lead_time = f"lead_time_{skill['lead_time'].attrs['units']}"
    columns = columns.drop_vars("threshold", errors="ignore").rename(lead_time=lead_time)
    return columns.to_dataframe(dim_order=["model", lead_time]).reset_index()


def to_csv(skill: xr.Dataset) -> str:
    """The rows of `wide` as comma-separated values."""
    text: str = wide(skill).to_csv(index=False, float_format="%.8g")
    return text


def _cells(values: np.ndarray, best: float) -> list[str]:
    """Values of the models with four digits, the one nearest to `best` in bold."""
    distance = np.abs(values - best)
    texts = [f"{value:.4g}" for value in values]
    if len(texts) > 1 and np.isfinite(distance).any():
        winner = int(np.nanargmin(distance))
        texts[winner] = f"[bold]{texts[winner]}[/bold]"
    return texts


def _power(units: str, power: int) -> str:
    """Units of a quantity to a power of 0, 1 or 2."""
    if power == 0 or units == "1":
        return "1"
    return units if power == 1 else f"({units})^2"
