"""What of a test is scored together: all windows as they are, rain over longer times, and a subsample for what is slow.

Each section is a `Skill` over the same windows for all of its models, and becomes a group of skill.nc.

Axes: B batch, S forecast frames, C channels, H W space, M members.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from forecast.batch import Forecast, Frames
from forecast.metrics.metric import AdditiveMetric, Scope
from forecast.protocol import ROOT
from forecast.skill import Skill
from forecast.units import Quantity

Metrics = Mapping[str, Callable[[Scope], AdditiveMetric]]
"""What makes each score, by a name."""
SUBSAMPLE = "subsample"
HOUR = 3600


@dataclass(frozen=True)
class Listed:
    """The windows of the subsample."""

    positions: tuple[int, ...]
    """In the test split."""
    times: tuple[int, ...]
    """When their forecasts are issued, seconds UTC; a sequence number for digits."""


def spread(windows: int, most: int) -> tuple[int, ...]:
    """Positions of at most so many windows, evenly spread over all of them: the middle of each of equal parts."""
    parts = min(windows, most)
    return tuple((2 * part + 1) * windows // (2 * parts) for part in range(parts))


def amount(quantity: Quantity, minutes: int, thresholds: Sequence[float]) -> Quantity:
    """What rain of that rate adds up to, in mm."""
    return Quantity(
        "thickness_of_rainfall_amount", f"{quantity.long_name}, sum over {minutes} min", "mm", tuple(thresholds)
    )


def summed(values: Tensor, frames: int, seconds: int, dim: int = 1) -> Tensor:
    """Rain rates in mm/h -> mm that fall in each `frames` of them; frames that are left over at the end are left out.

    A frame stands for the time before it, as long as a cadence: the sum over lead times 10, 20 and 30 min is the rain of
    the first half hour.

    Args:
        values: frames on axis `dim`.
        frames: in a sum.
        seconds: between frames.
        dim: the axis of the frames.
    """
    whole = values.narrow(dim, 0, values.shape[dim] // frames * frames).unflatten(dim, (-1, frames))
    return (whole.double().sum(dim + 1) * seconds / HOUR).to(values.dtype)


class Sections(nn.Module):
    """Scores several models over the test windows, in sections.

    All windows, as they are ("/"); where frames are rain rates in mm/h, their sums over times of which `future` has one at
    least and which the cadence divides (accumulation_30min); and the subsample, where something is slow.

    Args:
        models: their names, in the order in which they are shown.
        scope: of all windows.
        cadence: seconds between forecast frames, or None.
        metrics: scores of all windows, and of the subsample.
        slow: models that forecast the subsample only.
        minutes: times over which rain is summed.
        thresholds: events of these sums, mm.
        long_metrics: scores of these sums.
        listed: the windows of the subsample.
        slow_metrics: scores of the subsample beside the others.
    """

    def __init__(
        self,
        models: Sequence[str],
        scope: Scope,
        cadence: int | None,
        metrics: Metrics,
        *,
        slow: Collection[str] = (),
        minutes: Sequence[int] = (),
        thresholds: Sequence[float] = (),
        long_metrics: Metrics = MappingProxyType({}),
        listed: Listed = Listed((), ()),
        slow_metrics: Metrics = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.slow = frozenset(slow)
        self.cadence = cadence
        self.listed = listed
        self.lengths: dict[str, int] = {ROOT: 1}
        """Of each section, how many frames are one."""
        fast = [model for model in models if model not in self.slow]
        skills = [Skill(fast, scope, cadence, metrics)]
        for each in minutes if cadence is not None and scope.quantity.units == "mm/h" and long_metrics else ():
            frames, rest = divmod(60 * each, cadence or 1)
            if rest == 0 and 1 <= frames <= scope.steps:
                quantity = amount(scope.quantity, each, thresholds)
                longer = replace(scope, quantity=quantity, steps=scope.steps // frames)
                skills.append(Skill(fast, longer, 60 * each, long_metrics))
                self.lengths[f"accumulation_{each}min"] = frames
        if self.slow or slow_metrics:
            skills.append(Skill(models, scope, cadence, {**metrics, **slow_metrics}))
            self.lengths[SUBSAMPLE] = 1
        self._skills = nn.ModuleList(skills)

    def skill(self, section: str) -> Skill:
        """The scores of a section."""
        return cast(Skill, self._skills[list(self.lengths).index(section)])

    def update(self, model: str, forecast: Forecast, frames: Frames, listed: Tensor) -> None:
        """Score one batch of one model.

        Args:
            model: its name.
            forecast: in physical units.
            frames: the batch that it is of.
            listed: B bool on the CPU, which of its windows are in the subsample; of a slow model no others are given.
        """
        truth, valid, block = frames.truth, frames.valid, frames.block
        for section, count in self.lengths.items():
            skill = self.skill(section)
            if section == SUBSAMPLE:
                if listed.any():
                    part = Forecast(*(None if field is None else field[listed] for field in forecast))  # type: ignore[arg-type]  # the mean is never None
                    skill.update(model, part, truth[listed], valid[listed], block[listed])
            elif model not in self.slow and section == ROOT:
                skill.update(model, forecast, truth, valid, block)
            elif model not in self.slow:
                self._update_summed(skill, model, count, forecast, frames)

    def _update_summed(self, skill: Skill, model: str, count: int, forecast: Forecast, frames: Frames) -> None:
        """The probabilities of single frames tell nothing of their sum: it has none but its members'."""
        assert self.cadence is not None
        members = forecast.members
        longer = Forecast(
            summed(forecast.mean, count, self.cadence),
            None if members is None else summed(members, count, self.cadence, dim=2),
        )
        steps = frames.valid.shape[1] // count
        valid = frames.valid[:, : steps * count].unflatten(1, (-1, count)).all(2)
        skill.update(model, longer, summed(frames.truth, count, self.cadence), valid, frames.block)

    def reset(self) -> None:
        """Forget everything."""
        for section in self.lengths:
            self.skill(section).reset()

    def datasets(self) -> dict[str, xr.Dataset]:
        """The labelled counts and scores of each section, added up over all processes (all have to call this)."""
        found = {section: self.skill(section).dataset() for section in self.lengths}
        if SUBSAMPLE in found:
            of = {"long_name": "place of the window in the test split"}
            when = {"long_name": "issue time", "units": "seconds since 1970-01-01"}
            if self.cadence is None:
                when = {"long_name": "number of the sequence"}
            title = f"{found[SUBSAMPLE].attrs['title']}; subsample of {len(self.listed.positions)} windows"
            found[SUBSAMPLE] = (
                found[SUBSAMPLE]
                .assign_attrs(title=title)
                .assign(
                    position=("window", np.array(self.listed.positions, dtype=np.int64), of),
                    issue_time=("window", np.array(self.listed.times, dtype=np.int64), when),
                )
            )
        return found

    def counts(self, model: str, found: Mapping[str, xr.Dataset]) -> dict[str, NDArray[np.generic]]:
        """What a model's scores are read off, by section and name, as `restore` takes it.

        Args:
            model: its name.
            found: from `datasets`.
        """
        return {
            f"{section}.{name}": found[section][name].sel(model=model).values
            for section, metric in self._metrics(model)
            for name in metric.SUMS
        }

    def restore(self, model: str, counts: Mapping[str, NDArray[np.generic]]) -> None:
        """Adds counts of another run over the same windows, all or nothing. Of many processes one does so.

        Raises:
            KeyError, ValueError: they are those of other sections or scores.
        """
        states = []
        for section, metric in self._metrics(model):
            state = {}
            for name in metric.SUMS:
                mine, theirs = cast(Tensor, getattr(metric, name)), torch.from_numpy(counts[f"{section}.{name}"])
                if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
                    raise ValueError(f"{name} is {tuple(mine.shape)} {mine.dtype}, and not {tuple(theirs.shape)}")
                state[name] = theirs.to(mine.device)
            states.append((metric, state))
        for metric, state in states:
            metric.merge_state(state)

    def _metrics(self, model: str) -> list[tuple[str, AdditiveMetric]]:
        """Of a model, each with the section that it is in."""
        chosen = [section for section in self.lengths if section == SUBSAMPLE or model not in self.slow]
        return [(section, metric) for section in chosen for metric in self.skill(section).metrics(model)]
