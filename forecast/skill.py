"""The skill of several models over the same windows: the states of their metrics, the labelled dataset, and what is logged.

The road is one way: metric states on the device -> an xarray Dataset of counts and sums by model, block, lead time
(and further axes) -> `derive`, which reads scores off any pool of them. Pools are sums of counts, never means of scores.

Axes: B batch, S forecast frames, C channels, H W space.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

import forecast.metrics
from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics.coverage import Coverage
from forecast.metrics.metric import AdditiveMetric, Pixels, Scope, Score

_POOLED = (
    "a score of several blocks or lead times: their counts and sums are added up, then divided once, so that every valid "
    "pixel weighs the same; nothing to divide by, and any pixel that is undefined, gives NaN"
)
_MEAN = "the mean of the scores of single lead times (each pooled over blocks), so that every lead time weighs the same"
_SUFFIXES = {"threshold": "_{:g}", "scale": "_{:g}px", "pool": "_{:g}px"}


class Skill(nn.Module):
    """Scores several models over the same windows.

    `summary` and `dataset` add up over all processes: under DDP every process has to call them.

    Args:
        models: their names, in the order in which they are shown.
        scope: what is scored.
        cadence: seconds between frames; None where frames have no time.
        metrics: by a name of the user's, what makes each of them; `Coverage` is added.

    Raises:
        UserError: two of the metrics are of one kind.
    """

    def __init__(
        self,
        models: Sequence[str],
        scope: Scope,
        cadence: int | None,
        metrics: Mapping[str, Callable[[Scope], AdditiveMetric]],
    ) -> None:
        super().__init__()
        self.models = tuple(models)
        self.scope = scope
        self.cadence = cadence
        # Lists, since names such as "convlstm.v2" or "update" are no keys of a ModuleDict.
        self._states = nn.ModuleList(
            nn.ModuleList([Coverage(scope), *(make(scope) for make in metrics.values())]) for _ in models
        )
        kinds = [type(metric).__name__ for metric in self.metrics(self.models[0])]
        for name, kind in zip(metrics, kinds[1:], strict=True):
            if kinds.count(kind) > 1:
                raise UserError(f"The metric {name} is a {kind}, of which there can be only one; leave out the others.")

    def metrics(self, model: str) -> list[AdditiveMetric]:
        """What scores a model; `Coverage` comes first."""
        return [cast(AdditiveMetric, metric) for metric in cast(nn.ModuleList, self._states[self.models.index(model)])]

    def update(self, model: str, forecast: Forecast, truth: Tensor, valid: Tensor, block: Tensor) -> None:
        """Score one batch of one model.

        Args:
            model: its name.
            forecast: in physical units.
            truth: B S C H W, in physical units.
            valid: B S C H W bool; other pixels are scored nowhere.
            block: B int64; -1 marks a padded sample, scored nowhere.
        """
        metrics = self.metrics(model)
        pixels = Pixels.of(forecast, truth, valid, block)
        pixels.score(metrics)
        for metric in metrics:
            metric.update(forecast, truth, valid, block, pixels)

    def reset(self) -> None:
        """Forget everything."""
        for model in self.models:
            for metric in self.metrics(model):
                metric.reset()

    def summary(self, model: str, by_lead: bool = False) -> dict[str, float]:
        """One number per logged score (its threshold, its scale), pooled over blocks and lead times.

        Args:
            model: its name.
            by_lead: then the same of each lead time, pooled over blocks.

        Returns:
            mse, csi_<threshold>, fss_<threshold>_<scale>px and so on, as `Score.log` says; by lead time
            csi_<threshold>/30min, or /frame3 where frames have no time. NaN where nothing was scored or a forecast was not
            finite.
        """
        return self._summary(self._counts([model]), by_lead)

    def names(self) -> list[str]:
        """What `summary` gives at most; no data are needed, and no other process."""
        return list(self._summary(self._labelled(self.models[:1], [{}]), by_lead=True))

    def dataset(self) -> xr.Dataset:
        """Counts and sums by model, block, lead time (and further axes), and the scores of all blocks pooled."""
        counts = self._counts(self.models)
        scores = derive(counts.sum("block", skipna=False))
        quantity = self.scope.quantity
        attributes = {
            "title": f"Forecast skill: {quantity.long_name}",
            "quantity": quantity.name,
            "units": quantity.units,
            "events": "forecast >= threshold and truth >= threshold: a value equal to the threshold is an event",
            "pooled": _POOLED,
            "mean_over_leads": _MEAN,
        }
        return xr.merge([counts, scores]).assign_attrs(attributes)

    def _summary(self, counts: xr.Dataset, by_lead: bool) -> dict[str, float]:
        leads = counts.sum("block", skipna=False)
        pools = leads.sum("lead_time", skipna=False).expand_dims(lead_time=[np.nan])
        if by_lead:
            pools = xr.concat([pools, leads], "lead_time")
        known = catalogue()
        scores = {
            f"{known[str(name)].log}{suffix}": one.values
            for name, score in derive(pools).isel(model=0).items()
            if known[str(name)].log is not None
            for suffix, one in columns(score).items()
        }
        summary = {name: float(values[0]) for name, values in scores.items()}
        for name, values in scores.items():
            # A summary that is not by lead time has no further values.
            summary |= {
                f"{name}/{label}": float(value) for label, value in zip(self._leads(), values[1:], strict=False)
            }
        return summary

    def _leads(self) -> list[str]:
        """Lead times as they stand in the log."""
        leads = range(1, self.scope.steps + 1)
        return [f"frame{lead}" if self.cadence is None else f"{lead * self.cadence / 60:g}min" for lead in leads]

    def _counts(self, models: Sequence[str]) -> xr.Dataset:
        states = []
        for model in models:
            computed = [metric.compute() for metric in self.metrics(model)]
            states.append({name: state.cpu().numpy() for one in computed for name, state in one.items()})
        return self._labelled(models, states)

    def _labelled(self, models: Sequence[str], states: Sequence[Mapping[str, NDArray[Any]]]) -> xr.Dataset:
        """The states of each model with names on their axes; zeros where there is none."""
        metrics = self.metrics(self.models[0])
        coordinates = self._coordinates(models)
        for metric in metrics:
            coordinates |= metric.coordinates()
        variables = {}
        for name, one in ((name, one) for metric in metrics for name, one in metric.SUMS.items()):
            dims = ("model", "block", "lead_time", *one.dims)
            shape = [coordinates[dim].size for dim in dims[1:]]
            # The shape is given, since torchmetrics squeezes a state of one element to a scalar.
            values = [state[name].reshape(shape) if name in state else np.zeros(shape, int) for state in states]
            attributes = {"long_name": one.long_name, "units": _power(self.scope.quantity.units, one.power)}
            variables[name] = xr.Variable(dims, np.stack(values), attributes)
        return xr.Dataset(variables, coordinates)

    def _coordinates(self, models: Sequence[str]) -> dict[str, xr.Variable]:
        frames = np.arange(1, self.scope.steps + 1)
        if self.cadence is None:
            lead_time = xr.Variable("lead_time", frames, {"long_name": "lead time", "units": "frames"})
        else:
            # "min", not "minutes", which xarray would decode to timedelta64 when the file is read.
            minutes = frames * self.cadence / 60
            lead_time = xr.Variable("lead_time", minutes, {"long_name": "lead time", "units": "min"})
        return {
            "model": xr.Variable("model", list(models), {"long_name": "model"}),
            "block": xr.Variable("block", np.arange(self.scope.blocks), {"long_name": "rain event or sequence"}),
            "lead_time": lead_time,
            "threshold": self.scope.threshold,
        }


def derive(counts: xr.Dataset) -> xr.Dataset:
    """Scores from any pool of counts and sums.

    `derive(skill)` gives scores by block; `derive(skill.sum(["block", "lead_time"]))` one score for everything.

    Args:
        counts: a Dataset with the variables of `Skill.dataset`, summed over whichever dimensions.

    Returns:
        The scores of every metric whose sums are all there, on the dimensions that are left. NaN where there is nothing to
        divide by, or where any pixel of the pool is undefined.
    """
    # Without indexes, which xarray would compare at every step of the arithmetic.
    plain = counts.drop_indexes(list(counts.indexes))
    # Sums in xarray skip NaN unless told otherwise; the count of undefined pixels cannot be skipped.
    defined = plain["undefined"] == 0
    units = counts["threshold"].attrs.get("units", "1")
    order = list(counts.data_vars)
    present = [metric for metric in _metrics() if set(metric.SUMS) <= set(order)]
    derived = {}
    for metric in sorted(present, key=lambda metric: order.index(next(iter(metric.SUMS)))):
        for name, score in metric.scores(plain).items():
            about = metric.SCORES[name]
            attributes = {"long_name": about.long_name, "units": about.units or _power(units, about.power)}
            derived[name] = score.where(defined).variable
            derived[name].attrs = attributes
    dims = {dim for one in derived.values() for dim in one.dims}
    return xr.Dataset(derived, {name: one for name, one in counts.coords.items() if set(one.dims) <= dims})


def catalogue() -> dict[str, Score]:
    """Every score that `derive` can give, by name."""
    return {name: score for metric in _metrics() for name, score in metric.SCORES.items()}


def metric_of(score: str) -> type[AdditiveMetric]:
    """The metric that reads a score off its sums (and off those of `Coverage`)."""
    return next(metric for metric in _metrics() if score in metric.SCORES)


def columns(score: xr.DataArray) -> dict[str, xr.DataArray]:
    """A score taken apart by its thresholds and scales, each under the suffix that names it: _20, _8px, _20_8px.

    Returns:
        Nothing for a score with other axes, such as a spectrum, which is no column of a table.
    """
    further = [str(dim) for dim in score.dims if dim not in ("model", "block", "lead_time")]
    if any(dim not in _SUFFIXES for dim in further):
        return {}
    axes = [dim for dim in _SUFFIXES if dim in further]
    apart = {}
    for place in product(*(range(score.sizes[dim]) for dim in axes)):
        one = score.isel(dict(zip(axes, place, strict=True)))
        suffix = "".join(_SUFFIXES[dim].format(float(one[dim])) for dim in axes)
        apart[suffix] = one.drop_vars(_SUFFIXES, errors="ignore")
    return apart


@cache
def _metrics() -> tuple[type[AdditiveMetric], ...]:
    """The metrics of all files in forecast/metrics."""
    modules = [
        importlib.import_module(f"{forecast.metrics.__name__}.{found.name}")
        for found in pkgutil.iter_modules(forecast.metrics.__path__)
    ]
    return tuple(
        member
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__
        and issubclass(member, AdditiveMetric)
        and not inspect.isabstract(member)
    )


def _power(units: str, power: int) -> str:
    """Units of a quantity to a power of 0, 1 or 2."""
    if power == 0 or units == "1":
        return "1"
    return units if power == 1 else f"({units})^2"
