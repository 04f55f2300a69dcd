"""No window over a gap, no frame in two splits, no storm on both sides of a border."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import CADENCE, START, every
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from datamodules.frames import SPLITS
from datamodules.windows import (
    EVENT_PAUSE,
    HOUR,
    Interval,
    cadence_of,
    index_windows,
    split_times,
    window_starts,
)
from forecast.errors import UserError

Times = NDArray[np.int64]


@st.composite
def gappy(draw: st.DrawFn) -> Times:
    """Runs of frames with gaps of minutes to days between them; most neighbours are one cadence apart."""
    runs = draw(st.lists(st.tuples(st.integers(3, 60), st.integers(2, 400)), min_size=1, max_size=6))
    start = START + draw(st.integers(0, 200)) * CADENCE
    times = []
    for frames, gap in runs:
        times.append(start + CADENCE * np.arange(frames))
        start += CADENCE * (frames - 1 + gap)
    return np.concatenate(times)


lengths = st.integers(1, 14)


@given(times=gappy(), length=lengths)
def test_every_window_without_a_gap_is_indexed_once_and_no_other(times: Times, length: int) -> None:
    whole = [i for i in range(len(times) - length + 1) if times[i + length - 1] - times[i] == (length - 1) * CADENCE]
    assert window_starts(times, CADENCE, length).tolist() == whole


@given(times=gappy(), length=lengths, stride=st.integers(1, 9))
def test_a_stride_counts_from_the_start_of_each_run(times: Times, length: int, stride: int) -> None:
    starts = window_starts(times, CADENCE, length, stride)
    runs = np.cumsum(np.diff(times, prepend=times[0]) > CADENCE)
    place = np.arange(len(times)) - np.searchsorted(runs, runs)
    assert (place[starts] % stride == 0).all()
    assert set(starts) == {i for i in window_starts(times, CADENCE, length) if place[i] % stride == 0}


@given(archives=st.lists(gappy(), min_size=1, max_size=3), guard=st.integers(6, 12))
def test_splits_of_all_archives_keep_the_guard_and_the_order(archives: list[Times], guard: int) -> None:
    times = np.concatenate(archives)
    intervals = split_times(times, [0.6, 0.2, 0.2], guard)
    frames = {name: np.unique(times[(times >= a) & (times < b)]) for name, (a, b) in intervals.items()}
    filled = [frames[name] for name in SPLITS if name in frames and len(frames[name])]
    for earlier, later in pairwise(filled):
        assert later[0] - earlier[-1] >= guard * HOUR


@given(archives=st.lists(gappy(), min_size=1, max_size=3), length=lengths, stride=st.integers(1, 5))
def test_windows_lie_in_their_split_and_events_are_parted_by_pauses(
    archives: list[Times], length: int, stride: int
) -> None:
    for within in split_times(np.concatenate(archives), [0.6, 0.2, 0.2], 6).values():
        index = index_windows(archives, CADENCE, length, stride, within)
        spans = [archives[a][s : s + length] for a, s in zip(index.archive, index.start, strict=True)]
        assert all(within.start <= span[0] and span[-1] < within.end for span in spans)
        pairs = list(zip(index.archive.tolist(), index.start.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)

        assert sorted(set(index.block.tolist())) == list(range(index.blocks))
        covered = np.unique(np.concatenate([*spans, np.empty(0, dtype=np.int64)]))
        event = np.cumsum(np.diff(covered, prepend=covered[:1]) >= EVENT_PAUSE)
        expected = [int(event[np.searchsorted(covered, span[0])]) for span in spans]
        assert index.block.tolist() == expected


def test_shares_are_of_frames_not_of_time() -> None:
    """Three weeks without a frame must not become the training set."""
    times = np.concatenate([every(500), every(500, START + 21 * 24 * HOUR)])
    intervals = split_times(times, [0.5, 0.25, 0.25], 6)
    counts = [int(((times >= a) & (times < b)).sum()) for a, b in intervals.values()]
    assert counts == [
        500,
        232,
        232,
    ]  # the gap is guard enough; the other border costs 3 h of 10-min frames on each side


def test_a_frame_seen_by_two_radars_counts_once() -> None:
    one, two = every(600), every(300)
    assert split_times(np.concatenate([one, two]), [0.5, 0.25, 0.25], 6) == split_times(one, [0.5, 0.25, 0.25], 6)


def test_explicit_dates_are_utc_with_exclusive_ends_in_any_order() -> None:
    dates = {
        "train": ["2025-02-28", "2025-03-02T12:00"],
        "test": ["2025-02-27", "2025-02-27T18:00Z"],
        "validation": ["2025-03-02T20:00+02:00", "2025-03-03"],
    }
    intervals = split_times(every(10), dates, 6)
    assert intervals["test"] == Interval(START, START + 18 * HOUR)
    assert intervals["train"] == Interval(START + 24 * HOUR, START + (3 * 24 + 12) * HOUR)
    assert intervals["validation"].start == START + (3 * 24 + 18) * HOUR
    assert list(split_times(every(10), {"test": ["2025-02-27", "2025-02-28"]}, 6)) == ["test"]
    assert list(split_times(every(10), [0, 0, 1], 6)) == ["test"]


@pytest.mark.parametrize(
    ("split", "guard", "message"),
    [
        ([0.7, 0.15, 0.15], 5.5, "data.guard_hours is 5.5; it must be at least 6"),
        ([0.7, 0.2, 0.2], 6, "add up to 1"),
        ([0.7, 0.3], 6, "data.split is .0.7, 0.3."),
        ([1.2, -0.1, -0.1], 6, "add up to 1"),
        ({"training": ["2025-01-01", "2025-02-01"]}, 6, "names .'training'.; name some of train, validation, test"),
        ({"train": ["2025-01-01"]}, 6, "give its start and its end as two ISO dates"),
        ({"train": ["2025-01-01", "yesterday"]}, 6, "two ISO dates"),
        ({"train": ["2025-02-01", "2025-01-01"]}, 6, "not after its start"),
        (
            {"train": ["2025-01-01", "2025-02-02"], "test": ["2025-02-01", "2025-03-01"]},
            6,
            "train and test overlap by 24 h; let test start at 2025-02-02 06:00:00 or later",
        ),
        (
            {"train": ["2025-01-01", "2025-02-01"], "validation": ["2025-02-01T03:00", "2025-03-01"]},
            6,
            "train and validation are 3 h apart; let validation start at 2025-02-01 06:00:00 or later",
        ),
    ],
)
def test_splits_that_leak_or_make_no_sense_are_refused(split: object, guard: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_times(every(10), split, guard)  # type: ignore[arg-type]


def test_the_cadence_is_the_most_common_step() -> None:
    assert cadence_of(np.array([0, 600, 1200, 1800, 5000, 5600])) == 600


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0], "has 1 frames; at least two"),
        ([0, 600, 600, 1200], "two frames have the same time: frame 1 is at 1970-01-01 00:10:00 and frame 2"),
        (
            [0, 600, 1200, 900],
            "times go backwards: frame 2 is at 1970-01-01 00:20:00 and frame 3 at 1970-01-01 00:15:00",
        ),
        ([0, 600, 1200, 1800, 2100, 2400], "most frames are 600 s apart, but 1970-01-01 00:30:00 and .* only 300 s"),
    ],
)
def test_times_in_disorder_are_refused(times: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cadence_of(np.array(times, dtype=np.int64))
