"""What is inside is found: signals split a frame's change, and channels that know of it stand out from their null."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from commands import ROOT
from PIL import Image, ImageSequence
from torch import Tensor, nn

import train
from datamodules.moving_digits import MovingDigitsData
from forecast import command_line, config
from forecast.batch import Frames
from forecast.callbacks.inside import Inside
from forecast.cells.cell import Cell
from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.errors import UserError
from forecast.forecaster import NetworkForecaster
from forecast.heads import Point
from forecast.inside import NAME, SIGNALS, Correlations, Maps, Seen, has_maps, look, signals
from forecast.logs import MetricsFile
from forecast.module import NowcastModule
from forecast.networks.encoder_forecaster import EncoderForecaster
from forecast.networks.gap_filler import GapFiller
from forecast.networks.lagrangian import Lagrangian
from forecast.networks.next_frame import NextFrame
from forecast.networks.predrnn import PredRNN
from forecast.networks.unet import UNet
from forecast.recurrence import use_backend
from forecast.units import Linear

T, S, SIZE = 4, 3, 24


def blob(x: float, height: float = 1.0, size: int = 48) -> Tensor:
    """A smooth hill H W at column x."""
    rows, columns = torch.arange(size).view(-1, 1), torch.arange(size)
    return height * torch.exp(-((rows - size / 2) ** 2 + (columns - x) ** 2) / 40)


def all_known(frames: Tensor) -> Tensor:
    return torch.ones_like(frames, dtype=torch.bool)


def test_what_only_moves_does_not_grow_and_what_only_grows_does_not_move() -> None:
    moving = torch.stack([blob(18 + 2 * t) for t in range(4)])
    motion, growth, decay = (one.sum() for one in signals(moving, all_known(moving))[0].unbind(1))
    assert motion > 15 * max(growth, decay)
    assert motion == pytest.approx(float((moving[1:] - moving[:-1]).abs().sum()), rel=0.05)

    growing = torch.stack([blob(24, height) for height in (0.4, 0.6, 0.8, 0.5)])
    found = signals(growing, all_known(growing))[0]
    assert found[:, 0].sum() < 0.05 * found[:, 1:].sum()
    assert not found[0].any()
    rises = (growing[1:] - growing[:-1]).clamp_min(0).sum()
    assert float(found[:, 1].sum()) == pytest.approx(float(rises), rel=0.05)
    assert found[3, 2].sum() > 0.9 * blob(24, 0.3).sum()
    assert found[:3, 2].sum() < 0.05 * found[:, 2].sum()


def test_the_change_of_a_frame_is_motion_growth_and_decay_and_nothing_else() -> None:
    torch.manual_seed(0)
    frames = torch.rand(5, 32, 32)
    motion, growth, decay = signals(frames, all_known(frames))[0][1:].unbind(1)
    moved = frames[1:] - frames[:-1] - growth + decay
    torch.testing.assert_close(moved.abs(), motion, rtol=0, atol=1e-6)
    assert not (growth * decay).any()


def test_what_is_missing_or_comes_from_outside_does_not_count() -> None:
    moving = torch.stack([blob(18 + 2 * t) for t in range(3)])
    known = all_known(moving)
    known[1, 24, 20] = False
    counts = signals(moving, known)[1]
    assert not counts[0].any()
    assert not counts[1, 24, 20]
    assert not counts[2, 24, 20]
    assert not counts[2, 24, 22]  # where it has come by then
    assert counts[1, 24, 22]
    assert not counts[1:, :, 0].any()  # came over the left edge
    assert counts[1:, 10:38, 30:40].all()


def seen(maps: Tensor, shown: Tensor, counts: Tensor, begin: int = 0) -> Seen:
    """A window of one layer with one part."""
    frames = torch.zeros_like(shown[:, 0])
    return Seen(frames, counts, shown, counts, {"encoder.0": Maps(begin, {"h": maps})})


def windows(number: int = 8, steps: int = 6, channels: int = 3) -> list[Seen]:
    """Of noise: growth and the like of 8 x 8 pixels, and channels at half of the resolution."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(number):
        shown = torch.rand(steps, len(SIGNALS), 8, 8, generator=generator)
        counts = torch.rand(steps, 8, 8, generator=generator) > 0.3
        counts[0] = False
        made.append(seen(torch.randn(steps, channels, 4, 4, generator=generator), shown, counts))
    return made


def told(shuffles: int, given: list[Seen]) -> pd.DataFrame:
    correlations = Correlations(shuffles)
    for one in given:
        correlations.add(one)
    return correlations.table().set_index("signal")


def by_hand(given: list[Seen], orders: list[list[int]]) -> np.ndarray[Any, Any]:
    """r of each channel with each signal, by numpy."""
    activity, signal = [], []
    for one, order in zip(given, orders, strict=True):
        maps, shown, counts = one.layers["encoder.0"].parts["h"][1:], one.signals[1:][order], one.counts[1:][order]
        for y, x in np.ndindex(4, 4):
            here = (..., slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
            for t in range(len(maps)):
                known = counts[t][here].numpy()
                if known.sum() > 2:
                    activity.append(maps[t, :, y, x].numpy())
                    signal.append(shown[t][here].numpy()[:, known].mean(1))
    channels = maps.shape[1]
    return np.corrcoef(np.array(activity).T, np.array(signal).T)[:channels, channels:]


def test_correlations_are_those_of_numpy_chosen_on_even_windows_and_told_of_odd_ones() -> None:
    given, shuffles = windows(), 3
    table = told(shuffles, given)
    draws = [np.random.default_rng((0, number)) for number in range(len(given))]
    orders = [[list(range(5)) for _ in given]]
    drawn = [[list(draw.permutation(5)) for _ in range(shuffles)] for draw in draws]
    orders += [[each[number] for each in drawn] for number in range(shuffles)]
    sizes = []
    for number, order in enumerate(orders):
        choosing, telling = by_hand(given[::2], order[::2]), by_hand(given[1::2], order[1::2])
        best = np.abs(choosing).argmax(0)
        columns = range(len(SIGNALS))
        sizes.append(telling[best, columns] * np.sign(choosing[best, columns]))
        if number == 0:
            assert table["channel"].tolist() == best.tolist()
            np.testing.assert_allclose(table["chosen_by"], choosing[best, columns], rtol=1e-4)
            np.testing.assert_allclose(table["correlation"], telling[best, columns], rtol=1e-4)
    np.testing.assert_allclose(table["null_mean"], np.mean(sizes[1:], axis=0), rtol=1e-4)
    np.testing.assert_allclose(table["null_max"], np.max(sizes[1:], axis=0), rtol=1e-4)
    np.testing.assert_allclose(table["difference"], sizes[0] - np.mean(sizes[1:], axis=0), rtol=1e-4)


def test_a_channel_that_is_growth_stands_out_and_noise_does_not() -> None:
    given = windows(number=16, channels=30)
    noise = told(20, given)
    assert (noise["correlation"].abs() < 0.1).all()
    assert (noise["difference"].abs() < 0.1).all()
    # Of 30 channels the best one looks better than it is.
    assert noise["chosen_by"].abs().min() > 1.5 * noise["correlation"].abs().max()
    for one in given:
        growth = nn.functional.avg_pool2d(one.signals[:, 1] * one.counts, 2)
        share = nn.functional.avg_pool2d(one.counts.float(), 2)
        one.layers["encoder.0"].parts["h"][:, 17] = -growth / share.clamp_min(0.1)
    table = told(20, given)
    assert table.loc["growth", "channel"] == 17
    assert table.loc["growth", "correlation"] < -0.99
    assert table.loc["growth", "difference"] > 0.9
    assert table.loc["growth", "null_max"] < 0.5
    assert (table.drop("growth")["difference"].abs() < 0.1).all()


def test_a_channel_that_knows_the_place_and_not_the_time_is_in_its_null() -> None:
    given = []
    for number in range(6):
        torch.manual_seed(number)
        shown = torch.rand(6, 3, 4, 4) * torch.rand(4, 4) ** 3
        place = shown[:, 1].mean(0).expand(6, 1, 4, 4).clone()
        given.append(seen(place, shown, torch.ones(6, 4, 4, dtype=torch.bool)))
    table = told(5, given)
    assert table.loc["growth", "correlation"] > 0.5
    assert table.loc["growth", "difference"] == pytest.approx(0, abs=1e-9)


def test_a_dead_channel_is_never_chosen_and_layers_begin_when_they_begin() -> None:
    given = windows(channels=2)
    plain = told(2, given)
    dead = [
        one._replace(layers={"encoder.0": Maps(0, {"h": one.layers["encoder.0"].parts["h"].clone()})}) for one in given
    ]
    for one in dead:
        one.layers["encoder.0"].parts["h"][:, 0] = 0.7
    assert set(told(2, dead)["channel"]) == {1}
    assert np.isfinite(told(2, dead)["null_max"]).all()
    # Of a layer whose first step is at time 2 the maps are those of the times 2, 3, ...
    later = []
    for one in given:
        maps = one.layers["encoder.0"].parts["h"].clone()
        one.counts[1] = False
        later.append(one._replace(layers={"forecaster.0": Maps(2, {"h": maps[2:]})}))
    pd.testing.assert_series_equal(told(1, later)["correlation"], told(1, given)["correlation"])
    assert not plain.empty


def window(seed: int = 0, after: int = 0) -> Frames:
    generator = torch.Generator().manual_seed(seed)
    long = torch.rand(1, T + S + after, 1, 6, 6, generator=generator)
    frames = nn.functional.interpolate(long[:, :, 0], (SIZE, SIZE), mode="bilinear").unsqueeze(2)
    known = torch.ones_like(frames, dtype=torch.bool)
    given = [*range(T), *range(T + S, T + S + after)]
    between = slice(T, T + S)
    static, number = frames.new_zeros(1, 0, SIZE, SIZE), torch.zeros(1, dtype=torch.int64)
    return Frames(
        frames[:, given], known[:, given], frames[:, between], known[:, between], static, number, number, number == 0
    )


STRIDED = [{"channels": 4, "kernel": kernel, "stride": 2, "padding": 1} for kernel in (4, 4)]
LSTM_PARTS, ST_PARTS = ["h", "c", "i", "f", "o"], ["h", "c", "m", "i", "f", "i . g", "i'", "f'", "i' . g'", "o"]
BUILT: dict[str, tuple[Any, dict[str, tuple[int, int, int]], list[str]]] = {
    "2015": (
        partial(EncoderForecaster, LSTM, [5, 6], patch=4),
        {f"{part}.{i}": (T * j, S if j else T, 6) for j, part in enumerate(("encoder", "forecaster")) for i in (0, 1)},
        LSTM_PARTS,
    ),
    "2017": (
        partial(EncoderForecaster, partial(GRU, reset="before"), [5, 6], down=STRIDED, up=STRIDED),
        {"encoder.0": (0, T, 12), "encoder.1": (0, T, 6), "forecaster.0": (T, S, 6), "forecaster.1": (T, S, 12)},
        ["h", "r", "z"],
    ),
    "next frame": (
        partial(NextFrame, LSTM, [5, 6], patch=2),
        {f"stack.{i}": (0, T + S - 1, 12) for i in (0, 1)},
        LSTM_PARTS,
    ),
    "predrnn": (
        partial(PredRNN, [5, 5], kernel=3, patch=4),
        {f"cells.{i}": (0, T + S - 1, 6) for i in (0, 1)},
        ST_PARTS,
    ),
}


def forecaster(network: nn.Module) -> NetworkForecaster:
    return NetworkForecaster(network, Point(), Linear(), ()).eval()


@pytest.mark.parametrize("name", BUILT)
def test_every_layer_shows_its_states_and_gates_at_every_step(name: str) -> None:
    torch.manual_seed(0)
    build, layers, parts = BUILT[name]
    made = forecaster(build(inputs=1, outputs=1))
    frames = window()
    plain = made(frames.past, S, frames.static).raw
    found = look(made, frames)
    assert {layer: (maps.begin, *maps.parts["h"].shape[::3]) for layer, maps in found.layers.items()} == layers
    for maps in found.layers.values():
        assert list(maps.parts) == parts
    assert torch.equal(found.frames, torch.cat([frames.past, frames.truth], dim=1)[0, :, 0])
    # Nothing is left behind.
    assert torch.equal(made(frames.past, S, frames.static).raw, plain)
    assert not any("step_and_gates" in vars(cell) for cell in made.modules() if isinstance(cell, Cell))


def test_maps_are_the_states_that_the_network_has_and_gates_those_that_made_them() -> None:
    torch.manual_seed(0)
    network = EncoderForecaster(partial(LSTM, zoneout=(0.0, 0.0)), [5, 6], inputs=1, outputs=1, patch=4)
    frames = window()
    found = look(forecaster(network), frames).layers
    use_backend(network, "reference")  # as it is looked at: step by step
    for depth, (h, c) in enumerate(network.encode(frames.past)):
        parts = found[f"encoder.{depth}"].parts
        torch.testing.assert_close(parts["h"][-1], h[0], rtol=0, atol=0)
        torch.testing.assert_close(parts["c"][-1], c[0], rtol=0, atol=0)
        torch.testing.assert_close(parts["h"], parts["o"] * parts["c"].tanh())
        added = parts["c"][1:] - parts["f"][1:] * parts["c"][:-1]
        assert (added.abs() <= parts["i"][1:] + 1e-6).all()  # i . g, and |g| < 1


def test_hidden_states_are_those_after_zoneout() -> None:
    torch.manual_seed(0)
    network = EncoderForecaster(partial(LSTM, zoneout=0.4), [5], inputs=1, outputs=1, patch=4).eval()
    frames = window()
    ((h, _),) = network.encode(frames.past)
    assert torch.equal(look(forecaster(network), frames).layers["encoder.0"].parts["h"][-1], h[0])


def test_a_gap_is_shown_in_the_order_of_time_from_both_sides() -> None:
    torch.manual_seed(0)
    network = GapFiller(LSTM, [5], 2, head=Point(), inputs=1, outputs=1, patch=4)
    frames = window(after=2)
    found = look(forecaster(network), frames)
    ahead, back = found.layers["stack.0"], found.layers["stack.0.backward_cell"]
    assert len(ahead.parts["h"]) == len(back.parts["h"]) == T + S + 2
    assert torch.equal(found.frames[T : T + S], frames.truth[0, :, 0])
    assert torch.equal(found.frames[T + S :], frames.past[0, T:, 0])
    other = torch.cat([torch.zeros_like(frames.past[:, :1]), frames.past[:, 1:]], dim=1)
    changed = look(forecaster(network), frames._replace(past=other)).layers
    # The first frame reaches forward to all times, and back to its own alone.
    there = [
        (changed[name].parts["h"] != maps.parts["h"]).flatten(1).any(1).tolist()
        for name, maps in (("stack.0", ahead), ("stack.0.backward_cell", back))
    ]
    assert there == [[True] * (T + S + 2), [True] + [False] * (T + S + 1)]


def test_in_lagrangian_coordinates_frames_lie_where_the_inner_network_sees_them() -> None:
    torch.manual_seed(0)
    inner = EncoderForecaster(LSTM, [5], inputs=1, outputs=1, patch=4)
    read: list[Tensor] = []
    inner.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    moving = torch.stack([blob(8 + 2 * t, size=48) for t in range(T + S)]).view(1, -1, 1, 48, 48)
    known = torch.ones_like(moving, dtype=torch.bool)
    static, number = moving.new_zeros(1, 0, 48, 48), torch.zeros(1, dtype=torch.int64)
    frames = Frames(moving[:, :T], known[:, :T], moving[:, T:], known[:, T:], static, number, number, number == 0)
    found = look(forecaster(Lagrangian(inner, Point())), frames)
    assert list(found.layers) == ["encoder.0", "forecaster.0"]
    aligned = read[0][0, :, 0]
    torch.testing.assert_close(found.frames[:T][found.known[:T]], aligned[found.known[:T]])
    # All of them, those to come too, where the last one is.
    at_issue = found.frames[T - 1]
    for frame, sure in zip(found.frames, found.known, strict=True):
        assert (frame - at_issue)[sure].abs().max() < 0.1
    assert (moving[0, -1, 0] - at_issue).abs().max() > 0.5


def composed(*overrides: str) -> tuple[NowcastModule, MovingDigitsData, Any]:
    tiny = ["data.train=8", "data.validation=5", "data.test=5", "data.batch_size=4", "data.past=3", "data.future=2"]
    cfg = command_line.load(ROOT / "conf", [*tiny, "data.size=24", "folder=nowhere", "references=none", *overrides])
    pl.seed_everything(0, verbose=False)
    data = config.build(cfg.data)
    data.setup()
    return train.make_module(cfg, data), data, cfg


def test_a_test_leaves_a_table_a_figure_a_film_and_numbers_in_the_log(tmp_path: Path) -> None:
    module, data, cfg = composed("callbacks=inside", "model.network.hidden=[3,3]", "callbacks.inside.windows=4")
    assert next(iter(cfg.callbacks)) == "inside"  # before the report
    cfg.callbacks.inside.folder = str(tmp_path)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=MetricsFile(str(tmp_path / "metrics.csv")),
        callbacks=[config.build(cfg.callbacks.inside)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.test(module, data, verbose=False)
    table = pd.read_csv(tmp_path / NAME)
    assert len(table) == 4 * 5 * 3  # layers, parts, signals
    assert table["channel"].between(0, 2).all()
    row = pd.read_csv(tmp_path / "metrics.csv").iloc[-1]
    for signal in SIGNALS:
        hidden = table[(table["part"] == "h") & (table["signal"] == signal)]
        assert row[f"test/inside/{signal}"] == pytest.approx(hidden["difference"].max(), rel=1e-4)
    assert np.isfinite(row["test/loss"])  # in the row of the test
    assert (tmp_path / "figures" / "inside.png").read_bytes().startswith(b"\x89PNG")
    with Image.open(tmp_path / "figures" / "inside.gif") as film:
        pictures = [np.asarray(one.convert("L")).astype(int) for one in ImageSequence.Iterator(film)]
    assert len(pictures) == 5
    # Below the frames the encoder's maps change over the past, and the forecaster's come after it.
    height = len(pictures[0])
    changes = [
        [bool((one[rows] != other[rows]).any()) for one, other in pairwise(pictures)]
        for rows in (slice(int(0.25 * height), int(0.55 * height)), slice(int(0.65 * height), height))
    ]
    assert changes == [[True, True, True, False], [False, False, True, True]]


def asked(data: Any, forecaster: Any, **more: Any) -> None:
    """The callback at the start of a run."""
    module = NowcastModule.__new__(NowcastModule)
    nn.Module.__init__(module)
    module.name, module.forecaster = "such", forecaster
    module.__dict__["_device_mesh"] = more.get("mesh")
    trainer = cast(pl.Trainer, SimpleNamespace(datamodule=data))
    Inside("nowhere").setup(trainer, module, "fit")


def test_what_has_no_maps_is_refused_when_a_run_starts() -> None:
    data = SimpleNamespace(windows=lambda split: range(2), accumulate=1, past=2, future=1)
    kept = forecaster(EncoderForecaster(LSTM, [2], inputs=1, outputs=1))
    asked(data, kept)
    flat = forecaster(nn.ModuleList([LSTM(3, 3)]))
    for without in (forecaster(UNet(2, 2, (2,), inputs=1, outputs=1)), flat, object()):
        assert not has_maps(without)
        with pytest.raises(UserError, match="model=such has none"):
            asked(data, without)
    with pytest.raises(UserError, match="there is only one"):
        asked(SimpleNamespace(windows=lambda split: range(1), accumulate=1, past=2, future=1), kept)
    with pytest.raises(UserError, match=r"data.accumulate is 3"):
        asked(SimpleNamespace(windows=lambda split: range(2), accumulate=3, past=2, future=1), kept)
    with pytest.raises(UserError, match=r"data.past and data.future are 1"):
        asked(SimpleNamespace(windows=lambda split: range(2), accumulate=1, past=1, future=1), kept)
    with pytest.raises(UserError, match="trainer=fsdp shards them"):
        asked(data, kept, mesh=object())
    for windows_, shuffles in ((1, 20), (32, 0)):
        with pytest.raises(UserError, match="2 windows or more"):
            Inside("nowhere", windows_, shuffles)
