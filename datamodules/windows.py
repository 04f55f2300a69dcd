"""Which frames make a window, which windows make a split, which belong to one rain event, and which frames leak.

Numbers only, no files.

Times are int64 seconds UTC. A run is a stretch of frames one cadence apart; a gap ends it, and no window crosses a gap.
The splits are blocks of absolute time across all archives together, with a guard between them, so that two radars
that saw the same storm put it into the same split.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.frames import SPLITS, Split
from forecast.errors import UserError

Times = NDArray[np.int64]

HOUR = 3600
LEAST_GUARD_HOURS = 6
"""Below it, one storm would be on both sides of a border: it would be learnt and then scored."""
EVENT_PAUSE = 6 * HOUR
"""Seconds without a rainy frame in any archive that part two rain events."""
RAINY = 0.01
"""Wet share from which on a frame is rainy; with less there is an echo somewhere in almost any weather."""


class Interval(NamedTuple):
    """A stretch of time: seconds UTC, `end` exclusive."""

    start: int
    end: int


def utc(seconds: int) -> str:
    """Seconds UTC, written for people."""
    return str(np.datetime64(int(seconds), "s")).replace("T", " ")


def cadence_of(times: Times) -> int:
    """The most common difference in time between neighbouring frames, in seconds.

    Larger differences are gaps.

    Raises:
        UserError: fewer than two frames, times that do not ascend, or differences smaller than the cadence.
    """
    if len(times) < 2:
        raise UserError(f"The archive has {len(times)} frames; at least two are needed to know the time between them.")
    steps = np.diff(times)
    for wrong, what in ((steps == 0, "two frames have the same time"), (steps < 0, "times go backwards")):
        if wrong.any():
            first = int(np.argmax(wrong))
            raise UserError(
                f"In the archive {what}: frame {first} is at {utc(times[first])} and frame {first + 1} at "
                f"{utc(times[first + 1])}; sort the archive by time and keep one frame of each."
            )
    values, counts = np.unique(steps, return_counts=True)
    cadence = int(values[np.argmax(counts)])
    if values[0] < cadence:
        first = int(np.argmax(steps < cadence))
        raise UserError(
            f"The archive mixes time steps: most frames are {cadence} s apart, but {utc(times[first])} and "
            f"{utc(times[first + 1])} only {steps[first]} s; keep the frames of one step, and round times that jitter."
        )
    return cadence


def runs_of(times: Times, cadence: int) -> list[tuple[int, int]]:
    """The first frame of each run, and the one after its last."""
    borders = np.flatnonzero(np.diff(times) != cadence) + 1
    return list(pairwise([0, *borders.tolist(), len(times)]))


def window_starts(times: Times, cadence: int, length: int, stride: int = 1) -> NDArray[np.int64]:
    """Where the windows of `length` consecutive frames begin: every `stride` frames from the start of each run."""
    runs = runs_of(times, cadence)
    return np.concatenate([np.arange(first, last - length + 1, stride, dtype=np.int64) for first, last in runs])


def split_times(
    times: Times, split: Sequence[float] | Mapping[str, Sequence[str]], guard_hours: float
) -> dict[Split, Interval]:
    """The stretch of time that each split covers; one without a share is absent.

    Args:
        times: of every archive of the run, in any order and with repetitions.
        split: the shares of train, validation and test, in this order in time; or the start and the (exclusive) end
            of each, as ISO dates in UTC.
        guard_hours: least time between a frame of one split and a frame of another.

    Raises:
        UserError: a guard that is too short, shares that do not add up, dates that overlap or come too close.
    """
    if guard_hours < LEAST_GUARD_HOURS:
        raise UserError(
            f"data.guard_hours is {guard_hours}; it must be at least {LEAST_GUARD_HOURS}, so that no storm lies in two "
            "splits."
        )
    guard = int(np.ceil(guard_hours * HOUR))
    return _by_dates(split, guard) if isinstance(split, Mapping) else _by_shares(np.unique(times), split, guard)


def _by_shares(times: Times, shares: Sequence[float], guard: int) -> dict[Split, Interval]:
    """Cut so that each split gets its share of the distinct times: gaps count for nothing, however long they are."""
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(
            f"data.split is {list(shares)}; give the shares of {', '.join(SPLITS)}, which add up to 1 (as in "
            "[0.7, 0.15, 0.15]), or the dates of each."
        )
    bounds = np.rint(np.cumsum([0.0, *shares]) * len(times)).astype(int).tolist()
    intervals: dict[Split, Interval] = {}
    for name, share, (first, last) in zip(SPLITS, shares, pairwise(bounds), strict=True):
        if share == 0:
            continue
        if first == last:  # so few frames that the share rounds to none; whoever asks for windows will say so
            intervals[name] = Interval(0, 0)
            continue
        start, end = int(times[first]), int(times[last - 1]) + 1
        # Half of the guard is taken from either side of the cut's middle: where the cut falls into a gap, nothing is.
        if first > 0:
            start = _middle(times, first) + -(-guard // 2)
        if last < len(times):
            end = _middle(times, last) - guard // 2
        intervals[name] = Interval(start, end)
    return intervals


def _middle(times: Times, cut: int) -> int:
    return int(times[cut - 1] + times[cut]) // 2


def _by_dates(dates: Mapping[str, Sequence[str]], guard: int) -> dict[Split, Interval]:
    unknown = sorted(set(dates) - set(SPLITS))
    if unknown or not dates:
        raise UserError(f"data.split names {unknown or 'nothing'}; name some of {', '.join(SPLITS)}.")
    intervals = {name: _interval(name, dates[name]) for name in SPLITS if name in dates}
    ordered = sorted(intervals, key=lambda name: intervals[name])
    for earlier, later in pairwise(ordered):
        distance = intervals[later].start - intervals[earlier].end
        if distance < guard:
            gap = f"overlap by {-distance / HOUR:g} h" if distance < 0 else f"are {distance / HOUR:g} h apart"
            raise UserError(
                f"data.split: {earlier} and {later} {gap}; let {later} start at "
                f"{utc(intervals[earlier].end + guard)} or later, so that {guard / HOUR:g} h lie between them."
            )
    return intervals


def _interval(name: str, dates: Sequence[str]) -> Interval:
    try:
        start, end = (datetime.fromisoformat(str(date)) for date in dates)
    except ValueError:
        raise UserError(
            f"data.split.{name} is {dates!r}; give its start and its end as two ISO dates, such as "
            "[2025-03-01, 2025-03-21T12:00]."
        ) from None
    seconds = [int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()) for date in (start, end)]
    if seconds[0] >= seconds[1]:
        raise UserError(f"data.split.{name} ends at {end}, which is not after its start {start}; exchange the two.")
    return Interval(*seconds)


class WindowIndex(NamedTuple):
    """The windows of one split, N of them, in the order of their times and then of the archives."""

    archive: NDArray[np.int64]
    """N: which archive."""
    start: NDArray[np.int64]
    """N: its first frame there."""
    block: NDArray[np.int64]
    """N: its rain event, 0 .. blocks-1, in the order of time."""
    blocks: int


def event_borders(rainy: Times) -> Times:
    """Where one rain event ends and the next begins: the middle of each pause of `EVENT_PAUSE` or more.

    So every moment belongs to one event, and between the rain of two events lie 6 dry hours at least. A frame that is
    missing does not rain.

    Args:
        rainy: times of the rainy frames of all archives, in any order and with repetitions.
    """
    times = np.unique(rainy)
    ends = np.flatnonzero(np.diff(times) >= EVENT_PAUSE)
    return times[ends] + (times[ends + 1] - times[ends]) // 2


def index_windows(
    archives: Sequence[Times], cadence: int, past: int, future: int, stride: int, within: Interval, borders: Times
) -> WindowIndex:
    """The windows whose every frame lies `within`, in all archives.

    A window belongs to the rain event of its issue time, that of its last past frame, in whichever archive it is. The
    events that have windows are numbered.

    Args:
        archives: the times of each.
        cadence: seconds between frames.
        past, future: frames of a window.
        stride: frames between the starts of windows.
        within: the split.
        borders: between events, as `event_borders` gives them.
    """
    archive, start, issue = [], [], []
    for number, times in enumerate(archives):
        first, last = np.searchsorted(times, within)
        starts = first + window_starts(times[first:last], cadence, past + future, stride)
        archive.append(np.full(len(starts), number, dtype=np.int64))
        start.append(starts)
        issue.append(times[starts + past - 1])
    issues = np.concatenate(issue)
    order = np.argsort(issues, kind="stable")
    events, block = np.unique(np.searchsorted(borders, issues[order], side="right"), return_inverse=True)
    return WindowIndex(
        np.concatenate(archive)[order], np.concatenate(start)[order], block.astype(np.int64), len(events)
    )


class RunIndex(NamedTuple):
    """The runs of one split, N of them, archive by archive."""

    archive: NDArray[np.int64]
    """N: which archive."""
    start: NDArray[np.int64]
    """N: its first frame there."""
    frames: NDArray[np.int64]
    """N: how many it has."""


def index_runs(archives: Sequence[Times], cadence: int, within: Interval) -> RunIndex:
    """The runs whose every frame lies `within`, in all archives.

    Args:
        archives: the times of each.
        cadence: seconds between frames.
        within: the split.
    """
    runs = []
    for number, times in enumerate(archives):
        begin, end = np.searchsorted(times, within)
        runs += [(number, begin + first, last - first) for first, last in runs_of(times[begin:end], cadence)]
    return RunIndex(*np.array(runs, dtype=np.int64).reshape(-1, 3).T)


class Place(NamedTuple):
    """Where a frame is dealt."""

    split: Split
    archive: int
    frame: int


def repeated_frames(
    dealt: Mapping[Split, Sequence[NDArray[np.int64]]], digests: Sequence[NDArray[np.uint64]]
) -> list[tuple[Place, ...]]:
    """Frames that are dealt in several splits, under different times: what is tested on has been trained on.

    Args:
        dealt: of each split and each archive, the frames in its windows that are not dry: dry ones are often the same.
        digests: of each archive's frames; equal for equal frames.

    Returns:
        For each such frame, the first place in each split that has it.
    """
    first: dict[int, dict[Split, Place]] = {}
    for split, frames in dealt.items():
        for number, own in enumerate(frames):
            for frame, digest in zip(own.tolist(), digests[number][own].tolist(), strict=True):
                first.setdefault(digest, {}).setdefault(split, Place(split, number, frame))
    return [tuple(places.values()) for places in first.values() if len(places) > 1]
