"""Streams: a state that is carried equals the past read anew, one read per frame, and it comes back from disk."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import drift
from forecast.batch import Forecast
from forecast.cells.gru import GRU
from forecast.cells.lstm import LSTM
from forecast.errors import UserError
from forecast.forecaster import NetworkForecaster
from forecast.heads import Bernoulli
from forecast.networks.encoder_forecaster import EncoderForecaster
from forecast.networks.flat import FlatEncoderForecaster
from forecast.networks.network import EncodeThenForecast
from forecast.networks.next_frame import NextFrame
from forecast.networks.predrnn import PredRNN
from forecast.networks.unet import UNet
from forecast.streaming import Stream, Trained
from forecast.units import Linear

B, L, S, H, W, T = 2, 6, 3, 6, 5, 3
SIZES: Any = {"inputs": 2, "outputs": 1}
PEEPHOLES = partial(LSTM, peephole=True)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convlstm": lambda: EncoderForecaster(PEEPHOLES, [4, 3], patch=2, **SIZES),
    "convgru": lambda: EncoderForecaster(partial(GRU, learned_initial_state=True), [3], coordinates=True, **SIZES),
    "flat": lambda: FlatEncoderForecaster(PEEPHOLES, [5, 4], frame_size=(H, W), **SIZES),
    "tiled": lambda: FlatEncoderForecaster(partial(LSTM, dropout=0.5), [5], frame_size=(H, W), tile=4, **SIZES),
    "next_frame": lambda: NextFrame(PEEPHOLES, [4, 3], patch=2, **SIZES),
    "predrnn": lambda: PredRNN([3, 3], kernel=3, patch=2, **SIZES),
}
CARRIES = Trained(on_streams=True, window=T, cadence=600)
WINDOWS = Trained(on_streams=False, window=T, cadence=600)
networks = pytest.mark.parametrize("name", NETWORKS)
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def build(make: Callable[[], nn.Module], seed: int = 0) -> NetworkForecaster:
    """float64 weights that are not small, so that the past matters and is not forgotten."""
    torch.manual_seed(seed)
    forecaster = NetworkForecaster(make(), Bernoulli(), Linear(-10.0, 60.0), [20.0]).double().eval()
    with torch.no_grad():
        for weight in forecaster.parameters():
            weight.normal_(std=0.4)
    return forecaster


def data() -> Data:
    """Frames B L C H W of which the third is missing, their mask, static fields and the time of each frame B L."""
    random = torch.Generator().manual_seed(1)
    frames = -10 + 70 * torch.rand(B, L, 1, H, W, generator=random, dtype=torch.float64)
    valid = torch.ones_like(frames, dtype=torch.bool)
    valid[:, 2] = False
    frames[:, 2] = -10
    static = torch.rand(B, 1, H, W, generator=random, dtype=torch.float64)
    return frames, valid, static, torch.tensor([[1_000], [5_000]]) + 600 * torch.arange(L)


def push(stream: Stream, *frames: int) -> None:
    pixels, valid, _, time = data()
    for t in frames:
        stream.push(pixels[:, t], valid[:, t], time[:, t])


def predict(forecaster: NetworkForecaster, begin: int, end: int) -> Forecast:
    """What it makes of those frames, read in one go."""
    frames, valid, static, time = data()
    past = (frames[:, begin:end], valid[:, begin:end])
    return forecaster.predict(*past, S, static=static, time=time[:, end - 1], members=2)


def same(ours: Forecast, theirs: Forecast, tolerance: float = 0.0) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@networks
def test_a_carried_state_equals_the_whole_past_read_anew(name: str) -> None:
    forecaster = build(NETWORKS[name])
    frames, _, static, _ = data()
    stream = Stream(forecaster, CARRIES, static)
    for t in range(L):
        push(stream, t)
        same(stream.forecast(S, members=2), predict(forecaster, 0, t + 1), 1e-5)
        whole = forecaster(frames[:, : t + 1], 1, static).state
        for ours, theirs in zip(stream.memory.state, whole, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
                assert not one.requires_grad
    # The first frame is not forgotten, or there would be nothing to prove.
    assert not torch.allclose(stream.forecast(S).mean, predict(forecaster, 1, L).mean, rtol=0, atol=1e-5)


@networks
def test_each_frame_is_read_once_when_it_comes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forecaster = build(NETWORKS[name])
    reader = "encode" if isinstance(forecaster.network, EncodeThenForecast) else "run"
    read, lengths = getattr(forecaster.network, reader), []

    def counted(frames: Tensor, *rest: Any) -> Any:
        lengths.append(frames.shape[1])
        return read(frames, *rest)

    monkeypatch.setattr(forecaster.network, reader, counted)
    stream = Stream(forecaster, CARRIES, data()[2])
    push(stream, *range(L))
    assert lengths == [1] * L
    lengths.clear()
    stream.forecast(S)
    # A roll-out reads its own forecasts, but for the last.
    assert lengths == ([] if reader == "encode" else [1] * (S - 1))
    stream.forecast(1)
    assert len(lengths) == (0 if reader == "encode" else S - 1)


@networks
def test_a_network_trained_on_windows_reads_the_last_frames_anew(name: str) -> None:
    forecaster = build(NETWORKS[name])
    stream = Stream(forecaster, WINDOWS, data()[2])
    for t in range(L):
        push(stream, t)
        same(stream.forecast(S, members=2), predict(forecaster, max(0, t + 1 - T), t + 1))


def test_a_network_that_carries_no_state_reads_windows_and_waits_until_they_are_whole() -> None:
    forecaster = build(lambda: UNet(T, S, [4, 6], **SIZES))
    stream = Stream(forecaster, CARRIES, data()[2])
    push(stream, 0, 1)
    with pytest.raises(UserError, match="reads 3 past frames and forecasts 3 at most; received 2"):
        stream.forecast(S)
    push(stream, 2, 3)
    same(stream.forecast(S, members=2), predict(forecaster, 1, 4))


@pytest.mark.parametrize("trained", [CARRIES, WINDOWS], ids=["carries", "windows"])
@networks
def test_a_stream_comes_back_from_disk_to_the_last_bit(name: str, trained: Trained, tmp_path: Path) -> None:
    static = data()[2]
    stream = Stream(build(NETWORKS[name]), trained, static)
    push(stream, 0, 1, 2, 3)
    stream.save(tmp_path / "made" / "stream.pt")
    other = Stream(build(NETWORKS[name]), trained, static)
    other.restore(tmp_path / "made" / "stream.pt")
    for t in (4, 5):
        same(other.forecast(S, members=2), stream.forecast(S, members=2))
        push(stream, t)
        push(other, t)
    same(other.forecast(S, members=2), stream.forecast(S, members=2))


def test_a_stream_of_something_else_is_refused(tmp_path: Path) -> None:
    path, static = tmp_path / "stream.pt", data()[2]
    make = NETWORKS["convlstm"]
    stream = Stream(build(make), CARRIES, static)
    stream.save(path)
    stream.restore(path)
    with pytest.raises(UserError, match="read no frame"):
        stream.forecast(S)
    push(stream, 0)
    stream.save(path)
    units = build(make)
    units.transform = Linear(-10.0, 70.0)
    for other in (
        Stream(build(make, seed=1), CARRIES, static),
        Stream(units, CARRIES, static),
        Stream(build(make), WINDOWS, static),
        Stream(build(make), CARRIES, static + 1),
        Stream(build(make), CARRIES, static[:1]),
    ):
        with pytest.raises(UserError, match="saved by a stream of another network"):
            other.restore(path)
        assert other.memory is None
    for content, match in (
        ({"state_dict": {}}, "is not the stream of a network"),
        (b"half a file", "not a whole file"),
        (build(make), "not a whole file"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError, match=match):
            stream.restore(path)
    with pytest.raises(UserError, match="There is no stream"):
        stream.restore(tmp_path / "elsewhere.pt")


@pytest.mark.parametrize("trained", [CARRIES, WINDOWS], ids=["carries", "windows"])
def test_nothing_is_carried_over_a_gap(trained: Trained) -> None:
    forecaster = build(NETWORKS["convlstm"])
    stream = Stream(forecaster, trained, data()[2])
    push(stream, 0)
    before = stream.forecast(S, members=2)
    for late in (2, 0):
        with pytest.raises(
            UserError, match="after one of 1970-01-01 00:16:40 UTC, but this network knows frames 600 s"
        ):
            push(stream, late)
        same(stream.forecast(S, members=2), before)
    stream.restart()
    push(stream, 2, 3)
    same(stream.forecast(S, members=2), predict(forecaster, 2, 4), 1e-5)


@networks
def test_radars_of_a_batch_know_nothing_of_each_other(name: str) -> None:
    forecaster = build(NETWORKS[name])
    frames, valid, static, time = data()
    both = Stream(forecaster, CARRIES, static)
    push(both, *range(L))
    for b in range(B):
        alone = Stream(forecaster, CARRIES, static[b : b + 1])
        for t in range(L):
            alone.push(frames[b : b + 1, t], valid[b : b + 1, t], time[b : b + 1, t])
        one = Forecast(*(None if part is None else part[b : b + 1] for part in both.forecast(S, members=2)))
        same(alone.forecast(S, members=2), one, 1e-5)


@pytest.mark.parametrize("trained", [CARRIES, WINDOWS], ids=["carries", "windows"])
def test_frames_may_be_written_over_once_they_are_pushed(trained: Trained) -> None:
    forecaster = build(NETWORKS["next_frame"])
    frames, valid, static, time = data()
    stream, buffers = Stream(forecaster, trained, static), [frames[:, 0], valid[:, 0], time[:, 0]]
    for t in range(3):
        for buffer, new in zip(buffers, (frames[:, t], valid[:, t], time[:, t]), strict=True):
            buffer.copy_(new)
        stream.push(*buffers)
    for buffer in buffers:
        buffer.zero_()
    same(stream.forecast(S, members=2), predict(forecaster, 0, 3), 1e-5)


def test_what_is_no_frame_is_refused_and_leaves_no_trace() -> None:
    frames, valid, static, time = data()
    stream = Stream(build(NETWORKS["convgru"]), CARRIES, static)
    right = (frames[:, 0], valid[:, 0], time[:, 0])
    for wrong, match in (
        ((frames[:1, 0], valid[:1, 0], time[:, 0]), r"shape \(1, 1, 6, 5\).* this stream reads \(2, channels, 6, 5\)"),
        ((frames[:, :1], *right[1:]), "A frame of shape"),
        ((right[0], valid[:, 0, :, :3], right[2]), "a mask of"),
        ((right[0].log(), *right[1:]), "NaN or infinity"),
        ((*right[:2], time[:1, 0]), "give one for each of the 2 frames"),
    ):
        with pytest.raises(UserError, match=match):
            stream.push(*wrong)
        assert stream.memory is None
    stream.push(*right)
    with pytest.raises(UserError, match="0 frames"):
        stream.forecast(0)


def test_a_forecaster_streams_as_it_was_trained() -> None:
    forecaster, static = build(NETWORKS["convlstm"]), data()[2]
    with pytest.raises(UserError, match="comes from no checkpoint"):
        forecaster.stream(static)
    for trained in (CARRIES, WINDOWS):
        forecaster.trained = trained
        assert forecaster.stream(static).carries == trained.on_streams


def test_the_benchmark_of_drift_scores_each_forecast_against_what_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "LAST", L - S)
    monkeypatch.setattr(drift, "ISSUES", (1, L - S))
    forecaster, (frames, valid, static, _) = build(NETWORKS["convlstm"]), data()
    found = drift.errors(Stream(forecaster, Trained(True, T, None), static), frames, valid, S)
    for ours, end in zip(found, (1, L - S), strict=True):
        wrong = predict(forecaster, 0, end).mean - frames[:, end : end + S]
        assert ours == pytest.approx([one.square().mean().item() for one in wrong], rel=1e-5)
    assert drift.persistence(frames, S)[1, 0] == pytest.approx((frames[0, 2] - frames[0, 3:]).square().mean().item())
