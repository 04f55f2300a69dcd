"""Spectra: how much of the truth's detail a forecast holds, by wavelength. Blurring is seen here before anywhere else.

The spectrum of a frame is its radially averaged power spectral density, as in `pysteps.utils.spectral.rapsd`: the squared
modulus of the discrete Fourier transform over the number of pixels, averaged over rings around wavenumber 0. The frame
is neither detrended nor windowed, so that the edges of one that is wet at its border add power at all wavenumbers, in
forecast and truth alike. pysteps counts rings in steps of the transform, which on a frame that is not square stretches
them; here a ring is a ring in cycles per pixel, and for square frames the two are the same.

Values are taken above the quantity's floor: the power at wavenumber 0 is that of the mean above "nothing there".

Reference: Ruzanski and Chandrasekar (2011), IEEE Trans. Geosci. Remote Sens. 49, 2296, doi 10.1109/TGRS.2010.2103946.

Axes: F frames, C channels, H W space, K wavenumbers.
"""

from collections.abc import Mapping
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from forecast.errors import UserError
from forecast.metrics.metric import FrameMetric, Pixels, Scope, Score, Sum, ratio

FINE = 8
"""Pixels; shorter waves are the detail that sharpness looks at."""
LEFT = 0.5
"""The share of the truth's power that a resolved wave has at least."""

# Below this share of a spectrum's largest power, a power is what rounding leaves of a frame of one value without its mean.
_ROUNDING = 1e-24


def sharpness(forecast_power_sum: xr.DataArray, truth_power_sum: xr.DataArray) -> xr.DataArray:
    """Power of the forecast over power of the truth in waves shorter than 8 pixels: 0 to infinity, best 1.

    sum over rings with k > 1/8 of |F|^2 / sum over the same of |O|^2. Below 1 the forecast is blurred, above 1 it is noisier
    than the truth; where the detail lies it does not ask. NaN where the truth has none.

    Reference: Ayzel et al. (2020), Geosci. Model Dev. 13, 2631, doi 10.5194/gmd-13-2631-2020 (blurring as a loss of power at
    short wavelengths; the number is ours).
    """
    fine = forecast_power_sum["wavenumber"] > 1 / FINE
    band = [one.where(fine, 0.0).sum("wavenumber", skipna=False) for one in (forecast_power_sum, truth_power_sum)]
    return ratio(*band)


def spectral_slope(power: xr.DataArray) -> xr.DataArray:
    """Exponent b of power ~ wavenumber^b: the least-squares slope of log power over log wavenumber, without wavenumber 0.

    b = sum (x - mean x) y / sum (x - mean x)^2 with x = log k and y = log P(k), every ring alike. More negative is smoother.
    NaN where a ring has no power.

    Reference: Nerini et al. (2017), Hydrol. Earth Syst. Sci. 21, 2777, doi 10.5194/hess-21-2777-2017 (rain's power laws).
    """
    x, y = _log(power["wavenumber"]), _log(power)
    distance = (x - x.mean()).where(x.notnull(), 0.0)
    product = (distance * y).where(x.notnull(), 0.0)
    return ratio(product.sum("wavenumber", skipna=False), (distance**2).sum())


def effective_resolution(forecast_power: xr.DataArray, truth_power: xr.DataArray) -> xr.DataArray:
    """The shortest wave, in pixels, to which the forecast keeps at least half of the truth's power: best 2, the grid's.

    From the longest wave down, the last before P_forecast(k) < P_truth(k) / 2; a forecast that never falls below has 2.
    Where the longest wave lacks half already, it is that wave, and means "at least". NaN where the truth has no power.

    References: Skamarock (2004), Mon. Wea. Rev. 132, 3019, doi 10.1175/MWR2830.1 (where a model's spectrum departs from the
    observed one); Ayzel et al. (2020), Geosci. Model Dev. 13, 2631, doi 10.5194/gmd-13-2631-2020.
    """
    waves = {"wavenumber": np.flatnonzero(truth_power["wavenumber"] > 0)}
    forecast_power, truth_power = forecast_power.isel(waves), truth_power.isel(waves)
    wavelength = 1 / truth_power["wavenumber"]
    resolved = (forecast_power >= LEFT * truth_power).cumprod("wavenumber")
    shortest = wavelength.where(resolved == 1, wavelength.max()).min("wavenumber")
    shortest = shortest.where((resolved == 0).any("wavenumber"), 2.0)
    return shortest.where(truth_power.sum("wavenumber", skipna=False) > 0)


def coherence(
    cross_power_sum: xr.DataArray, forecast_power_sum: xr.DataArray, truth_power_sum: xr.DataArray
) -> xr.DataArray:
    """Correlation of forecast and truth at each wavenumber: sum Re(F conj O) / sqrt(sum |F|^2 sum |O|^2), best 1.

    Sharpness without coherence is detail in the wrong place. Blind to amplitude; NaN where either has no power.

    Reference: Germann et al. (2006), J. Atmos. Sci. 63, 2092, doi 10.1175/JAS3735.1 (predictability by scale).
    """
    return ratio(cross_power_sum, (forecast_power_sum * truth_power_sum) ** 0.5).clip(-1.0, 1.0)


class Spectrum(FrameMetric):
    """Power of forecast and truth, and of their product, summed over the cells of each ring of wavenumbers.

    A pixel that is missing, or not finite, holds the floor in both. A frame without a pixel to compare counts nowhere.

    The transform, and the sum over a ring of one frame, have the precision of the fields; sums over frames are float64.
    In float32 a power is right to 1e-5 where it is at least 1e-5 of the frame's variance, and to 1e-10 of the variance
    elsewhere: rain that a Gaussian of sigma 8 pixels blurred has 1e-3 of it in the shortest waves, from its border.

    Args:
        scope: what is scored; it has to say the size of the frames, on which the number of wavenumbers depends: with the
            longer side L there are (L + 1) // 2, from 0 in steps of 1/L cycles per pixel.

    Raises:
        UserError: the frames are too small to have waves.
    """

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "forecast_power_sum": Sum("power of the forecast, over the cells of a ring", ("wavenumber",), power=2),
        "truth_power_sum": Sum("power of the truth, over the cells of a ring", ("wavenumber",), power=2),
        "cross_power_sum": Sum("co-spectrum of forecast and truth, over the cells of a ring", ("wavenumber",), power=2),
        "ring_cells": Sum("cells of a ring, over frames", ("wavenumber",), dtype=torch.int64),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {
        "power_forecast": Score("power spectral density of the forecast", power=2),
        "power_truth": Score("power spectral density of the truth", power=2),
        "coherence": Score("correlation of forecast and truth by wavenumber", best=1.0),
        "sharpness": Score(
            f"share of the truth's power in waves shorter than {FINE} pixels", 1.0, heading="sharpness", log="sharpness"
        ),
        "spectral_slope_forecast": Score("slope of the forecast's power spectrum"),
        "spectral_slope_truth": Score("slope of the truth's power spectrum"),
        "spectral_slope_error": Score(
            "slope of the forecast's spectrum less that of the truth's", 0.0, log="slope_error"
        ),
        "effective_resolution": Score(
            f"shortest wave to which the forecast keeps {LEFT:.0%} of the truth's power", 2.0, units="pixels"
        ),
    }

    def __init__(self, scope: Scope) -> None:
        if scope.size is None:
            raise ValueError("Spectrum needs Scope.size, the height and width of the frames")
        if max(scope.size) < 3:
            height, width = scope.size
            raise UserError(f"Frames of {height} x {width} pixels have no spectrum; leave out the metric Spectrum.")
        self.size = scope.size
        super().__init__(scope)

    def coordinates(self) -> dict[str, xr.Variable]:
        longer = max(self.size)
        values = np.arange((longer + 1) // 2) / longer
        return {"wavenumber": xr.Variable("wavenumber", values, {"long_name": "wavenumber", "units": "cycles/pixel"})}

    def frames(self, few: Pixels) -> dict[str, Tensor]:
        height, width = self.size
        floor = self.scope.quantity.floor
        rings = _rings(self.size, few.truth.device)
        fields = few.fields.nan_to_num(floor)
        # Without its mean, which holds most of a frame's power and whose rounding would lie in all waves.
        mean = fields.mean((-2, -1), keepdim=True)
        waves = torch.view_as_real(torch.fft.rfft2(fields.sub_(mean)))
        waves[..., 0, 0, 0] += (mean[..., 0, 0] - floor) * (height * width)
        forecast_power, truth_power, cross_power = (rings.add_up(waves) / (height * width)).unbind(1)
        return {
            "forecast_power_sum": forecast_power,
            "truth_power_sum": truth_power,
            "cross_power_sum": cross_power,
            "ring_cells": (few.known > 0).sum(1, keepdim=True) * rings.cells,
        }

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        f, o = (_without_rounding(counts[f"{name}_power_sum"]) for name in ("forecast", "truth"))
        forecast_power, truth_power = ratio(f, counts["ring_cells"]), ratio(o, counts["ring_cells"])
        forecast_slope, truth_slope = spectral_slope(forecast_power), spectral_slope(truth_power)
        return {
            "power_forecast": forecast_power,
            "power_truth": truth_power,
            "coherence": coherence(counts["cross_power_sum"], f, o),
            "sharpness": sharpness(f, o),
            "spectral_slope_forecast": forecast_slope,
            "spectral_slope_truth": truth_slope,
            "spectral_slope_error": forecast_slope - truth_slope,
            "effective_resolution": effective_resolution(forecast_power, truth_power),
        }


class _Rings(NamedTuple):
    """Where the numbers of rfft2 belong. It leaves out the columns that mirror others, which count twice.

    A ring has six sums, so that an addition need not wait for the one before: real and imaginary parts are added up apart,
    and so are the columns that count once, and of the others the even and the odd ones.
    """

    place: Tensor
    """Of each number of the rows 0 to H/2 among all sums, ring by ring; there is one ring more, for the corners beyond."""
    weights: Tensor
    """Of the six in their ring."""
    cells: Tensor
    """Of fft2 in each of the K rings."""

    def add_up(self, waves: Tensor) -> Tensor:
        """|F|^2, |O|^2 and Re(F conj O) over channels and the cells of each ring.

        Args:
            waves: F and O, F C 2 H W/2+1 2, with real and imaginary parts.

        Returns:
            F 3 K float64.
        """
        # A row and its mirror image are as far from wavenumber 0: half as many numbers are brought to their rings.
        frames, channels, _, height, *_ = waves.shape
        mirrored = (height - 1) // 2
        upper, lower = waves[:, :, :, : height // 2 + 1], waves[:, :, :, height - mirrored :].flip(3)
        products = waves.new_empty((frames, channels, 3, *upper.shape[3:]))
        torch.mul(upper, upper, out=products[:, :, :2])
        torch.mul(upper[:, :, 0], upper[:, :, 1], out=products[:, :, 2])
        both = products[:, :, :, 1 : mirrored + 1]
        both[:, :, :2].addcmul_(lower, lower)
        both[:, :, 2].addcmul_(lower[:, :, 0], lower[:, :, 1])
        rows = products.flatten(3).flatten(0, 2)
        sums = rows.new_zeros(len(rows), (len(self.cells) + 1) * len(self.weights))
        sums.index_add_(1, self.place, rows)
        by_ring = sums.double().view(frames, channels, 3, -1, len(self.weights)) @ self.weights
        return by_ring[..., :-1].sum(1)


@cache
def _rings(size: tuple[int, int], device: torch.device) -> _Rings:
    height, width = size
    longer = max(size)
    last = (longer + 1) // 2
    y, x = np.fft.fftfreq(height) * longer, np.fft.rfftfreq(width) * longer
    ring = np.minimum(np.hypot(y[:, None], x).round().astype(np.int64), last)
    column = np.arange(len(x))
    twice = (column > 0) & (column < (width + 1) // 2)
    pair = np.where(twice, 2 + 2 * (column % 2), 0)
    place = (6 * ring + pair)[: height // 2 + 1, :, None] + np.arange(2)
    once, again = (np.bincount(ring[:, part].ravel(), minlength=last + 1)[:last] for part in (~twice, twice))
    weights = torch.tensor([1, 1, 2, 2, 2, 2], dtype=torch.float64, device=device)
    return _Rings(torch.from_numpy(place.ravel()).to(device), weights, torch.from_numpy(once + 2 * again).to(device))


def _without_rounding(power: xr.DataArray) -> xr.DataArray:
    """Powers that are nothing but rounding become 0."""
    return power.where(power > _ROUNDING * power.max("wavenumber"), 0.0)


def _log(positive: xr.DataArray) -> xr.DataArray:
    """Natural logarithm, and NaN for 0."""
    return xr.apply_ufunc(np.log, positive.where(positive > 0))
