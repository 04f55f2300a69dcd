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
from typing import ClassVar

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

# Below this share of a spectrum's largest power, a power is the rounding of float64: that of a frame of one value.
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
        _, cells = _rings(self.size, few.o.device)
        # In float64, which costs little here, so that the weakest waves are not the rounding of the strongest.
        floor = self.scope.quantity.floor
        f, o = (torch.fft.rfft2((field.double() - floor).nan_to_num_(0.0)) for field in (few.f, few.o))
        # One conjugate for two products.
        conjugate = o.conj().resolve_conj()
        return {
            "forecast_power_sum": self._by_ring(f * f.conj()),
            "truth_power_sum": self._by_ring(o * conjugate),
            "cross_power_sum": self._by_ring(f * conjugate),
            "ring_cells": (few.known > 0).sum(1, keepdim=True) * cells,
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

    def _by_ring(self, product: Tensor) -> Tensor:
        """Real part over H W, added up over channels and the cells of each ring: F C H W/2+1 complex -> F K."""
        frames, channels, height = product.shape[:3]
        bins, cells = _rings(self.size, product.device)
        sums = product.real.new_zeros(frames * channels, 2 * (len(cells) + 1))
        sums.index_add_(1, bins, product.flatten(0, 1).flatten(1).real)
        once, twice = sums.view(frames, channels, 2, -1)[..., :-1].sum(1).unbind(1)
        return (once + 2 * twice) / (height * self.size[1])


@cache
def _rings(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the cells of rfft2 are added up, and the cells of fft2 in each of the K rings.

    rfft2 leaves out the columns that mirror others, and these count twice: there are K + 1 bins for cells that count once
    (a ring each, and one for the corners beyond the last), and K + 1 for the others. Cells are flat.
    """
    height, width = size
    longer = max(size)
    last = (longer + 1) // 2
    y, x = np.fft.fftfreq(height) * longer, np.fft.rfftfreq(width) * longer
    bins = np.minimum(np.hypot(y[:, None], x).round().astype(np.int64), last)
    bins[:, 1 : (width + 1) // 2] += last + 1
    once, twice = np.bincount(bins.ravel(), minlength=2 * (last + 1)).reshape(2, -1)[:, :last]
    return torch.from_numpy(bins.ravel()).to(device), torch.from_numpy(once + 2 * twice).to(device)


def _without_rounding(power: xr.DataArray) -> xr.DataArray:
    """Powers that are nothing but rounding become 0."""
    return power.where(power > _ROUNDING * power.max("wavenumber"), 0.0)


def _log(positive: xr.DataArray) -> xr.DataArray:
    """Natural logarithm, and NaN for 0."""
    return xr.apply_ufunc(np.log, positive.where(positive > 0))
