"""Scores of frames as images: structural similarity and peak signal-to-noise ratio.

Both are made for one frame at a time, in units of a data range, and averaged over frames. Which data range, which window
and which variance an author took changes the numbers; here they are said.

Axes: B batch, S forecast frames, C channels, H W space.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics.metric import AdditiveMetric, Pixels, Scope, Score, Sum, ratio

HIGHEST = 100.0
"""dB, the PSNR of a frame without error: infinity would hide all others in a mean."""


class Convention(NamedTuple):
    """What papers leave unsaid of their SSIM."""

    window: tuple[float, ...]
    """Weights of a pixel's neighbours, along each axis."""
    sample: bool
    """Variances are divided by the number of pixels in the window less one."""
    span: float
    """Data ranges in the constants C1 and C2."""


_GAUSSIAN = tuple(math.exp(-((i / 1.5) ** 2) / 2) for i in range(-5, 6))

CONVENTIONS: Mapping[str, Convention] = {
    "wang": Convention(tuple(one / sum(_GAUSSIAN) for one in _GAUSSIAN), sample=False, span=1.0),
    # scikit-image's defaults, which for floats took the data range to be that from -1 to 1.
    "openstl": Convention((1 / 7,) * 7, sample=True, span=2.0),
}


def ssim(forecast: Tensor, truth: Tensor, convention: Convention) -> Tensor:
    """Structural similarity of each frame, -1 to 1, best 1: the mean over all windows that lie within the frame of

        (2 m_f m_o + C1) (2 cov + C2) / [(m_f^2 + m_o^2 + C1) (v_f + v_o + C2)]

    with the weighted means m, variances v and covariance of a window, C1 = (0.01 span)^2 and C2 = (0.03 span)^2.

    Reference: Wang et al. (2004), IEEE Trans. Image Process. 13, 600, doi 10.1109/TIP.2003.819861.

    Args:
        forecast, truth: ... H W float64, in data ranges (0 to 1).
        convention: window and span.

    Returns:
        Of the shape ....
    """
    pixels = len(convention.window) ** 2
    factor = pixels / (pixels - 1) if convention.sample else 1.0
    c1, c2 = (0.01 * convention.span) ** 2, (0.03 * convention.span) ** 2
    rows, columns = (_band(size, convention.window, truth) for size in truth.shape[-2:])

    def smooth(field: Tensor) -> Tensor:
        return rows @ field @ columns.T

    mean_f, mean_o = smooth(forecast), smooth(truth)
    product, squares = mean_f * mean_o, mean_f**2 + mean_o**2
    variances = factor * (smooth(forecast**2 + truth**2) - squares)
    covariance = factor * (smooth(forecast * truth) - product)
    similarity = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return similarity.mean((-2, -1))


def psnr(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: -10 log10 of the mean squared error in data ranges, at most HIGHEST.

    Reference: Huynh-Thu and Ghanbari (2008), Electronics Letters 44, 800, doi 10.1049/el:20080522.
    """
    return -10 * squared_error.clamp_min(10 ** (-HIGHEST / 10)).log10()


class Image(AdditiveMetric):
    """SSIM and PSNR of each frame, added up over frames.

    Values are clipped to the data range above the quantity's floor, as an image's are. A pixel that is missing, or not
    finite, holds the floor in both for SSIM, and is left out of PSNR. A frame without a pixel to compare counts nowhere.

    Args:
        scope: what is scored.
        data_range: from nothing to the brightest, in the quantity's units; None takes 1 for frames in [0, 1].
        convention: of SSIM. "wang": the paper's Gaussian of sigma 1.5 on 11 x 11 pixels (torchmetrics; scikit-image with
            gaussian_weights=True, use_sample_covariance=False). "openstl": what OpenSTL prints: a 7 x 7 mean, sample
            variances, and constants for a range twice as large.

    Raises:
        UserError: the data range is not known, the convention is unknown, or a frame is smaller than the window.
    """

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "ssim_sum": Sum("structural similarity, over frames"),
        "psnr_sum": Sum("peak signal-to-noise ratio in dB, over frames"),
        "image_frames": Sum("frames with a pixel to compare", dtype=torch.int64),
        "image_error_sum": Sum("squared error in data ranges, over pixels"),
        "image_pixels": Sum("pixels that can be compared", dtype=torch.int64),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {
        "ssim": Score("structural similarity, mean over frames", 1.0, heading="SSIM", log="ssim"),
        "psnr": Score("peak signal-to-noise ratio, mean over frames", HIGHEST, heading="PSNR", log="psnr", units="dB"),
        "psnr_pooled": Score("peak signal-to-noise ratio of the pooled mean squared error", HIGHEST, units="dB"),
    }

    def __init__(
        self, scope: Scope, data_range: float | None = None, convention: Literal["wang", "openstl"] = "wang"
    ) -> None:
        super().__init__(scope)
        units = scope.quantity.units
        if data_range is None and units != "1":
            raise UserError(
                f"SSIM and PSNR of data in {units} need a data range; give the metric Image a data_range, from "
                f"{scope.quantity.floor:g} {units} to the brightest that matters."
            )
        if data_range is not None and not 0 < data_range < math.inf:
            raise UserError(f"The data_range of the metric Image is {data_range}; it must be above 0.")
        if convention not in CONVENTIONS:
            raise UserError(
                f"The convention of the metric Image is {convention!r}; it must be one of {', '.join(CONVENTIONS)}."
            )
        side = len(CONVENTIONS[convention].window)
        if scope.size is not None and min(scope.size) < side:
            height, width = scope.size
            raise UserError(
                f"SSIM looks at windows of {side} x {side} pixels, but the frames have {height} x {width}; leave out the "
                "metric Image."
            )
        self.data_range = 1.0 if data_range is None else data_range
        self.convention = CONVENTIONS[convention]

    def collect(self, forecast: Forecast, pixels: Pixels, block: Tensor) -> None:
        compared = pixels.compared
        count = compared.flatten(3).sum(3)
        seen = count > 0
        similarities, errors = [], []
        # A lead time at once, to bound the memory.
        for frames in zip(pixels.forecast.unbind(1), pixels.truth.unbind(1), compared.unbind(1), strict=True):
            f, o = (self._image(field, frames[2]) for field in frames[:2])
            similarities.append(ssim(f, o, self.convention))
            errors.append((f - o).square().sum((-2, -1)))
        similarity, error = torch.stack(similarities, 1), torch.stack(errors, 1)
        self.add("ssim_sum", block, torch.where(seen, similarity, 0.0).sum(2))
        self.add("psnr_sum", block, torch.where(seen, psnr(error / count.clamp_min(1)), 0.0).sum(2))
        self.add("image_frames", block, seen.sum(2))
        self.add("image_error_sum", block, error.sum(2))
        self.add("image_pixels", block, count.sum(2))

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        pooled = ratio(counts["image_error_sum"], counts["image_pixels"]).clip(10 ** (-HIGHEST / 10))
        return {
            "ssim": ratio(counts["ssim_sum"], counts["image_frames"]),
            "psnr": ratio(counts["psnr_sum"], counts["image_frames"]),
            "psnr_pooled": -10 * xr.apply_ufunc(np.log10, pooled),
        }

    def _image(self, field: Tensor, comparable: Tensor) -> Tensor:
        """Physical values -> 0 to 1 float64, with 0 where there is nothing to compare."""
        values = (field.double() - self.scope.quantity.floor) / self.data_range
        return torch.where(comparable, values.clamp(0.0, 1.0), 0.0)


def _band(size: int, window: tuple[float, ...], like: Tensor) -> Tensor:
    """The weighted means of all windows within a line of pixels, as a matrix: size-n+1 by size."""
    band = like.new_zeros(size - len(window) + 1, size)
    for offset, weight in enumerate(window):
        band.diagonal(offset).fill_(weight)
    return band
