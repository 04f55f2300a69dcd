"""The scores of `forecast.skill` as one reads them: printed tables, and one wide table for spreadsheets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from rich.table import Table

from forecast.metrics.metric import ratio
from forecast.skill import catalogue, columns, derive

REFERENCES = ("extrapolation", "persistence")
"""Models that every other is set against, where they were scored beside it."""
_RELATIVE = ("mse", "mae", "csi", "fss")
_ROWS = 12  # lead times in a table

Group = tuple[str, xr.Dataset]
"""Rows of a table: a lead time, and the scores of all models at it."""


def tables(skill: xr.Dataset) -> list[Table]:
    """The models side by side at each lead time, then the mean over all lead times, then all lead times pooled.

    First the values, then each threshold, then the skill relative to extrapolation and to persistence. The best value of
    each is bold. Of several scales the middle one is shown, and of more than 12 lead times some are left out; skill.csv
    has them all.

    Args:
        skill: from `Skill.dataset`.
    """
    title, units = skill.attrs["title"], skill.attrs["units"].removeprefix("1")
    groups = _groups(skill)
    scores = groups[0][1]
    values = [str(name) for name in scores if "threshold" not in scores[name].dims]
    made = [_table(title, skill, [(label, group[values]) for label, group in groups])] if values else []
    events = [str(name) for name in scores if name not in values]
    thresholds = list(skill["threshold"].values) if events else []
    for index, threshold in enumerate(thresholds):
        rows = [(label, group[events].isel(threshold=index)) for label, group in groups]
        made.append(_table(f"{title}; events: at least {threshold:g} {units}".rstrip(), skill, rows))

    middle = len(thresholds) // 2
    compared = [name for name in _RELATIVE if name in (*values, *(events if len(thresholds) else ()))]
    for reference in REFERENCES:
        if reference in skill["model"].values and skill.sizes["model"] > 1 and compared:
            rows = [(label, relative(group[compared], reference)) for label, group in groups]
            about = f"Skill relative to {reference}"
            if len(thresholds):
                rows = [(label, group.isel(threshold=middle)) for label, group in rows]
                about += f"; events: at least {thresholds[middle]:g} {units}".rstrip()
            made.append(_table(about, skill, rows, best=1.0))
    return made


def headline(skill: xr.Dataset) -> xr.Dataset:
    """The scores that are printed and plotted: those with a heading, of several scales or pools the middle one.

    Args:
        skill: from `Skill.dataset` or `derive`.
    """
    known = catalogue()
    shown = skill[[name for name in skill.data_vars if name in known and known[str(name)].heading is not None]]
    return middle_scale(shown)


def middle_scale(skill: xr.Dataset) -> xr.Dataset:
    """Of several scales and pools the middle one."""
    return skill.isel({dim: [skill.sizes[dim] // 2] for dim in ("scale", "pool") if skill.sizes.get(dim)})


def relative(scores: xr.Dataset, reference: str) -> xr.Dataset:
    """Skill of the other models relative to one of them: (s - r) / (best - r), which for errors is 1 - s / r.

    1 is perfect, 0 as good as the reference, below 0 worse; NaN where the reference is perfect.

    Args:
        scores: with the axis model; those without a best value are left out.
        reference: a model's name.

    Reference: Wilks (2019), section 9.1.4, doi 10.1016/C2017-0-03921-6.
    """
    best = {name: known.best for name, known in catalogue().items() if known.best is not None}
    others, base = scores.drop_sel(model=reference), scores.sel(model=reference, drop=True)
    return xr.Dataset(
        {name: ratio(others[name] - base[name], best[str(name)] - base[name]) for name in scores if name in best}
    )


def wide(skill: xr.Dataset) -> Any:
    """The pooled scores as a pandas DataFrame: one row per model and lead time, one column per score.

    Scores of events have their threshold in the column's name and scores of a scale their scale, as in the training log:
    csi_20, fss_20_8px. Scores by wavenumber, rank or probability are in skill.nc only.

    Args:
        skill: from `Skill.dataset`, or `headline` of it.
    """
    scores = [str(name) for name in skill.data_vars if name in catalogue()]
    # Python's sort is stable: scores of values first, then those of events, each in their order.
    scores.sort(key=lambda name: len(skill[name].dims) > 2)
    lead_time = f"lead_time_{skill['lead_time'].attrs['units']}"
    flat = {f"{name}{suffix}": one for name in scores for suffix, one in columns(skill[name]).items()}
    frame = xr.Dataset(flat).rename(lead_time=lead_time)
    return frame.to_dataframe(dim_order=["model", lead_time]).reset_index()


def to_csv(skill: xr.Dataset) -> str:
    """The rows of `wide` as comma-separated values."""
    text: str = wide(skill).to_csv(index=False, float_format="%.8g")
    return text


def _groups(skill: xr.Dataset) -> list[Group]:
    """Some lead times, their mean, and all of them pooled."""
    scores = headline(skill)
    pooled = headline(derive(skill.sum(["block", "lead_time"], skipna=False)))
    lead_times = skill["lead_time"]
    leads = lead_times.size
    # All lead times up to 12, of more every n-th and the last.
    rows = range(leads - 1, -1, -max(1, -(-leads // _ROWS)))[::-1]
    groups = [(f"{float(lead_times[row]):g}", scores.isel(lead_time=row)) for row in rows]
    return [*groups, ("mean", scores.mean("lead_time", skipna=False)), ("pooled", pooled)]


def _table(title: str, skill: xr.Dataset, groups: Sequence[Group], best: float | None = None) -> Table:
    """One row for each model of each group; without `best`, each score has its own."""
    shown = Table(title=title)
    shown.add_column(f"lead time ({skill['lead_time'].attrs['units']})", justify="right")
    shown.add_column("model")
    known = catalogue()
    for name, score in groups[0][1].items():
        sizes = [f" {float(score[dim].item()):g} px" for dim in ("scale", "pool") if dim in score.dims]
        shown.add_column("".join([str(known[str(name)].heading), *sizes]), justify="right")
    for label, group in groups:
        cells = [_cells(group[name].values.ravel(), known[str(name)].best if best is None else best) for name in group]
        for index, model in enumerate(group["model"].values):
            shown.add_row(label if index == 0 else "", str(model), *(column[index] for column in cells))
        shown.add_section()
    return shown


def _cells(values: NDArray[Any], best: float | None) -> list[str]:
    """Values of the models with four digits, the one nearest to `best` in bold."""
    texts = [f"{value:.4g}" for value in values]
    if best is not None and len(texts) > 1 and np.isfinite(values).any():
        winner = int(np.nanargmin(np.abs(values - best)))
        texts[winner] = f"[bold]{texts[winner]}[/bold]"
    return texts
