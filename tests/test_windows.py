"""No window over a gap, no frame in two splits, no storm on both sides of a border, no event without a dry pause."""

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
    Place,
    cadence_of,
    event_borders,
    index_windows,
    repeated_frames,
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


@st.composite
def rainy(draw: st.DrawFn) -> list[tuple[Times, Times]]:
    """Some archives: the times of each, and of its frames with rain, which fall in bursts."""
    archives = draw(st.lists(gappy(), min_size=1, max_size=3))
    pause = st.integers(34, 38) | st.integers(2, 200)  # frames; 36 are six hours
    wet, start = [np.empty(0, dtype=np.int64)], START
    for frames, gap in draw(st.lists(st.tuples(st.integers(1, 30), pause), max_size=12)):
        wet.append(start + CADENCE * np.arange(frames))
        start += CADENCE * (frames - 1 + gap)
    return [(times, np.intersect1d(times, np.concatenate(wet))) for times in archives]


@given(archives=rainy())
def test_events_are_parted_by_six_dry_hours_and_hold_no_such_pause(archives: list[tuple[Times, Times]]) -> None:
    wet = sorted({int(time) for _, own in archives for time in own})
    borders = event_borders(np.concatenate([own for _, own in archives])).tolist()
    parted = [(one, next_) for one, next_ in pairwise(wet) if any(one < border <= next_ for border in borders)]
    assert parted == [(one, next_) for one, next_ in pairwise(wet) if next_ - one >= EVENT_PAUSE]
    assert borders == [(one + next_) // 2 for one, next_ in parted]


def test_six_dry_hours_are_cut_in_the_middle_and_the_issue_time_decides() -> None:
    times = every(60)
    borders = event_borders(times[[0, 36]])
    assert borders.tolist() == [times[18]]
    assert event_borders(times[[0, 35]]).tolist() == []
    index = index_windows([times], CADENCE, 3, 5, 1, Interval(START, START + 60 * CADENCE), borders)
    assert index.start[index.block == 1].tolist() == list(range(16, 53))
    assert index.blocks == 2


@given(archives=rainy(), past=lengths, future=lengths, stride=st.integers(1, 5))
def test_a_window_lies_in_its_split_and_in_the_event_of_its_issue_time(
    archives: list[tuple[Times, Times]], past: int, future: int, stride: int
) -> None:
    times = [own for own, _ in archives]
    borders = event_borders(np.concatenate([own for _, own in archives]))
    for within in split_times(np.concatenate(times), [0.6, 0.2, 0.2], 6).values():
        index = index_windows(times, CADENCE, past, future, stride, within, borders)
        spans = [times[a][s : s + past + future] for a, s in zip(index.archive, index.start, strict=True)]
        assert all(within.start <= span[0] and span[-1] < within.end for span in spans)
        pairs = list(zip(index.archive.tolist(), index.start.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)

        assert sorted(set(index.block.tolist())) == list(range(index.blocks))
        event = [sum(border <= span[past - 1] for border in borders) for span in spans]
        assert index.block.tolist() == [sorted(set(event)).index(each) for each in event]


@given(
    digests=st.lists(st.lists(st.integers(0, 12), min_size=9, max_size=9), min_size=1, max_size=3),
    cuts=st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted),
)
def test_a_frame_leaks_if_its_like_is_dealt_in_another_split(digests: list[list[int]], cuts: list[int]) -> None:
    bounds = dict(zip(SPLITS, pairwise([0, *cuts, 9]), strict=True))
    dealt = {split: [np.arange(first, last)] * len(digests) for split, (first, last) in bounds.items()}
    found = repeated_frames(dealt, [np.array(own, np.uint64) for own in digests])
    expected = []
    for digest in range(13):
        places = []
        for split, (first, last) in bounds.items():
            own = [(a, f) for a in range(len(digests)) for f in range(first, last) if digests[a][f] == digest]
            places += [Place(split, *own[0])] if own else []
        expected += [tuple(places)] if len(places) > 1 else []
    assert sorted(found) == sorted(expected)


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
