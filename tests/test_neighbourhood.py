"""Neighbourhood scores: against pysteps, scores and plain loops, and what a shift and a border do to them."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics import neighbourhood
from forecast.metrics.metric import AdditiveMetric, Scope
from forecast.metrics.neighbourhood import Fractions, PooledContingency, fss, useful_scale
from forecast.skill import Skill
from forecast.units import Quantity

THRESHOLDS = (0.5, 2.0, 4.0)
SCALES = (1, 2, 3, 4, 7, 16, 40)  # odd, even, and larger than the frame
STEPS, BLOCKS = 3, 2


def scope(steps: int = STEPS, blocks: int = BLOCKS, thresholds: tuple[float, ...] = THRESHOLDS) -> Scope:
    return Scope(Quantity("x", "rain", "mm/h", thresholds), steps, blocks)


def fields(samples: int = 4, size: tuple[int, int] = (23, 18)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Smooth rain with ties at the thresholds and a tenth missing: forecast, truth, valid, block."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((samples * STEPS, 1, size[0] + 4, size[1] + 4), generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1).unflatten(0, (samples, STEPS)) * 12
    truth = (smooth.clamp_min(0) * 2).round() / 2
    mean = truth.roll((1, 2), (-2, -1))
    return mean, truth, torch.rand(truth.shape, generator=generator) > 0.1, torch.arange(samples) % BLOCKS


def states(metric: AdditiveMetric, *batches: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    for mean, truth, valid, block in batches:
        metric.update(Forecast(mean), truth, valid, block)
    return metric.compute()


def score(states: dict[str, Tensor]) -> np.ndarray:
    """FSS of everything pooled, threshold x scale."""
    pool = {name: state.sum((0, 1)).numpy() for name, state in states.items()}
    return fss(pool["fractions_difference"], pool["fractions_square"])


def frames(*batch: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Forecast and truth of each frame, H W float64; missing pixels hold no rain."""
    mean, truth, valid, _ = batch
    f, o = (torch.where(valid, field, 0.0).double().flatten(0, 2).numpy() for field in (mean, truth))
    return list(zip(f, o, strict=True))


@pytest.mark.parametrize(("size", "dry"), [((23, 18), 0), ((18, 23), 0), ((18, 23), 2)])
def test_fss_of_many_windows_equals_pysteps(size: tuple[int, int], dry: int) -> None:
    reference = pytest.importorskip("pysteps.verification.spatialscores", reason="pysteps is an extra")
    batch = fields(size=size)
    for field in batch[:2]:
        field[:dry] = 0
    ours = score(states(Fractions(scope(), SCALES), batch))
    for row, threshold in enumerate(THRESHOLDS):
        for column, scale in enumerate(SCALES):
            theirs = reference.fss_init(threshold, scale)
            for f, o in frames(*batch):
                reference.fss_accum(theirs, f, o)
            assert ours[row, column] == pytest.approx(reference.fss_compute(theirs), abs=1e-10)


def test_images_in_parts_have_the_sums_of_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = states(Fractions(scope(), SCALES), fields())
    monkeypatch.setattr(neighbourhood, "_TOGETHER", 5 * 2 * 23 * 18 * (len(SCALES) - 1))  # five of 36 images
    parts = states(Fractions(scope(), SCALES), fields())
    assert all(torch.equal(parts[name], state) for name, state in whole.items())


def test_fss_of_one_window_equals_pysteps() -> None:
    reference = pytest.importorskip("pysteps.verification.spatialscores", reason="pysteps is an extra")
    mean, truth, valid, block = (part[:1] for part in fields())
    sums = states(Fractions(scope(), (4,)), (mean, truth, valid, block))
    for lead, (f, o) in enumerate(frames(mean, truth, valid, block)):
        ours = fss(sums["fractions_difference"][0, lead, 0, 0].numpy(), sums["fractions_square"][0, lead, 0, 0].numpy())
        assert float(ours) == pytest.approx(reference.fss(f, o, THRESHOLDS[0], 4), abs=1e-10)


def test_fss_equals_scores_where_no_window_crosses_the_border() -> None:
    """`scores` takes the windows inside the frame only: the same, once everything near the border is dry."""
    reference = pytest.importorskip("scores.spatial", reason="scores is a development dependency")
    mean, truth, valid, block = (part[:1, :1] if part.dim() > 1 else part[:1] for part in fields(size=(40, 40)))
    inside = torch.zeros_like(valid)
    inside[..., 8:-8, 8:-8] = True
    mean, truth, valid = mean * inside, truth * inside, torch.ones_like(valid)
    ours = score(states(Fractions(scope(steps=1), (3, 7)), (mean, truth, valid, block)))[0]
    f, o = (xr.DataArray(field[0, 0, 0].double().numpy(), dims=("y", "x")) for field in (mean, truth))
    for column, scale in enumerate((3, 7)):
        theirs = reference.fss_2d_single_field(
            f.values, o.values, event_threshold=np.nextafter(THRESHOLDS[0], 0), window_size=(scale, scale)
        )
        assert ours[column] == pytest.approx(float(theirs), abs=1e-10)


def test_windows_are_counted_as_a_reader_would() -> None:
    """A window of n reaches n // 2 up and left, and what it wants down and right; beyond the border is nothing."""
    generator = torch.Generator().manual_seed(1)
    f, o = (torch.rand((1, 1, 1, 6, 5), generator=generator) for _ in range(2))
    for scale in (2, 3, 4):
        sums = states(Fractions(scope(1, 1, (0.6,)), (scale,)), (f, o, f >= 0, torch.zeros(1, dtype=torch.int64)))
        difference = square = 0.0
        for y in range(6):
            for x in range(5):
                rows = slice(max(0, y - scale // 2), y - scale // 2 + scale)
                columns = slice(max(0, x - scale // 2), x - scale // 2 + scale)
                shares = [float((v[0, 0, 0, rows, columns] >= 0.6).sum()) / scale**2 for v in (f, o)]
                difference += (shares[0] - shares[1]) ** 2
                square += shares[0] ** 2 + shares[1] ** 2
        assert float(sums["fractions_difference"].sum()) == pytest.approx(difference, abs=1e-12)
        assert float(sums["fractions_square"].sum()) == pytest.approx(square, abs=1e-12)


def test_the_largest_window_is_exact() -> None:
    """Every count is at its largest, on a frame that is all events in the one and all dry in the other."""
    wet, dry = torch.ones(1, 1, 1, 200, 190), torch.zeros(1, 1, 1, 200, 190)
    metric = Fractions(scope(1, 1, (0.5,)), (181,))
    sums = states(metric, (wet, dry, wet > 0, torch.zeros(1, dtype=torch.int64)))
    share = np.ones((200, 190))
    for axis in (0, 1):
        cumulated = np.pad(share.cumsum(axis), [(91, 90) if one == axis else (0, 0) for one in (0, 1)], mode="edge")
        low = np.take(cumulated, np.arange(share.shape[axis]), axis)
        low[tuple(slice(None, 91) if one == axis else slice(None) for one in (0, 1))] = 0
        share = np.take(cumulated, np.arange(share.shape[axis]) + 181, axis) - low
    expected = ((share / 181**2) ** 2).sum()
    assert float(sums["fractions_difference"].sum()) == pytest.approx(expected, rel=1e-12)
    assert float(sums["fractions_square"].sum()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("width", "scale"), [(8191, 1), (8192, 1), (140, 8), (50, 9)])
def test_counts_at_the_end_of_a_narrow_type_are_exact(width: int, scale: int) -> None:
    """All events in both: the largest counts and squares, at and beyond the ends of int8 and int16."""
    wet = torch.ones(1, 1, 1, 2 * scale, width)
    sums = states(Fractions(scope(1, 1, (0.5,)), (scale,)), (wet, wet, wet > 0, torch.zeros(1, dtype=torch.int64)))
    inside = [np.convolve(np.ones(side), np.ones(scale))[(scale - 1) // 2 :][:side] / scale for side in wet.shape[-2:]]
    assert float(sums["fractions_square"].sum()) == pytest.approx(
        2 * (inside[0] ** 2).sum() * (inside[1] ** 2).sum(), rel=1e-12
    )
    assert not sums["fractions_difference"].any()


def test_fss_grows_with_the_scale_of_a_shifted_forecast_and_is_1_of_a_perfect_one() -> None:
    mean, truth, valid, block = fields()
    shifted = score(states(Fractions(scope(), (1, 3, 7, 15)), (mean, truth, torch.ones_like(valid), block)))
    assert (np.diff(shifted, axis=1) > 0).all()
    assert (score(states(Fractions(scope()), (truth, truth, valid, block))) == 1).all()


def test_no_event_anywhere_is_nan() -> None:
    mean, _, valid, block = fields()
    dry = torch.zeros_like(mean)
    assert np.isnan(score(states(Fractions(scope()), (dry, dry, valid, block)))).all()


def test_useful_scale_is_the_first_that_is_half_way_to_perfect() -> None:
    scales = {"scale": [1, 4, 8, 16]}
    score = xr.DataArray([[0.2, 0.56, 0.6, 0.9], [0.2, 0.5, 0.5, 0.5]], dims=("threshold", "scale"), coords=scales)
    for frequency, expected in ((0.1, 4), (0.15, 8), (0.3, 16)):
        useful = useful_scale(score, xr.full_like(score[:, 0], frequency, dtype=float))
        assert float(useful[0]) == expected
        assert np.isnan(useful[1])


def test_observed_events_are_the_frequency_of_the_useful_scale() -> None:
    mean, truth, valid, block = fields()
    skill = Skill(["shifted"], scope(), 300, {"fractions": Fractions})
    skill.update("shifted", Forecast(mean), truth, valid, block)
    dataset = skill.dataset().isel(model=0)
    for column, threshold in enumerate(THRESHOLDS):
        events = ((truth >= threshold) & valid).sum((2, 3, 4))
        expected = torch.stack([events[block == index].sum(0) for index in range(BLOCKS)])
        assert np.array_equal(dataset["observed_events"][..., column], expected)
    frequency = dataset["observed_events"].sum("block") / dataset["pixels"].sum("block")
    xr.testing.assert_allclose(dataset["fss_useful_scale"], useful_scale(dataset["fss"], frequency))
    assert dataset["fss_useful_scale"].attrs["units"] == "pixels"


@pytest.mark.parametrize("make", [Fractions, PooledContingency])
def test_masks_padding_and_splits_change_nothing(make: type[AdditiveMetric]) -> None:
    mean, truth, valid, block = fields()
    whole = states(make(scope()), (mean, truth, valid, block))
    hidden = torch.where(valid, mean, torch.nan), torch.where(valid, truth, torch.inf), valid, block
    padding = torch.full_like(mean, torch.nan), truth, valid, torch.full_like(block, -1)
    parts = [tuple(part[rows] for part in hidden) for rows in (slice(3, 4), slice(0, 3))]
    split = states(make(scope()), padding, *parts)  # type: ignore[arg-type]  # tuples of four
    for name, state in whole.items():
        if state.dtype == torch.int64:
            assert torch.equal(split[name], state), name
        else:
            torch.testing.assert_close(split[name], state, rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [Fractions, PooledContingency])
def test_what_is_not_finite_is_missing(make: type[AdditiveMetric]) -> None:
    mean, truth, valid, block = fields()
    spoilt = torch.where(truth > 3, torch.nan, mean)
    one = states(make(scope()), (spoilt, truth, valid, block))
    other = states(make(scope()), (mean, truth, valid & ~(truth > 3), block))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_maxima_of_blocks_are_counted_as_a_reader_would() -> None:
    """Blocks at the border are smaller; a block of missing pixels counts nowhere."""
    mean, truth, valid, block = fields()
    valid[0, 0, 0, :4, :4] = False
    sums = states(PooledContingency(scope(), (4,)), (mean, truth, valid, block))
    expected = {name: np.zeros((BLOCKS, STEPS, len(THRESHOLDS)), int) for name in ("hits", "misses", "false_alarms")}
    for b in range(len(mean)):
        for s in range(STEPS):
            for y in range(0, 23, 4):
                for x in range(0, 18, 4):
                    here = b, s, 0, slice(y, y + 4), slice(x, x + 4)
                    if not valid[here].any():
                        continue
                    f, o = (float(field[here][valid[here]].max()) for field in (mean, truth))
                    for p, threshold in enumerate(THRESHOLDS):
                        if f >= threshold or o >= threshold:
                            name = "misses" if f < threshold else "hits" if o >= threshold else "false_alarms"
                            expected[name][int(block[b]), s, p] += 1
    for name, counts in expected.items():
        assert sums[f"pooled_{name}"].dtype == torch.int64
        assert np.array_equal(sums[f"pooled_{name}"][..., 0].numpy(), counts), name


def test_pooled_csi_of_a_pool_of_1_is_the_csi() -> None:
    mean, truth, valid, block = fields()
    skill = Skill(["shifted"], scope(), None, {"pooled": lambda one: PooledContingency(one, (1, 4, 8))})
    skill.update("shifted", Forecast(mean), truth, valid, block)
    scores = skill.dataset().isel(model=0)
    first = valid[:, 0]
    f, o = mean[:, 0][first] >= 0.5, truth[:, 0][first] >= 0.5
    csi = scores["csi_pooled"].sel(lead_time=1, threshold=0.5)
    assert float(csi.sel(pool=1)) == pytest.approx(float((f & o).sum() / (f | o).sum()), abs=1e-6)
    assert float(csi.sel(pool=8)) > float(csi.sel(pool=1))
    bias = scores["frequency_bias_pooled"].sel(lead_time=1, threshold=0.5, pool=1)
    assert float(bias) == pytest.approx(float(f.sum() / o.sum()), abs=1e-6)


@pytest.mark.parametrize("sizes", [(), (0, 4), (4, 4), (2.5,), (4, 200)])
def test_scales_that_cannot_be_are_refused(sizes: Sequence[int]) -> None:
    with pytest.raises(UserError, match="scales are different whole numbers of pixels, 1 to 181; received"):
        Fractions(scope(), sizes)
