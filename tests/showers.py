"""Showers that only move, and a forecaster asked about them as strictly as can be: for the baselines that need pysteps."""

import contextlib
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from forecast.baselines.extrapolation import quiet
from forecast.batch import Forecast
from forecast.forecaster import Forecaster
from forecast.units import Grid, Quantity, z_r_relation

with quiet():
    for package in ("pysteps", "cv2", "skimage"):
        pytest.importorskip(package, reason="pysteps and what it needs are an extra")

DBZ = Quantity("dbz", "reflectivity", "dBZ", (20.0,), floor=-10.0)
RATE = Quantity("rate", "rain rate", "mm/h", (1.0,))
GRID = Grid(size=(64, 64), spacing=(-1000.0, 1000.0), units="m")
STEPS_AHEAD = 4


def moving(batch: int = 2, frames: int = 10, size: int = 64) -> Tensor:
    """dBZ, B T 1 H W: showers that move by two pixels to the left and one up in each frame, and change in nothing else."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, 1, 16, 16, generator=generator)
    wide = F.interpolate(coarse, size=(160, 160), mode="bicubic")[:, 0] * 20 + 10
    cut = [wide[:, 20 + t : 20 + t + size, 20 + 2 * t : 20 + 2 * t + size] for t in range(frames)]
    return torch.stack(cut, 1)[:, :, None].clamp(-10.0, 55.0)


def of(quantity: Quantity, dbz: Tensor) -> Tensor:
    if quantity is DBZ:
        return dbz
    rate = z_r_relation("marshall_palmer").rain_rate(dbz)
    return torch.where(dbz > -10, rate, 0.0)


def predict(
    forecaster: Forecaster,
    past: Tensor,
    valid: Tensor | None = None,
    members: int = 0,
    seed: int | None = None,
    start: int = 0,
) -> Forecast:
    """Of windows issued every 600 s from `start` on; a warning is an error, and so is a word on the console."""
    valid = torch.ones_like(past, dtype=torch.bool) if valid is None else valid
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    console = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(console):
        warnings.simplefilter("error")
        forecast = forecaster.predict(
            past,
            valid,
            STEPS_AHEAD,
            static=torch.zeros(len(past), 0, *past.shape[-2:]),
            time=start + 600 * torch.arange(len(past)),
            members=members,
            generator=generator,
        )
    assert console.getvalue() == ""
    assert forecast.mean.shape == (len(past), STEPS_AHEAD, 1, *past.shape[-2:])
    assert forecast.mean.dtype == torch.float32
    for field in forecast:
        assert field is None or torch.isfinite(field).all()
    return forecast
