"""SAL: is the rain in objects of the right structure, in the right amount, at the right location?

Axes: B batch, S forecast frames, C channels, H W space.
"""

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics.metric import AdditiveMetric, Pixels, Scope, Score, Sum, ratio

COMPONENTS = ("structure", "amplitude", "location")


class SAL(AdditiveMetric):
    """Structure S, amplitude A and location L of the rain in each frame, by `pysteps.verification.salscores.sal`.

    With objects n of volume R_n and maximum R_n^max, V = sum R_n (R_n / R_n^max) / sum R_n, the mean amount D over the
    frame, its centre of mass x, the mean distance r of the objects from x, and the frame's diagonal d:

        S = (V_f - V_o) / [(V_f + V_o) / 2]     -2 to 2, best 0: below, objects too small or too peaked; above, too flat
        A = (D_f - D_o) / [(D_f + D_o) / 2]     -2 to 2, best 0: below, too little rain
        L = |x_f - x_o| / d + 2 |r_f - r_o| / d  0 to 2, best 0

    pysteps finds objects by a watershed above 1/15 of the 95th percentile of the wet pixels, and leaves out those below
    50 pixels. Amounts are above the quantity's floor, which a pixel that is missing, or not finite, holds in both. A frame
    in which a component has no value (no object to locate, no rain at all) counts in `sal_undefined` and not in its mean.
    S and A of opposite sign cancel in their means: read the mean of |S| and |A| beside them.

    A loop over windows and lead times on the host, and seconds for each frame where these are large: for a listed
    subsample of windows, not for a test set.

    References: Wernli et al. (2008), Mon. Wea. Rev. 136, 4470, doi 10.1175/2008MWR2415.1; Feldmann et al. (2021), Weather
    and Climate Dynamics 2, 1225, doi 10.5194/wcd-2-1225-2021 (the objects).

    Args:
        scope: what is scored.

    Raises:
        UserError: a package is missing.
    """

    SUMS: ClassVar[Mapping[str, Sum]] = {
        **{f"sal_{name}_sum": Sum(f"SAL's {name}, over frames") for name in COMPONENTS},
        **{f"sal_{name}_size_sum": Sum(f"modulus of SAL's {name}, over frames") for name in COMPONENTS[:2]},
        **{f"sal_{name}_frames": Sum(f"frames with a {name}", dtype=torch.int64) for name in COMPONENTS},
        "sal_undefined": Sum("frames in which one of structure, amplitude, location has no value", dtype=torch.int64),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {
        "sal_structure": Score("SAL structure, mean over frames", 0.0, heading="S"),
        "sal_amplitude": Score("SAL amplitude, mean over frames", 0.0, heading="A"),
        "sal_location": Score("SAL location, mean over frames", 0.0, heading="L"),
        "sal_structure_size": Score("modulus of SAL structure, mean over frames", 0.0, heading="|S|"),
        "sal_amplitude_size": Score("modulus of SAL amplitude, mean over frames", 0.0, heading="|A|"),
    }

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        _salscores()

    def collect(self, forecast: Forecast, pixels: Pixels, block: Tensor) -> None:
        compared = pixels.compared
        floor = self.scope.quantity.floor
        f, o = (
            torch.where(compared, field.double() - floor, 0.0).flatten(0, 2).cpu().numpy()
            for field in (pixels.forecast, pixels.truth)
        )
        seen = compared.flatten(3).any(3)
        values = np.full((len(o), len(COMPONENTS)), np.nan)
        sal = _salscores().sal
        with _quiet():
            for row in np.flatnonzero(seen.flatten().cpu().numpy()):
                values[row] = sal(f[row], o[row])
        components = torch.from_numpy(values).to(compared.device).unflatten(0, seen.shape)
        defined = components.isfinite()
        for index, name in enumerate(COMPONENTS):
            value = torch.where(defined, components, 0.0)[..., index]
            self.add(f"sal_{name}_sum", block, value.sum(2))
            self.add(f"sal_{name}_frames", block, defined[..., index].sum(2))
            if name != "location":
                self.add(f"sal_{name}_size_sum", block, value.abs().sum(2))
        self.add("sal_undefined", block, (seen & ~defined.all(3)).sum(2))

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        return {
            name: ratio(counts[f"{name}_sum"], counts[f"{name.removesuffix('_size')}_frames"]) for name in cls.SCORES
        }


def _salscores() -> ModuleType:
    """pysteps' module, with the packages without which it refuses to work."""
    try:
        with _quiet():
            importlib.import_module("skimage")
            return importlib.import_module("pysteps.verification.salscores")
    except ModuleNotFoundError as error:
        raise UserError(
            f"The metric SAL needs {error.name}, which is not installed; pip install 'stormcell[pysteps]', or leave it out."
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """pysteps prints when it is imported, and warns of every dry frame."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
