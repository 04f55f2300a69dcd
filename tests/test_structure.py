"""SAL: against pysteps called for each frame, and what it says of rain that is displaced, scaled or spread."""

import sys

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics.metric import Scope
from forecast.metrics.structure import SAL
from forecast.skill import Skill
from forecast.units import Quantity

RAIN = Quantity("rainfall_rate", "rain rate", "mm/h", thresholds=(1.0,))
SIZE = (40, 48)


@pytest.fixture(autouse=True)
def _pysteps() -> None:
    pytest.importorskip("pysteps", reason="pysteps is an extra")
    pytest.importorskip("skimage", reason="scikit-image comes with the extra pysteps")


def shower(y: float, x: float, width: float = 5.0, amount: float = 10.0) -> Tensor:
    """1 1 1 H W float64, mm/h."""
    rows, columns = torch.arange(SIZE[0], dtype=torch.float64)[:, None], torch.arange(SIZE[1], dtype=torch.float64)
    rate = amount * torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * width**2))
    return torch.where(rate > 0.1, rate, 0.0)[None, None, None]


def scores(
    forecast: Tensor, truth: Tensor, valid: Tensor | None = None, block: Tensor | None = None, floor: float = 0.0
) -> xr.Dataset:
    quantity = Quantity("q", "q", "mm/h", thresholds=(1.0,), floor=floor)
    skill = Skill(["model"], Scope(quantity, 1, 2, size=SIZE), None, {"sal": SAL})
    valid = torch.ones_like(truth, dtype=torch.bool) if valid is None else valid
    skill.update(
        "model", Forecast(forecast), truth, valid, torch.zeros(len(truth), dtype=int) if block is None else block
    )
    return skill.dataset().isel(model=0, lead_time=0)


def test_equals_pysteps() -> None:
    from pysteps.verification.salscores import sal

    truth = torch.cat([shower(15, 12) + shower(28, 36, 4, 20), shower(20, 20)])
    forecast = torch.cat([shower(18, 14, 7), shower(20, 30, 4, 25) + shower(8, 8, 5, 5)])
    each = np.array([sal(f[0, 0].numpy(), o[0, 0].numpy()) for f, o in zip(forecast, truth, strict=True)])
    found = scores(forecast, truth)
    for index, name in enumerate(("structure", "amplitude", "location")):
        assert float(found[f"sal_{name}"]) == pytest.approx(each[:, index].mean(), abs=1e-12)
    for index, name in enumerate(("structure", "amplitude")):
        assert float(found[f"sal_{name}_size"]) == pytest.approx(np.abs(each[:, index]).mean(), abs=1e-12)
    assert not found.sal_undefined.any()


def test_each_component_tells_its_own_mistake() -> None:
    truth = shower(20, 20)
    for forecast, right, wrong in (
        (shower(20, 20), ("structure", "amplitude", "location"), ()),
        (shower(20, 28), ("structure", "amplitude"), ("location",)),
        (2 * shower(20, 20), ("structure", "location"), ("amplitude",)),
        (shower(20, 20, width=7, amount=10 * 25 / 49), ("location",), ("structure",)),
    ):
        found = scores(forecast, truth)
        assert all(abs(float(found[f"sal_{name}"])) < 0.02 for name in right)
        assert all(float(found[f"sal_{name}"]) > 0.1 for name in wrong)


def test_opposite_mistakes_cancel_in_the_mean_but_not_in_the_size() -> None:
    truth = shower(20, 20).repeat(2, 1, 1, 1, 1)
    found = scores(torch.cat([3 * truth[:1], truth[:1] / 3]), truth)
    assert float(found.sal_amplitude) == pytest.approx(0.0, abs=1e-12)
    assert float(found.sal_amplitude_size) == pytest.approx(1.0)


def test_a_component_without_value_is_counted_and_not_summed() -> None:
    dry = torch.zeros(1, 1, 1, *SIZE, dtype=torch.float64)
    truth = torch.cat([shower(20, 20), shower(20, 20), dry])
    found = scores(torch.cat([shower(20, 20), dry, dry]), truth)
    assert found.sal_undefined.values.tolist() == [2, 0]
    assert [int(found[f"sal_{name}_frames"][0]) for name in ("structure", "amplitude", "location")] == [2, 2, 1]
    assert float(found.sal_amplitude) == pytest.approx(-1.0)  # the mean of 0 and -2
    assert float(found.sal_location) == pytest.approx(0.0, abs=1e-12)


def test_missing_pixels_hold_the_floor_and_padding_counts_nowhere() -> None:
    truth, forecast = shower(20, 20) + shower(8, 40), shower(18, 24)
    valid = torch.ones_like(truth, dtype=torch.bool)
    valid[..., 30:] = False
    expected = scores(forecast * valid, truth * valid)
    two = (torch.cat([one, one]) for one in (forecast - 5, torch.where(valid, truth, torch.nan) - 5, valid))
    found = scores(*two, block=torch.tensor([0, -1]), floor=-5.0)
    for name in SAL.SUMS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("skimage", "pysteps"):
        with monkeypatch.context() as hidden:
            for module in [name for name in sys.modules if name.split(".")[0] == package]:
                hidden.delitem(sys.modules, module)
            hidden.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=f"SAL needs {package}.*pip install 'stormcell"):
                SAL(Scope(RAIN, 1, 1))
