"""Streams are dealt whole, in order, to lanes that begin anew alone, alike from one process and from many."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CADENCE, WriteArchive, every, labelled
from hypothesis import given
from hypothesis import strategies as st

from datamodules.moving_digits import MovingDigitsData
from datamodules.radar import RadarData
from datamodules.sampler import PADDING, Draw
from datamodules.streams import LaneSampler, Streams, locate
from forecast.batch import Batch
from forecast.errors import UserError

CHUNK, FUTURE = 5, 3
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def lanes(chunks: Sequence[int], number: int, epoch: int = 0, **options: Any) -> list[list[int]]:
    """The chunks of each lane, one after another."""
    sampler = LaneSampler(np.array(chunks), number, **options)
    sampler.set_epoch(epoch)
    draws = list(sampler)
    assert len(draws) == len(sampler)
    assert {draw.epoch for draw in draws} <= {epoch}
    return [list(lane) for lane in zip(*(draw.positions for draw in draws), strict=True)]


@given(chunks=lengths, number=st.integers(1, 6), epoch=st.integers(0, 3))
def test_every_chunk_is_dealt_once_and_streams_are_never_torn(chunks: list[int], number: int, epoch: int) -> None:
    dealt = lanes(chunks, number, epoch)
    assert len(dealt) == number
    real = [[position for position in lane if position != PADDING] for lane in dealt]
    assert sorted(position for lane in real for position in lane) == list(range(sum(chunks)))
    for lane, own in zip(dealt, real, strict=True):
        assert lane[: len(own)] == own  # padding comes last
        streams, numbers = locate(np.array(chunks), own) if own else (np.array([]), np.array([]))
        for place in range(1, len(own)):
            goes_on = streams[place] == streams[place - 1]
            assert numbers[place] == (numbers[place - 1] + 1 if goes_on else 0)
        if own:
            assert numbers[0] == 0


@given(chunks=lengths, number=st.sampled_from([2, 4, 6]))
def test_processes_share_the_lanes_of_one_and_epochs_have_one_length(chunks: list[int], number: int) -> None:
    whole = lanes(chunks, number)
    shares = [lanes(chunks, number, rank=rank, world_size=2) for rank in (0, 1)]
    assert whole[::2] == shares[0]
    assert whole[1::2] == shares[1]
    assert {len(lanes(chunks, number, epoch)[0]) for epoch in range(4)} == {len(whole[0])}


def test_lanes_end_together_as_nearly_as_whole_streams_allow() -> None:
    assert len(lanes([7, 5, 4, 3, 3, 2], 2)[0]) == 12
    assert len(lanes([1] * 10, 3)[0]) == 4


def test_order_changes_with_the_epoch_and_goes_on_from_the_middle() -> None:
    chunks = [4] * 8
    assert lanes(chunks, 2, 0) != lanes(chunks, 2, 1)
    assert lanes(chunks, 2, 0) != lanes(chunks, 2, 0, seed=1)
    rest = LaneSampler(np.array(chunks), 2, begin_at=lambda: (1, 6))
    assert [draw.positions for draw in rest] == list(zip(*(lane[6:] for lane in lanes(chunks, 2, 1)), strict=True))


def whole(streams: Streams, stream: int, epoch: int = 0) -> tuple[torch.Tensor, list[Batch]]:
    """The frames of a stream put together from its chunks, L C H W, and the chunks."""
    first = int(streams.chunks[:stream].sum())
    batches = [streams[Draw(epoch, (first + number,))] for number in range(streams.chunks[stream])]
    return torch.cat([batch.past[0] for batch in batches] + [batches[-1].future[0]]), batches


def radar(archive: str, **options: Any) -> RadarData:
    data = RadarData(archive, past=2, future=FUTURE, batch_size=2, workers=0, seed=3, split=[1.0, 0, 0], **options)
    data.setup()
    return data


def test_chunks_of_a_run_follow_each_other_and_none_crosses_a_gap(write_archive: WriteArchive) -> None:
    gone = np.r_[0:31, 40:44, 50:67]  # runs of 31, 4 and 17 frames: 5, no and 2 whole chunks with what follows them
    path = write_archive(times=every(70)[gone], numbers=labelled(70, 12, 14)[gone])
    streams = radar(path).streams(CHUNK, length=17)
    assert streams.chunks.tolist() == [3, 2, 2]
    numbers = torch.from_numpy(labelled(70, 12, 14))
    begins = set()
    for epoch in range(6):
        ends = []
        for stream in range(3):
            frames, batches = whole(streams, stream, epoch)
            start = next(t for t in range(70) if torch.equal(numbers[t], frames[0, 0]))
            assert torch.equal(frames[:, 0], numbers[start : start + len(frames)])
            assert [batch.first.item() for batch in batches] == [True] + [False] * (len(batches) - 1)
            issued = [(batch.time.item() - every(1)[0]) // CADENCE for batch in batches]
            assert issued == [start + CHUNK * (number + 1) - 1 for number in range(len(batches))]
            for batch, after in pairwise(batches):
                assert torch.equal(batch.future[0], after.past[0, :FUTURE])
            ends.append((start, start + len(frames)))
        assert ends[1][0] == ends[0][0] + 3 * CHUNK  # the second stream goes on in the first one's run
        assert ends[1][1] <= 31
        assert ends[2][0] >= 50
        begins.add(ends[0][0])
    assert begins > {0}  # what is left over lies at either end


def test_a_lane_sees_one_crop_along_a_stream(write_archive: WriteArchive) -> None:
    streams = radar(write_archive(times=every(40)), crop=6, crop_draws=3).streams(CHUNK, length=None)
    numbers = torch.from_numpy(labelled(40, 12, 14))
    for epoch in range(3):
        frames, _ = whole(streams, 0, epoch)
        places = [
            (t, y, x) for t in range(5) for y in range(7) for x in range(9)
            if torch.equal(numbers[t, y : y + 6, x : x + 6], frames[0, 0])
        ]  # fmt: skip
        assert any(torch.equal(numbers[t : t + len(frames), y : y + 6, x : x + 6], frames[:, 0]) for t, y, x in places)


def test_digits_go_on_and_padding_counts_for_nothing() -> None:
    data = MovingDigitsData(past=4, future=FUTURE, size=24, digit_size=8, train=3, validation=1, test=1)
    data.setup()
    streams = data.streams(CHUNK, length=16)
    made: Any = data.windows("train")
    assert streams.chunks.tolist() == [3, 3, 3]
    for epoch in (0, 1):
        frames, _ = whole(streams, 1, epoch)
        assert np.array_equal(frames[:, 0].numpy(), made.sequences(np.array([1]), epoch, 3 * CHUNK + FUTURE)[0])
    batch = streams[Draw(0, (4, PADDING))]
    assert batch.first.tolist() == [False, True]
    assert batch.block.tolist() == [1, -1]


def test_streams_that_are_too_short_are_told(write_archive: WriteArchive) -> None:
    with pytest.raises(UserError, match=r"without a gap in the train split has 30, but .* 43"):
        radar(write_archive()).streams(40, length=None)


def test_loader_deals_streams_once_it_is_told(write_archive: WriteArchive) -> None:
    data = radar(write_archive(times=every(43)))
    data.train_along_streams(CHUNK, 10)
    batches = list(data.train_dataloader())
    assert [batch.past.shape[1] for batch in batches] == [CHUNK] * 4
    assert [batch.first.tolist() for batch in batches] == [[True, True], [False, False]] * 2
