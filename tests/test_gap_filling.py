"""Gaps: frames before and after are given, those between are forecast, and nobody takes the one for the other."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT
from conftest import CADENCE, DBZ, START, WriteArchive, every, labelled
from PIL import Image, ImageSequence
from torch import Tensor

import train
from datamodules.moving_digits import MovingDigitsData
from datamodules.occluded_digits import OccludedDigitsData
from datamodules.radar import RadarData
from datamodules.sampler import PADDING, Draw
from forecast import checkpoint, command_line, config
from forecast.baselines.interpolation import Interpolation, between
from forecast.batch import Frames
from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.errors import UserError
from forecast.film import write_film
from forecast.forecaster import Forecaster, NetworkForecaster, check_given
from forecast.heads import Bernoulli, Point
from forecast.networks.gap_filler import GapFiller, blended
from forecast.plots import colour_scale, forecast_figure, frame_times
from forecast.protocol import Protocol, differences
from forecast.scoring import scoring_of
from forecast.units import Linear, Quantity

T, S, A = 3, 4, 2
LONG = every(400)
GIVEN: dict[str, Any] = {"past": T, "future": S, "after": A, "batch_size": 5, "workers": 0, "seed": 0}
CELL = partial(LSTM, peephole=True)
RATE = Quantity("rainfall_rate", "rain rate", "mm/h", (1.0,))
ALIKE: dict[str, Any] = {"static": torch.zeros(2, 0, 5, 6), "time": torch.zeros(2, dtype=torch.int64)}


def decoded(data: Any, split: Any = "train", positions: tuple[int, ...] = (4, 0, PADDING)) -> Frames:
    frames: Frames = data.on_after_batch_transfer(data.windows(split)[Draw(0, positions)], 0)
    return frames


def filler(cell: Any = CELL, hidden: Any = (3, 2), after: int = A, **options: Any) -> GapFiller:
    torch.manual_seed(0)
    return GapFiller(cell, hidden, after, **{"head": Point(), "inputs": 1, "outputs": 1, "patch": 2, **options})


def window(B: int = 2, size: tuple[int, int] = (5, 6)) -> tuple[Tensor, Tensor]:
    """Frames given, T before the gap and A after it, and where they are valid."""
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(B, T + A, 1, *size, generator=generator) > 0.3
    return torch.where(valid, torch.rand(valid.shape, generator=generator) * 50, 0.0), valid


def test_frames_around_the_gap_are_given_and_those_in_it_are_the_truth(write_archive: WriteArchive) -> None:
    data = RadarData(write_archive(times=LONG), **GIVEN)
    data.setup()
    frames = decoded(data)
    numbers = torch.from_numpy(labelled(400, 12, 14))
    for row, start in enumerate((4, 0)):
        order = [*range(start, start + T), *range(start + T + S, start + T + S + A)]
        missing = numbers[order] == DBZ["_FillValue"]
        assert torch.equal(frames.known[row, :, 0], ~missing)
        assert torch.equal(frames.past[row, :, 0][~missing], numbers[order][~missing] * 0.5 - 10)
        gap = numbers[start + T : start + T + S]
        assert torch.equal(frames.valid[row, :, 0], gap != DBZ["_FillValue"])
        seen = frames.valid[row, :, 0]
        assert torch.equal(frames.truth[row, :, 0][seen], gap[seen] * 0.5 - 10)
        # The issue time is that of the last frame before the gap.
        assert frames.time[row] == START + (start + T - 1) * CADENCE
    assert not frames.valid[2].any()
    assert frames.known[2].any()


def test_windows_of_a_gap_keep_to_their_split_and_cross_no_gap_in_time(write_archive: WriteArchive) -> None:
    times = np.delete(LONG, 100)
    data = RadarData(write_archive(times=times), **GIVEN)
    data.setup()
    length = T + S + A
    for split in ("train", "validation", "test"):
        windows, within = data.windows(split), data._intervals[split]
        for start in windows.index.start.tolist():
            own = times[start : start + length]
            assert own[-1] - own[0] == (length - 1) * CADENCE
            assert within.start <= own[0]
            assert own[-1] < within.end
    # A frame is filled in once.
    assert set(np.diff(data.windows("test").index.start)) == {S}
    last = data.windows("train").index.start.max()
    assert times[last + length] >= data._intervals["train"].end


@pytest.mark.parametrize("kind", [MovingDigitsData, OccludedDigitsData])
def test_digits_have_gaps_too_and_their_oracle_knows_what_is_in_them(kind: Any) -> None:
    small: dict[str, Any] = {**GIVEN, "train": 6, "validation": 2, "test": 5}
    data = kind(**small, **({"hidden": 1, "speed": 4} if kind is OccludedDigitsData else {}))
    data.setup()
    whole = kind(
        **{**small, "future": S + A, "after": 0}, **({"hidden": 1, "speed": 4} if kind is OccludedDigitsData else {})
    )
    whole.setup()
    frames, longer = decoded(data, "test", (0, 3)), decoded(whole, "test", (0, 3))
    assert torch.equal(frames.past, torch.cat([longer.past, longer.truth[:, S:]], dim=1))
    assert torch.equal(frames.truth, longer.truth[:, :S])
    oracle = data.references()["oracle"]
    forecast = oracle.predict(frames.past, frames.known, S, static=frames.static, time=frames.time)
    assert torch.equal(forecast.mean, frames.truth)


def test_interpolation_is_numpys_where_both_frames_are_seen() -> None:
    past, valid = window()
    baseline = Interpolation(A)
    assert isinstance(baseline, Forecaster)
    forecast = baseline.predict(past, valid, S, members=2, **ALIKE)
    mean, before, after = forecast.mean.numpy(), past[:, T - 1].numpy(), past[:, T].numpy()
    seen_before, seen_after = valid[:, T - 1].numpy(), valid[:, T].numpy()
    for place in np.ndindex(before.shape):
        ends = [
            before[place] if seen_before[place] or not seen_after[place] else after[place],
            after[place] if seen_after[place] or not seen_before[place] else before[place],
        ]
        expected = np.interp(np.arange(1, S + 1), [0, S + 1], ends)
        np.testing.assert_allclose(mean[place[0], :, *place[1:]], expected, rtol=1e-5)
    assert not (seen_before | seen_after).all()
    assert forecast.members is not None
    assert torch.equal(forecast.members, forecast.mean[:, None].expand(-1, 2, -1, -1, -1, -1))


def silent() -> GapFiller:
    """A network that says nothing."""
    network = filler()
    torch.nn.init.zeros_(network.output.weight)
    torch.nn.init.zeros_(network.output.bias)
    return network


def standing(past: Tensor) -> Tensor:
    """Frames that do not move on either side of the gap."""
    return torch.cat(
        [past[:, T - 1 : T].expand(-1, T, -1, -1, -1), past[:, T : T + 1].expand(-1, A, -1, -1, -1)], dim=1
    )


def test_where_nothing_moves_a_network_that_says_nothing_answers_the_interpolation() -> None:
    network = silent()
    past = standing(window()[0])
    seen = torch.ones_like(past, dtype=torch.bool)
    forecaster = NetworkForecaster(network, Point(), Linear(0, 60), RATE.thresholds)
    for steps in (1, S, 7):
        expected = Interpolation(A).predict(past, seen, steps, **ALIKE).mean
        answer = forecaster.predict(past, seen, steps, **ALIKE).mean
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("before", "after"), [(3, 3), (3, 1), (1, 3), (1, 1)])
def test_what_moves_is_carried_into_the_gap(before: int, after: int) -> None:
    """A hill that goes 2 pixels right and 1 down in each frame, and grows: what is between the sides is known."""
    y, x = torch.arange(64.0)[:, None], torch.arange(64.0)
    times = range(1 - before, S + 1 + after)
    hills = [torch.exp(-((x - 26 - 2 * t) ** 2 + (y - 30 - t) ** 2) / 2 / 6**2) * (1 + t / 20) for t in times]
    frames = torch.stack(hills)[None, :, None]
    sides = frames[:, :before], frames[:, before + S :]
    truth = frames[:, before : before + S]
    carried = (blended(*sides, S) - truth).square().mean()
    still = (between(sides[0][:, -1:], sides[1][:, :1], S) - truth).square().mean()
    assert carried < 0.02 * still


@pytest.mark.parametrize(
    "cell", [partial(LSTM, peephole=True, learned_initial_state=True), partial(GRU, reset="after")]
)
def test_each_frame_of_the_gap_reads_both_sides(cell: Any) -> None:
    network = filler(cell)
    past, _ = window()
    past = (past / 50).requires_grad_()
    raw = network(past, S, static=ALIKE["static"]).raw
    for step in range(S):
        (gradient,) = torch.autograd.grad(raw[:, step].square().sum(), past, retain_graph=True)
        reached = gradient.abs().flatten(2).sum((0, 2))
        assert (reached > 0).all(), (step, reached)
    weights = dict(network.named_parameters())
    gradients = torch.autograd.grad(raw.square().sum(), list(weights.values()))
    assert not [name for name, one in zip(weights, gradients, strict=True) if not one.any()]


def test_known_zeros_are_told_from_a_gap_and_static_fields_are_seen() -> None:
    network = filler(inputs=2)
    static = torch.zeros(2, 1, 5, 6)
    # The same frames of zeros, at the same time in as many: but the one before is missing, or is known.
    missing = network(torch.zeros(2, T + A, 1, 5, 6), 2, static=static).raw[:, 1]
    known = network(torch.zeros(2, T + 1 + A, 1, 5, 6), 1, static=static).raw[:, 0]
    assert not torch.allclose(missing, known)
    assert not torch.allclose(network(torch.zeros(2, T + A, 1, 5, 6), 2, static=static + 1).raw[:, 1], missing)


def test_it_is_the_same_in_both_directions_of_time() -> None:
    network = filler(hidden=(3,))
    (layer,) = network.stack.layers
    assert layer.forward_cell is not None
    assert layer.backward_cell is not None
    layer.backward_cell.load_state_dict(layer.forward_cell.state_dict())
    with torch.no_grad():
        network.output.weight[:, 3:] = network.output.weight[:, :3]
    # Of frames that stand still: the flow of frames that move, seen backwards, is the opposite one but nearly.
    two, static = torch.rand(2, 2, 1, 5, 6, generator=torch.Generator().manual_seed(2)), ALIKE["static"]
    past = two.repeat_interleave(A, dim=1)
    there, back = network(past, S, static=static).raw, network(past.flip(1), S, static=static).raw
    torch.testing.assert_close(back, there.flip(1))
    assert not torch.allclose(back, there)


def test_one_batch_can_be_learned_by_heart() -> None:
    network = filler(hidden=(8,))
    past, _ = window()
    past /= 50
    static = ALIKE["static"]
    change = torch.rand(2, 2, 1, 3, 3, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, -1)
    truth = network(past, 2, static=static).raw.detach() + change.repeat_interleave(2, -2)[..., :5, :]
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(300):
        loss = (network(past, 2, static=static).raw - truth).square().mean()
        if loss < 0.02 * change.var():
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"after 300 steps the error is {float(loss):.2g}")


def settings(*overrides: str) -> Any:
    digits = ["data.train=4", "data.validation=2", "data.test=4", "data.past=2", "data.future=2", "data.batch_size=2"]
    cfg = command_line.load(ROOT / "conf", [*digits, "trainer=cpu", *overrides])
    config.check(cfg)
    return cfg


FILL = ("model=gap_filler", "model.network.hidden=[2]", "data.after=1", "references=interpolation")


def made(*overrides: str) -> Any:
    """The module of a run."""
    cfg = settings(*overrides)
    data = config.build(cfg.data)
    data.setup()
    return train.make_module(cfg, data)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("data.after=-1",), "data.after is -1; it must be at least 0"),
        (("model=gap_filler",), "data.after is 0; set data.after=1 or more"),
        (("model=interpolation",), "data.after is 0; set data.after=1 or more"),
        (("data.after=1",), "data.after is 1, but model=convlstm reads 0 frames after .* model=gap_filler"),
        (("data.after=1", "model=persistence"), "data.after is 1, but Persistence reads 0 frames"),
        ((*FILL[:3],), "data.after is 1, but Persistence reads 0 frames .* references=interpolation"),
        ((*FILL, "model.network.after=2"), "data.after is 1, but model=gap_filler reads 2 frames"),
        ((*FILL, "model.lagrangian=true"), "model=gap_filler fills a gap between two; leave model.lagrangian out"),
        ((*FILL, "model.head._target_=forecast.heads.Bernoulli"), "Bernoulli are no frames"),
        ((*FILL, "tbptt.steps=4"), "carries no state along a stream"),
        ((*FILL, "teaching=linear"), "never fed its own forecasts"),
        ((*FILL, "model.network.hidden=[]"), "one layer or more"),
    ],
)
def test_what_does_not_go_with_a_gap_is_refused_before_anything_runs(overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        made(*overrides)


def test_streams_have_nothing_after_them() -> None:
    data = MovingDigitsData(**{**GIVEN, "train": 4, "validation": 2, "test": 2})
    data.setup()
    with pytest.raises(UserError, match=r"data.after is 2 .* set tbptt.steps=null"):
        data.train_along_streams(4, None)
    with pytest.raises(UserError, match="reads frames after those that it forecasts, which no stream has"):
        NetworkForecaster(filler(), Point(), Linear(), ()).stream(torch.zeros(1, 0, 4, 4))
    with pytest.raises(UserError, match="2 frames after the gap and 1 or more before it; received 2"):
        filler()(torch.zeros(1, 2, 1, 4, 4), 1, static=torch.zeros(1, 0, 4, 4))
    with pytest.raises(UserError, match="Bernoulli"):
        filler(head=Bernoulli())
    check_given("anybody", filler(), A)


def test_a_filled_gap_is_not_compared_with_a_nowcast() -> None:
    terms = []
    for overrides in (FILL, ("data.after=0",), (*FILL, "data.after=2")):
        cfg = settings(*overrides)
        data = config.build(cfg.data)
        data.setup()
        terms.append(scoring_of(checkpoint.told(cfg), data).protocol)
    assert "after: 1 | 0" in differences(terms[0], terms[1])
    assert "after: 1 | 2" in differences(terms[0], terms[2])
    # Scores that were written before there were gaps are those of nowcasts.
    old = {name: one for name, one in asdict(terms[1]).items() if name not in ("after", "accumulate")}
    assert Protocol(**old) == terms[1]


def test_a_gap_filler_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    module = made(*FILL)
    prefixed = {f"forecaster.{name}": one for name, one in module.forecaster.state_dict().items()}
    torch.save({"stormcell": module.card, "state_dict": prefixed}, tmp_path / "best.ckpt")
    forecaster, card = checkpoint.load_forecaster(tmp_path / "best.ckpt")
    past = torch.rand(2, 3, 1, 48, 48)
    rest: dict[str, Any] = {"static": torch.zeros(2, 0, 48, 48), "time": torch.zeros(2, dtype=torch.int64)}
    both = [one.predict(past, past > 0, 2, **rest).mean for one in (forecaster, module.forecaster)]
    assert torch.equal(*both)
    assert card.model["network"]["after"] == 1
    other = made(*FILL, "data.after=2").card
    with pytest.raises(UserError, match=r"model.network.after=1, but this run has model.network.after=2|after=1"):
        checkpoint.check_matches(tmp_path / "best.ckpt", checkpoint.Card(**other), frame_size=None, resume=False)


def test_figure_and_film_show_before_gap_and_after_in_order_of_time(tmp_path: Path) -> None:
    dbz = Quantity("z", "radar reflectivity", "dBZ", (20.0,), floor=-10.0)
    value = {"before": 12.0, "after": 22.0, "truth": 32.0, "model": 42.0}
    before, after, truth, model = (np.full((n, 1, 12, 12), value[k]) for n, k in zip((T, A, S, S), value, strict=True))
    sample = (np.concatenate([before, after]), truth, np.ones_like(truth, dtype=bool), {"model": model})
    write_film(tmp_path / "film.gif", *sample, dbz, 600, None, A)
    colours, norm = colour_scale(dbz, np.zeros(1))
    exact = {name: np.round(np.array(colours(norm(one))[:3]) * 255) for name, one in value.items()}
    with Image.open(tmp_path / "film.gif") as opened:
        pictures = [np.asarray(one.convert("RGB")).astype(int) for one in ImageSequence.Iterator(opened)]
    order = ["before"] * T + ["truth"] * S + ["after"] * A
    assert len(pictures) == len(order)
    for number, (picture, name) in enumerate(zip(pictures, order, strict=True)):
        left = picture[:, : picture.shape[1] * 2 // 5]
        found = {one for one, colour in exact.items() if (np.abs(left - colour).max(-1) <= 1).mean() > 0.1}
        assert found == {name}, number
        assert (picture[:20].max(-1).min() < 40) == (name == "truth")  # the time of what was given is pale
    figure = forecast_figure(*sample, dbz, 600, None, A)
    shown = [(ax.get_title(), float(ax.images[0].get_array().mean())) for ax in figure.axes if ax.images]
    assert shown[:T] == [("\N{MINUS SIGN}20 min", 12), ("\N{MINUS SIGN}10 min", 12), ("issue time", 12)]
    gap = [(title, mean) for title, mean in shown[T:] if title and mean == value["truth"]]
    assert gap == [(f"+{minutes} min", 32) for minutes in (10, 20, 30, 40)]
    assert [one for one in shown if one[1] == value["after"]] == [("+50 min", 22), ("+60 min", 22)]


def test_times_of_frames_are_in_cadences_after_the_issue_time() -> None:
    assert frame_times(3, 2) == [-2, -1, 0, 1, 2]
    assert frame_times(2, 3, after=2) == [-1, 0, 1, 2, 3, 4, 5]
    assert frame_times(2, 2, span=6) == [-1, 0, 6, 12]


def test_the_task_is_told_in_words() -> None:
    data = MovingDigitsData(**{**GIVEN, "train": 4, "validation": 2, "test": 2})
    assert data.task == "3 before + 2 after -> 4 frames"
