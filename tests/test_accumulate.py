"""Means over several frames: what is forecast is the rain of a longer time, and every model is scored on the same truth."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT
from conftest import CADENCE, DBZ, RATE, START, WriteArchive, every, rain
from torch import Tensor

import train
from datamodules.moving_digits import MovingDigitsData
from datamodules.radar import RadarData
from datamodules.sampler import PADDING, Draw
from forecast import checkpoint, command_line, config
from forecast.baselines.accumulated import Accumulated
from forecast.baselines.climatology import Climatology
from forecast.baselines.persistence import Persistence
from forecast.batch import Forecast, Frames
from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.errors import UserError
from forecast.forecaster import Forecaster
from forecast.networks.many_to_one import ManyToOne
from forecast.plots import forecast_figure
from forecast.protocol import ROOT as ALL
from forecast.protocol import differences
from forecast.scoring import scoring_of
from forecast.units import Quantity

CELL = partial(LSTM, peephole=True)
T, S, N = 2, 2, 3
FRAMES = 400
LONG = every(FRAMES)
ARCHIVE: dict[str, Any] = {"times": LONG, "numbers": rain(FRAMES), "attributes": RATE, "variable": "rate"}
GIVEN: dict[str, Any] = {"past": T, "future": S, "accumulate": N, "batch_size": 5, "workers": 0, "seed": 0}


@pytest.fixture
def archive(write_archive: WriteArchive) -> str:
    return write_archive(**ARCHIVE)


def radar(path: str, **options: Any) -> RadarData:
    data = RadarData(path, **{**GIVEN, **options})
    data.setup()
    return data


def decoded(data: RadarData, positions: tuple[int, ...]) -> Frames:
    return data.on_after_batch_transfer(data.windows("train")[Draw(0, positions)], 0)


class Counting:
    """Forecasts 1, 2, 3 ... everywhere, and members that differ by 10; says what it was asked."""

    def predict(self, past: Tensor, valid: Tensor, steps: int, *, members: int = 0, **more: Any) -> Forecast:
        self.asked = steps
        mean = torch.arange(1.0, steps + 1).view(1, steps, 1, 1, 1).expand(past.shape[0], -1, 1, *past.shape[-2:])
        drawn = torch.stack([mean + 10 * member for member in range(members)], 1) if members else None
        return Forecast(mean, drawn, exceedance=torch.ones(1, 1, *mean.shape[1:]))


def test_truth_is_the_mean_rain_rate_where_all_frames_are_valid(archive: str) -> None:
    data = radar(archive)
    frames = decoded(data, (5, 0, PADDING))
    rates = rain(FRAMES)
    for row, start in enumerate((5, 0)):
        np.testing.assert_array_equal(frames.past[row, :, 0].numpy(), np.nan_to_num(rates[start : start + T]))
        for step in range(S):
            first = start + T + step * N
            own = rates[first : first + N].astype(np.float64)
            seen = np.isfinite(own).all(0)
            np.testing.assert_array_equal(frames.valid[row, step, 0].numpy(), seen)
            np.testing.assert_allclose(frames.truth[row, step, 0].numpy()[seen], own.sum(0)[seen] / N, rtol=1e-6)
            assert not seen.all()
            assert seen.any()
        assert frames.time[row] == START + (start + T - 1) * CADENCE
    assert (frames.truth[~frames.valid][: 14 * S] == 0).all()
    assert not frames.valid[2].any()
    # Each frame is forecast once.
    assert set(np.diff(data.windows("test").index.start)) == {S * N}
    assert data.quantity.long_name.endswith(", mean over 30 min")
    assert (data.cadence, data.lead) == (600, 1800)
    assert data.task == "2 -> 2 x the mean of 3 frames"


def test_a_baseline_is_scored_by_the_mean_of_its_frames_and_members() -> None:
    counting = Counting()
    wrapped = Accumulated(counting, N)
    assert isinstance(wrapped, Forecaster)
    past = torch.zeros(2, T, 1, 3, 4)
    rest: dict[str, Any] = {"static": torch.zeros(2, 0, 3, 4), "time": torch.zeros(2, dtype=torch.int64)}
    forecast = wrapped.predict(past, past == 0, S, members=2, **rest)
    assert counting.asked == S * N
    assert forecast.mean.shape == (2, S, 1, 3, 4)
    assert forecast.mean[0, :, 0, 0, 0].tolist() == [2, 5]
    assert forecast.members is not None
    assert forecast.members[1, :, :, 0, 2, 3].tolist() == [[2, 5], [12, 15]]
    assert forecast.exceedance is None
    assert wrapped.predict(past, past == 0, S, **rest).members is None


def test_a_climatology_is_that_of_the_means(archive: str) -> None:
    data = radar(archive)
    baseline = {"_target_": "forecast.baselines.persistence.Persistence"}
    kept = config.build_baseline(baseline, data)
    assert isinstance(kept, Accumulated)
    assert isinstance(kept.forecaster, Persistence)
    assert isinstance(config.build_baseline(baseline, radar(archive, accumulate=1)), Persistence)
    climatology = config.build_baseline({"_target_": "forecast.baselines.climatology.Climatology"}, data)
    assert isinstance(climatology, Climatology)
    windows = [decoded(data, (0, 9))]
    climatology.prepare(windows)
    mean = climatology.predict(
        windows[0].past, windows[0].known, S, static=windows[0].static, time=windows[0].time
    ).mean
    assert float(mean[0, 0, 0, 0, 0]) == pytest.approx(float(windows[0].truth[windows[0].valid].double().mean()))


def network(cell: Any = CELL, hidden: Any = (3, 2), **options: Any) -> ManyToOne:
    torch.manual_seed(0)
    return ManyToOne(cell, hidden, 1, **{"inputs": 1, "outputs": 1, "patch": 2, **options})


@pytest.mark.parametrize(
    "cell", [partial(LSTM, peephole=True, learned_initial_state=True), partial(GRU, reset="after")]
)
def test_one_frame_reads_the_whole_past_with_every_weight(cell: Any) -> None:
    one = network(cell)
    past = torch.rand(2, 4, 1, 5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    raw = one(past, 1, static=torch.zeros(2, 0, 5, 7)).raw
    assert raw.shape == (2, 1, 1, 5, 7)
    weights = dict(one.named_parameters())
    gradient, *others = torch.autograd.grad(raw.square().sum(), [past, *weights.values()])
    assert (gradient.abs().flatten(2).sum((0, 2)) > 0).all()
    assert not [name for name, of in zip(weights, others, strict=True) if not of.any()]


def test_its_state_goes_on_from_window_to_window() -> None:
    one = network()
    past, static = torch.rand(2, 5, 1, 4, 6), torch.zeros(2, 0, 4, 6)
    whole = one(past, 1, static=static)
    half = one(past[:, :3], 1, static=static)
    first = torch.tensor([False, True])
    rest = one(past[:, 3:], 1, static=static, state=half.state, first=first).raw
    torch.testing.assert_close(rest[0], whole.raw[0])
    torch.testing.assert_close(rest[1], one(past[:, 3:], 1, static=static).raw[1])


def test_it_forecasts_one_frame_only() -> None:
    with pytest.raises(UserError, match=r"forecasts one frame, but 2 are asked for; set data.future=1"):
        network()(torch.rand(1, 2, 1, 4, 4), 2, static=torch.zeros(1, 0, 4, 4))
    with pytest.raises(UserError, match="forecasts one frame, but 3 are asked for"):
        ManyToOne(LSTM, [2], 3, inputs=1, outputs=1)


def settings(path: str, *overrides: str) -> Any:
    one = ["data=radar", f"data.archive={path}", "data.past=2", "data.future=1", "data.accumulate=6", "trainer=cpu"]
    small = ["data.workers=0", "data.batch_size=2", "loss=balanced", "model=many_to_one", "model.network.hidden=[2]"]
    cfg = command_line.load(ROOT / "conf", [*one, *small, *overrides])
    config.check(cfg)
    return cfg


def data_of(cfg: Any) -> Any:
    data = config.build(cfg.data)
    data.setup()
    return data


def module_of(cfg: Any) -> Any:
    return train.make_module(cfg, data_of(cfg))


@pytest.fixture
def scored(archive: str) -> tuple[Any, Any]:
    cfg = settings(archive)
    data = data_of(cfg)
    return data, scoring_of(checkpoint.told(cfg), data)


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_the_hour_is_scored_in_millimetres_at_its_own_lead_time(scored: tuple[Any, Any]) -> None:
    data, scoring = scored
    sections = scoring.sections
    assert list(sections.lengths) == [ALL, "accumulation_60min"]
    frames = decoded(data, (0, 7))
    for name in ("many_to_one", "persistence", "climatology"):
        sections.update(name, Forecast(frames.truth + 2), frames, torch.zeros(2, dtype=torch.bool))
    found = sections.datasets()
    hour = found["accumulation_60min"].sel(model="persistence")
    assert found[ALL]["lead_time"].values.tolist() == hour["lead_time"].values.tolist() == [60]
    assert hour["threshold"].attrs["units"] == "mm"
    assert float(hour["mean_error"].sel(lead_time=60)) == pytest.approx(2)
    # 1 mm/h for an hour is 1 mm: what is an event as a rate is one as an amount of the same number.
    truth = frames.truth[frames.valid]
    for threshold in hour["threshold"].values.tolist():
        events = hour["hits"].sum("block") + hour["misses"].sum("block")
        assert int(events.sel(threshold=threshold, lead_time=60)) == int((truth >= threshold).sum())


def test_means_and_single_frames_are_different_protocols(archive: str) -> None:
    protocols = []
    for accumulate in (6, 1):
        cfg = settings(archive, f"data.accumulate={accumulate}", "data.eval_stride=6")
        protocols.append(scoring_of(checkpoint.told(cfg), data_of(cfg)).protocol)
    assert {"accumulate: 6 | 1", "cadence: 3600 | 600"} <= set(differences(*protocols))


def test_it_comes_back_from_its_checkpoint_and_to_no_other_length_of_time(archive: str, tmp_path: Path) -> None:
    modules = [module_of(settings(archive, *overrides)) for overrides in ((), ("data.accumulate=3",))]
    prefixed = {f"forecaster.{name}": one for name, one in modules[0].forecaster.state_dict().items()}
    torch.save({"stormcell": modules[0].card, "state_dict": prefixed}, tmp_path / "best.ckpt")
    forecaster, card = checkpoint.load_forecaster(tmp_path / "best.ckpt")
    past = torch.rand(2, 2, 1, 12, 14)
    rest: dict[str, Any] = {"static": torch.zeros(2, 0, 12, 14), "time": torch.zeros(2, dtype=torch.int64)}
    both = [one.predict(past, past > 0, 1, **rest).mean for one in (forecaster, modules[0].forecaster)]
    assert torch.equal(*both)
    assert card.cadence == 600
    now = checkpoint.Card(**modules[1].card)
    with pytest.raises(UserError, match=r"trained with data.accumulate=6, but this run has 3; make them equal"):
        checkpoint.check_matches(tmp_path / "best.ckpt", now, frame_size=None, resume=False)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("data.accumulate=0",), "data.accumulate is 0; it must be at least 1"),
        (("data.after=1",), "data.after=1 fills a gap frame by frame, but data.accumulate=6"),
        (("data.future=2",), "forecasts one frame, but 2 are asked for"),
        (("model=next_frame",), "model=next_frame forecasts one frame of the archive from the other"),
        (("model.lagrangian=true",), "model=many_to_one forecasts one frame of the archive from the other"),
        (("data.future=70",), r"no 422 in a row \(data.past \+ data.future x data.accumulate\)"),
    ],
)
def test_what_does_not_go_with_means_is_refused(archive: str, overrides: tuple[str, ...], sentence: str) -> None:
    cfg = settings(archive, *overrides)
    with pytest.raises(UserError, match=sentence):
        module_of(cfg)


def test_only_rain_rates_have_a_mean_and_streams_have_none(write_archive: WriteArchive) -> None:
    path = write_archive(times=LONG, attributes=DBZ)
    with pytest.raises(UserError, match=r"archive is in dBZ; set data.relation=marshall_palmer"):
        radar(path)
    data = radar(path, relation="marshall_palmer")
    assert data.quantity.units == "mm/h"
    with pytest.raises(UserError, match=r"one frame is the mean of 3; set tbptt.steps=null"):
        data.train_along_streams(4, None)
    assert MovingDigitsData(train=2, validation=2, test=2).accumulate == 1


def test_the_figure_tells_the_past_in_its_own_cadence() -> None:
    quantity = Quantity("r", "rain rate, mean over 60 min", "mm/h", (1.0,))
    frames = np.ones((3, 1, 4, 4))
    figure = forecast_figure(frames[:2], frames[2:], frames[2:] > 0, {"model": frames[2:]}, quantity, 600, None, 0, 6)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["\N{MINUS SIGN}10 min", "issue time", "+60 min"]
