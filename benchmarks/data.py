"""What batches cost before they reach the network: moving digits beside OpenSTL's, radar windows beside xarray's. One core.

    python -m benchmarks.data                                  # our digits alone, and the windows: a minute
    python -m benchmarks.data --openstl CHECKOUT --mnist DIR   # the digits beside OpenSTL's, with MNIST's images

Prints tables, and writes them to benchmarks/results/data_<hardware>_<date>.md. Gated on equal frames: no time is told of
results that differ.

Axes: B batch, L frames, T time, H W space.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import count, islice
from os import environ
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch.utils.data import default_collate

from benchmarks.openstl import FUTURE, PAST, gate_digits, peer, theirs
from datamodules.moving_digits import MovingDigits, MovingDigitsData
from datamodules.moving_mnist import DIGIT, MovingMNISTData
from datamodules.radar import RadarData
from datamodules.reader import open_archive
from datamodules.sampler import BatchSampler, Draw
from forecast import provenance
from forecast.allocator import keep_freed_memory
from forecast.errors import UserError
from forecast.files import whole

TIMES = {"digits": 20, "windows": 10}  # as fast as the others, or faster: that is promised
BATCH = 16
RADAR: Mapping[str, Any] = {
    "past": 6,
    "future": 6,
    "batch_size": 8,
    "workers": 0,
    "seed": 0,
    "thresholds": [10.0],
}


class Size(NamedTuple):
    """Of what is run."""

    rounds: int = 11
    """In which the ways take turns, so that what disturbs one disturbs all."""
    sequences: int = 10_000
    """Of moving digits that we make in a round; we decode a tenth, and OpenSTL makes a fiftieth."""
    frames: int = 2_000
    """Of the archives, T."""
    side: int = 256
    """Of a frame, H = W."""
    crop: int = 96
    windows: int = 80
    """That we cut in a round; xarray cuts an eighth."""


class Format(NamedTuple):
    """How an archive is written."""

    name: str
    suffix: str
    encoding: Mapping[str, Any]


FORMATS = (
    Format("NetCDF, frame by frame, deflated", "nc", {"zlib": True, "complevel": 4, "chunksizes": (1, None, None)}),
    Format("NetCDF, as xarray writes it", "nc", {}),
    Format("Zarr, as xarray writes it", "zarr", {}),
)

Job = tuple[Callable[[], object], int]
"""What is run in a turn, and how many samples it gives."""


def taken(jobs: Mapping[str, Job], rounds: int) -> dict[str, NDArray[np.float64]]:
    """Microseconds a sample of each job, in each round."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, (job, samples) in jobs.items():
            began = perf_counter()
            job()
            if number:  # the first round warms up
                found[name].append((perf_counter() - began) / samples * 1e6)
    return {name: np.array(seconds) for name, seconds in found.items()}


def spread(values: NDArray[np.float64]) -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def digits(size: Size, mnist: Path | None, checkout: Path | None) -> str:
    """The section on moving digits."""
    shared: dict[str, Any] = {"past": PAST, "future": FUTURE, "batch_size": BATCH, "train": size.sequences}
    data = (
        MovingDigitsData(**shared, size=64, digit_size=DIGIT, speed=(3.6, 3.6))
        if mnist is None
        else MovingMNISTData(**shared, root=str(mnist), download=False)
    )
    data.setup()
    windows = data.windows("train")
    assert isinstance(windows, MovingDigits)
    module = None if checkout is None else peer(checkout)
    epochs = count()
    tenth = max(1, size.sequences // 10 // BATCH)

    def packed() -> None:
        for draw in epoch():
            windows[draw]

    def epoch() -> Iterator[Draw]:
        sampler = BatchSampler(len(windows), BATCH, shuffle=True)
        sampler.set_epoch(next(epochs))
        return iter(sampler)

    def decoded() -> None:
        for draw in islice(epoch(), tenth):
            data.on_after_batch_transfer(windows[draw], 0)

    jobs: dict[str, Job] = {
        "ours, uint8": (packed, size.sequences),
        "ours, decoded on the CPU": (decoded, tenth * BATCH),
    }
    with TemporaryDirectory() as folder:
        dataset = None if module is None else theirs(module, windows.images, Path(folder))
        gate_digits(windows, module, dataset)
        if dataset is not None:
            batches = max(1, size.sequences // 50 // BATCH)

            def stacked() -> None:
                for batch in range(batches):
                    default_collate([dataset[batch * BATCH + i] for i in range(BATCH)])

            jobs["OpenSTL"] = (stacked, batches * BATCH)
        found = taken(jobs, size.rounds)
    titles = ["microseconds a sequence", "median (quartiles)"]
    rows = [[name, spread(values)] for name, values in found.items()]
    told = (
        f"Sequences of {PAST} + {FUTURE} frames of 64 x 64 pixels, {windows.digits} digits of {DIGIT} x {DIGIT} "
        f"({len(windows.images)} images of {'scikit-learn' if mnist is None else 'MNIST'}), in batches of {BATCH}: an "
        f"epoch of {size.sequences:,} in each round, what is drawn for them included. "
    )
    if checkout is not None:
        titles.append("times as fast as OpenSTL in the same round")
        for row, values in zip(rows, found.values(), strict=True):
            row.append(spread(found["OpenSTL"] / values))
        kept = float(np.median(found["OpenSTL"] / found["ours, uint8"])) >= TIMES["digits"]
        commit = provenance.commit(checkout)
        told += (
            f"OpenSTL ({commit[:9] if commit else 'of unknown commit'}) makes one sequence at a time, as floats, and its "
            f"loader stacks them; both are timed. {TIMES['digits']} times as fast is promised: {_verdict(kept)}. With "
            "the same digits going the same ways, its frames are ours, bit by bit; what our batch costs when it is "
            "decoded to floats on the CPU is told too. "
        )
    told += "The frames are those of a plain loop, with the draws of NumPy's own generators."
    return "\n\n".join(["## Moving digits", told, _table(titles, rows)])


def write_archive(path: Path, size: Size, encoding: Mapping[str, Any]) -> None:
    """Smooth echoes that drift and change, as packed int16 with a rim that is missing: T H W."""
    generator = np.random.default_rng(0)
    y, x = np.fft.fftfreq(size.side)[:, None], np.fft.rfftfreq(size.side)[None]
    waves = 40 * np.exp(-800 * (y**2 + x**2)) * np.fft.rfft2(generator.standard_normal((size.side, size.side)))
    turn = 0.5 * y + x + 0.01 * generator.standard_normal(waves.shape)  # of each wave, between frames
    frames = np.empty((size.frames, size.side, size.side), np.int16)
    for t, frame in enumerate(frames):
        field = np.fft.irfft2(waves * np.exp(-2j * np.pi * t * turn), s=frame.shape)
        frame[:] = np.clip(np.rint(700 * field + 1000), -1000, 6000)
        frame[:2] = -9999
    attributes = {"standard_name": "equivalent_reflectivity_factor", "units": "dBZ"}
    packing = {"scale_factor": np.float32(0.01), "add_offset": np.float32(0), "_FillValue": np.int16(-9999)}
    degrees = {"y": ("latitude", "degrees_north"), "x": ("longitude", "degrees_east")}
    dataset = xr.Dataset({"dbz": (("time", "y", "x"), frames, attributes | packing | {"grid_mapping": "crs"})})
    time = 1_740_614_400 + 600 * np.arange(size.frames)
    dataset["time"] = ("time", time, {"standard_name": "time", "units": "seconds since 1970-01-01"})
    for dim, (name, units) in degrees.items():
        dataset[dim] = (dim, 45 + 0.01 * np.arange(size.side), {"standard_name": name, "units": units})
    dataset["crs"] = ((), np.int32(0), {"grid_mapping_name": "latitude_longitude"})
    chunks = {"chunksizes": (1, size.side, size.side)} if "chunksizes" in encoding else {}
    given = {"dbz": {**encoding, **chunks}}
    if path.suffix == ".zarr":
        dataset.to_zarr(path, encoding=given, zarr_format=3, consolidated=False)
    else:
        dataset.to_netcdf(path, encoding=given, engine="netcdf4")


class Cut(NamedTuple):
    """A way to get a window, by its position among those of the training split."""

    data: RadarData
    stored: xr.Dataset
    frames: NDArray[Any]
    """All of them, in memory, T H W."""

    def ours(self, positions: Sequence[int]) -> Any:
        """As the loader gives it."""
        return self.data.windows("train")[Draw(0, tuple(positions))]

    def naive(self, position: int) -> NDArray[Any]:
        """Read by xarray."""
        span, rows, columns = self._part(position)
        values: NDArray[Any] = self.stored["dbz"].isel(time=span, y=rows, x=columns).load().values
        return values

    def copied(self, positions: Sequence[int]) -> NDArray[Any]:
        """From the array."""
        windows = self.data.windows("train")
        batch = np.empty((len(positions), windows.past + windows.future, *windows.size), self.frames.dtype)
        for place, position in zip(batch, positions, strict=True):
            np.copyto(place, self.frames[self._part(position)])
        return batch

    def _part(self, position: int) -> tuple[slice, slice, slice]:
        windows = self.data.windows("train")
        start = int(windows.index.start[position])
        return slice(start, start + windows.past + windows.future), *windows.places(0, position)[0]


def gate_windows(cut: Cut, positions: Sequence[int]) -> None:
    """Our windows are the copied ones; decoded they have xarray's values, and are missing where xarray's are.

    Raises:
        UserError: they are not.
    """
    batch = cut.ours(positions)
    packed = torch.cat([batch.past, batch.future], dim=1)[:, :, 0]
    same = np.array_equal(packed.numpy(), cut.copied(positions))
    values, valid = cut.data.quantity.decode(packed)
    for own, known, position in zip(values.numpy(), valid.numpy(), positions, strict=True):
        expected = cut.naive(position)
        same &= np.array_equal(known, np.isfinite(expected))
        if not same or not np.allclose(own, np.fmax(expected, cut.data.quantity.floor), rtol=0, atol=1e-5):
            raise UserError(f"Window {position} differs from xarray's; no time is told of it: mend it first.")


def radar(size: Size) -> str:
    """The section on radar windows."""
    rows = []
    kept = True
    for form in FORMATS:
        with TemporaryDirectory() as name, patch.dict(environ, {"STORMCELL_CACHE": f"{name}/cache"}):
            path = Path(name) / f"radar.{form.suffix}"
            write_archive(path, size, form.encoding)
            frames = open_archive(str(path)).read(slice(0, size.frames))
            for crop in (None, size.crop):
                data = RadarData(str(path), **RADAR, crop=crop)
                data.setup()
                began = perf_counter()
                data.setup("fit")
                once = perf_counter() - began
                engine: Any = (
                    {"engine": "zarr", "consolidated": False} if form.suffix == "zarr" else {"engine": "netcdf4"}
                )
                with xr.open_dataset(path, **engine) as stored:
                    cut = Cut(data, stored, frames)
                    order = np.random.default_rng(1).permutation(len(data.windows("train"))).tolist()
                    gate_windows(cut, order[:3])
                    began = perf_counter()
                    for first in range(0, len(order), data.batch_size):
                        cut.ours(order[first : first + data.batch_size])
                    epoch = (perf_counter() - began) / len(order) * 1e3
                    found = taken(_ways(cut, order, size), size.rounds)
                ratio = found["naive"] / found["ours"]
                kept &= float(np.median(ratio)) >= TIMES["windows"]
                cells = [spread(found[way] / 1000) for way in ("ours", "copied", "ours, decoded", "naive")]
                shown = "whole" if crop is None else f"{crop} x {crop}"
                cells += [spread(ratio), f"{epoch:.3g}", "" if crop is not None else f"{once:.2g} s"]
                rows.append([form.name, shown, *cells])
    times = ["ours", "copied", "ours, decoded", "xarray", "times as fast as xarray", "ours, first epoch"]
    titles = ["archive", "window", *times, "unpacking, once"]
    told = (
        f"Windows of {RADAR['past']} + {RADAR['future']} frames from {size.frames:,} of {size.side} x {size.side} pixels, "
        "int16, in the order and at the places that training draws; milliseconds a window, median (quartiles). xarray: "
        "`isel(...).load()` of the same frames and pixels from a data set that stays open, which decodes them; its values "
        f"are ours. Ours: packed numbers in batches of {RADAR['batch_size']}, decoded on the device; what that costs on "
        "the CPU is told too. Copied: the same numbers into such batches from an array of all frames in memory, by NumPy, "
        "which reads no file: no way to make batches is faster. All files are in the memory of the operating system. "
        "In the first epoch a process looks at each part of the unpacked file for the first time, which may cost more: its "
        "mean is told apart. Unpacking takes place once for an archive, before that. "
        f"{TIMES['windows']} times as fast is promised: {_verdict(kept)}."
    )
    return "\n\n".join(["## Radar windows", told, _table(titles, rows)])


def _ways(cut: Cut, order: Sequence[int], size: Size) -> dict[str, Job]:
    batch = cut.data.batch_size
    turns = count()

    def batches() -> Iterator[Sequence[int]]:
        first = next(turns) * 7 % max(1, len(order) - size.windows)
        return (order[i : i + batch] for i in range(first, first + size.windows, batch))

    def ours() -> None:
        for positions in batches():
            cut.ours(positions)

    def copied() -> None:
        for positions in batches():
            cut.copied(positions)

    def decoded() -> None:
        for positions in batches():
            cut.data.on_after_batch_transfer(cut.ours(positions), 0)

    def naive() -> None:
        for positions in batches():
            cut.naive(positions[0])

    few = -(-size.windows // batch)
    jobs = {"ours": ours, "copied": copied, "ours, decoded": decoded}
    return {**{name: (job, size.windows) for name, job in jobs.items()}, "naive": (naive, few)}


def _verdict(kept: bool) -> str:
    return "kept" if kept else "**not kept**"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in titles[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows))


def main(arguments: Sequence[str] | None = None, size: Size | None = None) -> None:
    """The command; prints the tables and writes them to a file."""
    parser = argparse.ArgumentParser(description="What batches cost before they reach the network, on one core.")
    parser.add_argument("--openstl", type=Path, help="a checkout of OpenSTL, to make its moving digits beside ours")
    parser.add_argument(
        "--mnist", type=Path, help="folder with MNIST's images; default: scikit-learn's digits, enlarged"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/data_<hardware>_<date>.md")
    given = parser.parse_args(arguments)
    size = Size() if size is None else size
    hardware, today = provenance.hardware(), f"{datetime.now(UTC):%Y-%m-%d}"
    machine = ", ".join([hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"]])
    packages = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    command = shlex.join(["python", "-m", "benchmarks.data", *(sys.argv[1:] if arguments is None else arguments)])
    about = f"{machine}; {today}; {packages}, numpy {np.__version__}, xarray {xr.__version__}; `{command}`"
    keep_freed_memory()  # as train.py does
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sections = [digits(size, given.mnist, given.openstl), radar(size)]
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        torch.set_num_threads(threads)
    keeping = "As in train.py the process keeps freed memory for the next request, whatever the way."
    text = "\n\n".join(["# What batches cost", f"{about}; commit {provenance.commit()}", keeping, *sections])
    print(text)
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    with whole(given.out or Path(__file__).parent / "results" / f"data_{slug}_{today}.md") as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
