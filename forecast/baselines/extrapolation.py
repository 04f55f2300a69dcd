"""Extrapolation: rain goes on moving as it moved, and does not change on the way.

Axes: B batch, M members, T past frames, S forecast steps, C channels, H W space.
"""

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from forecast.baselines.persistence import latest
from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.units import ZR, Quantity, z_r_relation

Array = NDArray[np.float64]

LEAST_RAIN = 0.1
"""mm/h; below it pysteps' examples, and we, see no rain."""
THRESHOLD, DRY = -10.0, -15.0
"""LEAST_RAIN in dBR, and what stands for no rain there: again those of pysteps' examples."""
LUCAS_KANADE_FRAMES = 3
# What DARTS looks at. By pysteps' defaults (50 waves, 4 frequencies) it finds hardly any motion in six frames 10 min
# apart: a wave that moves more than half its length from frame to frame is aliased, and so are frequencies above T/2.
DARTS_SHORTEST = 24  # pixels
DARTS_FREQUENCIES = 2


class Extrapolation(nn.Module):
    """The last frame, moved along the optical flow of the past: forecast(x, t + s) = past(x - displacement(x, s), t).

    pysteps estimates the motion and moves the frame (backward semi-Lagrangian, linear interpolation). The motion is that
    of the rain rate in decibels (dBR, no rain at -15), with missing pixels hidden from Lucas-Kanade, and dry for DARTS.
    What is moved is the last frame in the quantity's own units, its missing pixels filled like persistence's, so that
    without motion this is persistence. What comes in from outside the frame is unknown: it is the quantity's floor. A
    past whose last frame has no rain (0.1 mm/h) has no motion.

    References: Germann and Zawadzki (2002), Mon. Wea. Rev. 130, 2859,
    doi 10.1175/1520-0493(2002)130<2859:SDOTPO>2.0.CO;2 (advection); Lucas and Kanade (1981), IJCAI 2, 674; Ruzanski,
    Chandrasekar and Wang (2011), J. Atmos. Oceanic Technol. 28, 640 (DARTS); Pulkkinen et
    al. (2019), Geosci. Model Dev. 12, 4185, doi 10.5194/gmd-12-4185-2019 (pysteps).

    Args:
        quantity: of the frames, in dBZ or mm/h; its channel is the first one of `past`.
        past: frames that will be given, T.
        method: of the motion: lucas_kanade looks at the last 3 frames, darts at all of them, at least 5.

    Raises:
        UserError: a package is missing, the quantity is no rain, or the past is too short.
    """

    packages: Sequence[str] = ("pysteps", "cv2")
    least = 2
    """Frames that it needs."""

    def __init__(
        self, quantity: Quantity, past: int, method: Literal["lucas_kanade", "darts"] = "lucas_kanade"
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if method not in ("lucas_kanade", "darts"):
            raise UserError(f"The method of {name} is {method!r}; it must be lucas_kanade or darts.")
        if quantity.units not in ("dBZ", "mm/h"):
            raise UserError(
                f"{name} follows rain, in dBZ or mm/h, but these data are in units of {quantity.units!r}; leave it out."
            )
        self.quantity = quantity
        self.method = method
        if method == "darts":
            self.least = 2 * DARTS_FREQUENCIES + 1
        self._check(past)
        for package in self.packages:
            try:
                with quiet():
                    importlib.import_module(package)
            except ModuleNotFoundError as error:
                raise UserError(
                    f"{name} needs {error.name}, which is not installed; pip install 'stormcell[pysteps]', or leave it out."
                ) from None

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
        """Forecast `steps` frames; see `forecast.forecaster.Forecaster`. Members, where wanted, are all the same."""
        mean = self._samples(past, valid, steps, time, 0, generator)[:, 0]
        return Forecast(mean, mean[:, None].expand(-1, members, -1, -1, -1, -1) if members else None)

    def nowcast(self, past: Array, valid: NDArray[np.bool_], last: Array, steps: int, members: int, seed: int) -> Array:
        """The forecast of one sample.

        Args:
            past: T H W, physical values.
            valid: T H W.
            last: H W, the last frame, missing pixels filled.
            steps: number of frames to forecast, S.
            members: ensemble members wanted; 0 for the forecast without any, as one member.
            seed: of the members.

        Returns:
            M S H W, physical values, with NaN where nothing is known.
        """
        return self.moved(last, self.motion(self.decibels(past), valid), steps)[None]

    def motion(self, rain: Array, valid: NDArray[np.bool_]) -> Array:
        """Pixels a frame, 2 H W (x, then y), of rain T H W in dBR."""
        if self.method == "darts":
            from pysteps.motion.darts import DARTS

            y, x = (max(size // DARTS_SHORTEST, 2) for size in rain.shape[1:])
            return DARTS(np.where(valid, rain, DRY), N_x=x, N_y=y, N_t=DARTS_FREQUENCIES, verbose=False)
        from pysteps.motion.lucaskanade import dense_lucaskanade

        seen = valid.any(axis=(1, 2), keepdims=True)
        hidden = np.where(valid, rain, np.where(seen, np.nan, DRY))  # a frame must not be hidden as a whole
        return dense_lucaskanade(hidden[-LUCAS_KANADE_FRAMES:])

    def moved(self, field: Array, motion: Array, steps: int) -> Array:
        """A field H W moved along, S H W; NaN comes in from outside."""
        from pysteps.nowcasts import extrapolation

        return extrapolation.forecast(field, motion, steps)

    def decibels(self, values: Array) -> Array:
        """Physical values -> rain rate in dBR; DRY where there is no rain."""
        rate = self.rain_rate(values)
        return np.where(rate < LEAST_RAIN, DRY, 10 * np.log10(np.maximum(rate, LEAST_RAIN)))

    def from_decibels(self, rain: Array) -> Array:
        """Rain rate in dBR -> physical values; the floor where there is no rain, NaN where there was NaN."""
        return self.from_rain_rate(np.where(rain < THRESHOLD, 0.0, 10 ** (rain / 10)))

    def rain_rate(self, values: Array) -> Array:
        """Physical values -> mm/h."""
        return self._relation.rain_rate(torch.from_numpy(values)).numpy() if self._relation else values

    def from_rain_rate(self, rate: Array) -> Array:
        """mm/h -> physical values; the floor where there is no rain, NaN where there was NaN."""
        values = self._relation.reflectivity(torch.from_numpy(rate)).numpy() if self._relation else rate
        return np.where(rate < LEAST_RAIN, self.quantity.floor, values)

    @property
    def _relation(self) -> ZR | None:
        """From reflectivity to rain; decibels of rain depend but little on which."""
        return z_r_relation("marshall_palmer") if self.quantity.units == "dBZ" else None

    def _samples(
        self, past: Tensor, valid: Tensor, steps: int, time: Tensor, members: int, generator: torch.Generator | None
    ) -> Tensor:
        """Sample by sample: B M S 1 H W."""
        self._check(past.shape[1])
        past, valid = past[:, :, :1], valid[:, :, :1]
        last = latest(past, valid)[:, 0, 0]
        start = 0 if generator is None else generator.initial_seed()
        answers = []
        for one, seen, field, when in zip(
            past[:, :, 0].cpu().double().numpy(),
            valid[:, :, 0].cpu().numpy(),
            last.cpu().double().numpy(),
            time.tolist(),
            strict=True,
        ):
            if (self.rain_rate(field) >= LEAST_RAIN).any():
                with quiet():
                    answer = self.nowcast(one, seen, field, steps, members, seed_of(start, when))
            else:
                answer = np.broadcast_to(field, (max(members, 1), steps, *field.shape))
            answers.append(np.where(np.isfinite(answer), answer, self.quantity.floor).astype(np.float32))
        return torch.from_numpy(np.stack(answers))[:, :, :, None].to(past.device)

    def _check(self, past: int) -> None:
        if past < self.least:
            raise UserError(
                f"{type(self).__name__} is given {past} past frames, but needs {self.least}; set data.past={self.least} or "
                "more, or leave it out."
            )


def seed_of(start: int, time: int) -> int:
    """A seed below 2**32 from that of the run and the issue time, whatever batch a sample stands in."""
    return int(np.random.SeedSequence((start % 2**64, time % 2**64)).generate_state(1)[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """pysteps prints, warns, changes the filters of warnings and seeds numpy's global generator: none of it comes out."""
    state: Any = np.random.get_state()  # noqa: NPY002  # the global generator is what pysteps seeds
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002  # as above
