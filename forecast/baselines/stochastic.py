"""Nowcasts by pysteps whose rain changes on its way: S-PROG smooths what cannot be known, STEPS and LINDA draw it.

Axes: B batch, M members, T past frames, S forecast steps, H W space.
"""

import logging
import math
from abc import abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forecast.baselines.extrapolation import LEAST_RAIN, THRESHOLD, Array, Extrapolation
from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.units import Grid, Quantity

KILOMETRES = {"m": 0.001, "km": 1.0}
DEGREE = 111.2
"""km along a meridian."""
FRAMES = 3  # an autoregression of second order, and LINDA's of differences, look at three
CASCADE_LEVELS = 6
LINDA_FEATURES = 15  # the number in pysteps' example; its default of 25 takes twice as long

log = logging.getLogger(__name__)


class Evolving(Extrapolation):
    """Rain that changes while it moves along Lucas and Kanade's motion: what S-PROG, STEPS and LINDA have in common.

    Where pysteps finds too little rain to estimate a model (it raises, or answers no rain at all), the answer is that of
    `Extrapolation`, and the log says so once. Missing pixels count as dry; those of the last frame are filled like
    persistence's.
    """

    least = FRAMES

    def __init__(self, quantity: Quantity, past: int) -> None:
        super().__init__(quantity, past)
        self._told = False

    def nowcast(self, past: Array, valid: NDArray[np.bool_], last: Array, steps: int, members: int, seed: int) -> Array:
        motion = self.motion(self.decibels(past), valid)
        frames = np.where(valid, past, self.quantity.floor)[-FRAMES:]
        frames[-1] = last
        try:
            answer = self.evolved(frames, motion, steps, members, seed)
            if not (answer > self.quantity.floor).any():
                # So STEPS answers a frame with rain at its border only.
                raise ValueError("no rain is left")
            return answer
        except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            # What pysteps raises where there is too little rain is of several kinds.
            self._tell(error)
            moved = self.moved(last, motion, steps)
            return np.broadcast_to(moved, (max(members, 1), *moved.shape))

    @abstractmethod
    def evolved(self, frames: Array, motion: Array, steps: int, members: int, seed: int) -> Array:
        """What pysteps makes of the last frames, T H W in physical units: M S H W, NaN where nothing is known."""

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "%s cannot be estimated where there is too little rain (pysteps: %s); there it answers the extrapolation.",
                type(self).__name__,
                error,
            )


class SPROG(Evolving):
    """S-PROG, the spectral prognosis: an autoregression on each of 6 scales, so that small ones fade before large ones.

    On the rain rate in dBR, by pysteps with its defaults: AR(2), Gaussian filters, the distribution of the last frame kept.
    The answer is deterministic; members, where wanted, are all the same.

    Reference: Seed (2003), J. Appl. Meteor. 42, 381, doi 10.1175/1520-0450(2003)042<0381:ADASSA>2.0.CO;2.

    Args:
        quantity: of the frames, in dBZ or mm/h.
        past: frames that will be given, T; at least 3.
    """

    def evolved(self, frames: Array, motion: Array, steps: int, members: int, seed: int) -> Array:
        from pysteps.nowcasts import sprog

        rain = sprog.forecast(
            self.decibels(frames), motion, steps, precip_thr=THRESHOLD, n_cascade_levels=CASCADE_LEVELS
        )
        return self.from_decibels(rain)[None]


class Ensemble(Evolving):
    """A nowcast with members of its own, that are a function of the issue time and of the generator's first seed.

    So a window has the same members in each batch, process and run. `predict` leaves the generator as it is.

    Args:
        quantity: of the frames, in dBZ or mm/h.
        past: frames that will be given, T; at least 3.
        grid: of the frames; its units must be m, km or degrees.
        cadence: seconds between frames.
        members: of the ensemble, where the caller of `predict` does not say how many.
    """

    def __init__(self, quantity: Quantity, past: int, grid: Grid, cadence: int | None, members: int = 20) -> None:
        super().__init__(quantity, past)
        if members < 1:
            raise UserError(f"{type(self).__name__} is told to make {members} members; it must make at least 1.")
        if cadence is None:
            raise UserError(f"{type(self).__name__} needs frames with a time, and these have none; leave it out.")
        self.members = members
        self.spacing = pixel_in_km(grid)
        self.minutes = cadence / 60

    @torch.no_grad()
    def predict(
        self,
        past: Tensor,
        valid: Tensor,
        steps: int,
        *,
        static: Tensor,
        time: Tensor,
        members: int = 0,
        generator: torch.Generator | None = None,
    ) -> Forecast:
        """Forecast `steps` frames; see `forecast.forecaster.Forecaster`. The mean is that of the members."""
        drawn = self._samples(past, valid, steps, time, members or self.members, generator)
        return Forecast(drawn.mean(1), drawn if members else None)


class STEPS(Ensemble):
    """STEPS: S-PROG's cascade with noise of the rain's own spectrum on each scale, and a perturbed motion.

    On the rain rate in dBR, by pysteps with its defaults: nonparametric noise, the motion perturbed as by Bowler et al.,
    rain within a margin that grows around the last frame's, whose distribution is kept.

    Reference: Bowler, Pierce and Seed (2006), Q. J. R. Meteorol. Soc. 132, 2127, doi 10.1256/qj.04.100.

    Args: those of `Ensemble`.
    """

    def evolved(self, frames: Array, motion: Array, steps: int, members: int, seed: int) -> Array:
        from pysteps.nowcasts import steps as pysteps

        rain = pysteps.forecast(
            self.decibels(frames),
            motion,
            steps,
            n_ens_members=members,
            n_cascade_levels=CASCADE_LEVELS,
            precip_thr=THRESHOLD,
            kmperpixel=self.spacing,
            timestep=self.minutes,
            seed=seed,
        )
        return self.from_decibels(rain)


class LINDA(Ensemble):
    """LINDA: growth and decay around cells of intense rain, blurred as they become unpredictable, with noise of their own.

    On the rain rate in mm/h, by pysteps with its defaults but for the number of features, 15.

    Reference: Pulkkinen, Chandrasekar and Niemi (2021), J. Atmos. Oceanic Technol. 38, 2125,
    doi 10.1175/JTECH-D-21-0013.1.

    Args: those of `Ensemble`.
    """

    packages = (*Evolving.packages, "skimage")

    def evolved(self, frames: Array, motion: Array, steps: int, members: int, seed: int) -> Array:
        from pysteps.nowcasts import linda

        rate = self.rain_rate(frames)
        rain = linda.forecast(
            np.where(rate < LEAST_RAIN, 0.0, rate),
            motion,
            steps,
            max_num_features=LINDA_FEATURES,
            n_ens_members=members,
            kmperpixel=self.spacing,
            timestep=self.minutes,
            seed=seed,
        )
        return self.from_rain_rate(rain)


def pixel_in_km(grid: Grid) -> float:
    """The side of a pixel of the same area, in the middle of the frame.

    Raises:
        UserError: the grid's units do not tell.
    """
    y, x = (abs(step) for step in grid.spacing)
    if grid.units == "degrees":
        middle = grid.origin[0] + grid.spacing[0] * (grid.size[0] - 1) / 2
        return DEGREE * math.sqrt(y * x * math.cos(math.radians(middle)))
    if grid.units not in KILOMETRES:
        raise UserError(
            f"STEPS and LINDA need the size of a pixel, but the grid is in units of {grid.units!r}; give an archive with "
            "coordinates in m, km or degrees, or leave them out."
        )
    return KILOMETRES[grid.units] * math.sqrt(y * x)
