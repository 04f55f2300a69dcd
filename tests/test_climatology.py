"""Climatology: the distribution of the training split, exactly, however it is dealt."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from forecast.baselines.climatology import Climatology
from forecast.batch import Forecast, Frames
from forecast.errors import UserError
from forecast.forecaster import Forecaster
from forecast.units import Quantity

DBZ = Quantity("dbz", "reflectivity", "dBZ", (10.0, 20.5, 40.0), floor=-10.0)
RATE = Quantity("rate", "rain rate", "mm/h", (0.5, 5.0))


def frames(truth: Tensor, valid: Tensor) -> Frames:
    """A batch whose past is nonsense: climatology must not look at it."""
    b, _, _, h, w = truth.shape
    past, numbers = torch.full_like(truth, 99.0), torch.zeros(b, dtype=torch.int64)
    return Frames(past, past > 0, truth, valid, torch.zeros(b, 0, h, w), numbers, numbers, numbers == 0)


def drawn(quantity: Quantity) -> tuple[Tensor, Tensor]:
    """B S C H W, and where it is valid: in steps of 0.5 dBZ, negative ones too, or any rain rate; much is at the floor."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(6, 4, 2, 9, 11, generator=generator)
    if quantity is DBZ:
        truth = (uniform * 100 - 40).clamp_min(-10).mul(2).round() / 2
    else:
        truth = (60 * uniform**6 - 1).clamp_min(0)
    return truth, torch.rand(truth.shape, generator=generator) > 0.3


def predict(climatology: Climatology, members: int = 0, past: int = 3) -> Forecast:
    shape = (2, past, 2, 5, 7)
    return climatology.predict(
        torch.zeros(shape),
        torch.ones(shape, dtype=torch.bool),
        4,
        static=torch.zeros(2, 0, 5, 7),
        time=torch.zeros(2, dtype=torch.int64),
        members=members,
    )


def pixels(quantity: Quantity) -> NDArray[np.float64]:
    truth, valid = drawn(quantity)
    return truth[:, :, 0][valid[:, :, 0]].double().numpy()


def prepared(quantity: Quantity, parts: int = 1) -> Climatology:
    truth, valid = drawn(quantity)
    climatology = Climatology(quantity)
    climatology.prepare(frames(a, b) for a, b in zip(truth.chunk(parts), valid.chunk(parts), strict=True))
    return climatology


@pytest.mark.parametrize("quantity", [DBZ, RATE], ids=["dBZ", "mm/h"])
def test_mean_and_exceedance_are_those_of_all_valid_pixels(quantity: Quantity) -> None:
    climatology = prepared(quantity)
    assert isinstance(climatology, Forecaster)
    forecast = predict(climatology)
    assert forecast.members is None
    assert forecast.exceedance is not None
    assert forecast.mean.shape == (2, 4, 1, 5, 7)
    assert forecast.exceedance.shape == (2, len(quantity.thresholds), 4, 1, 5, 7)
    np.testing.assert_allclose(forecast.mean, pixels(quantity).mean(), rtol=1e-6)
    for number, threshold in enumerate(quantity.thresholds):
        share = (pixels(quantity) >= threshold).mean()
        assert 0 < share < 1
        np.testing.assert_allclose(forecast.exceedance[:, number], share, rtol=1e-6)


@pytest.mark.parametrize("members", [1, 2, 7, 20, 1000])
@pytest.mark.parametrize("quantity", [DBZ, RATE], ids=["dBZ", "mm/h"])
def test_members_are_the_quantiles_in_the_middle_of_equal_shares(quantity: Quantity, members: int) -> None:
    levels = (np.arange(members) + 0.5) / members
    expected = np.quantile(pixels(quantity), levels, method="inverted_cdf")
    forecast = predict(prepared(quantity), members)
    assert forecast.members is not None
    assert forecast.members.shape == (2, members, 4, 1, 5, 7)
    # Packed numbers have a bin each; any numbers at all share bins of 0.05 %.
    tolerance = 0.0 if quantity is DBZ else 5e-4
    np.testing.assert_allclose(forecast.members[0, :, 0, 0, 0, 0], expected, rtol=tolerance)
    assert (forecast.members == forecast.members[:1, :, :1, :, :1, :1]).all()


def test_members_have_the_crps_of_the_climatology_as_they_become_many() -> None:
    """That of the sample against itself: half its mean absolute difference (Gini)."""
    sample = pixels(RATE)
    members = predict(prepared(RATE), 500).members
    assert members is not None
    ensemble = members[0, :, 0, 0, 0, 0].double().numpy()

    def spread(values: NDArray[np.float64]) -> float:
        """Mean absolute difference of all pairs, by sorting."""
        n = len(values)
        return float(2 * (np.sort(values) * (2 * np.arange(n) - n + 1)).sum() / n**2)

    crps = np.abs(ensemble[:, None] - sample).mean() - spread(ensemble) / 2
    np.testing.assert_allclose(crps, spread(sample) / 2, rtol=1e-3)


def test_batches_may_be_cut_and_ordered_in_any_way() -> None:
    truth, valid = drawn(DBZ)
    whole = prepared(DBZ)
    other = Climatology(DBZ)
    other.prepare(frames(truth[[k]], valid[[k]]) for k in (3, 1, 5, 0, 2, 4))
    for one, same in zip(predict(whole, 11), predict(other, 11), strict=True):
        assert torch.equal(one, same)


def test_what_was_seen_before_is_forgotten() -> None:
    climatology = prepared(DBZ)
    low = torch.full((1, 1, 1, 3, 3), 5.0)
    climatology.prepare([frames(low, low > 0)])
    mean, members, exceedance = predict(climatology, 3)
    assert (mean == 5).all()
    assert members is not None
    assert (members == 5).all()
    assert exceedance is not None
    assert (exceedance == 0).all()


def test_padded_samples_and_missing_pixels_count_nothing() -> None:
    truth, valid = drawn(DBZ)
    spoilt = torch.where(valid, truth, 77.0)
    climatology = Climatology(DBZ)
    padding = torch.full_like(truth, 88.0)
    climatology.prepare([frames(spoilt, valid), frames(padding, torch.zeros_like(valid))])
    assert torch.equal(climatology.quantiles(50), prepared(DBZ).quantiles(50))


def test_a_split_without_a_valid_pixel_is_refused() -> None:
    truth, valid = drawn(DBZ)
    with pytest.raises(UserError, match="no valid pixel"):
        Climatology(DBZ).prepare([frames(truth, torch.zeros_like(valid))])


def test_it_does_not_answer_before_it_was_prepared() -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        predict(Climatology(DBZ))
