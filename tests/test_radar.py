"""Windows of radar are dealt the same whoever asks, leak nothing from split to split, and say what does not fit."""

import logging
import pickle
from collections.abc import Mapping
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import CADENCE, DBZ, DEGREES, RATE, START, WriteArchive, every, labelled, rain
from numpy.typing import NDArray
from omegaconf import OmegaConf
from rich.console import Console

from datamodules.radar import RadarData
from datamodules.sampler import PADDING, BatchSampler, Draw
from forecast.batch import Batch
from forecast.describe import table_of_splits
from forecast.errors import UserError
from forecast.units import Z_R_RELATIONS, Linear, Quantity

HOUR = 3600
LONG = every(400)  # enough for three splits with guards between them


def radar(archive: str | list[str] | None, **options: Any) -> RadarData:
    settings = {"past": 3, "future": 4, "batch_size": 5, "workers": 0, "seed": 0, **options}
    return RadarData(archive, **settings)


def assert_equal(one: Batch, other: Batch) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_a_batch_holds_the_frames_of_its_windows(write_archive: WriteArchive) -> None:
    path = write_archive(times=LONG, more={"height": (("y", "x"), labelled(1, 12, 14)[0] * 1.0, {})})
    data = radar(path, static=["height"])
    data.setup()
    windows = data.windows("train")
    assert windows is data.windows("train")
    batch = windows[Draw(0, (4, 0, PADDING))]
    numbers = torch.from_numpy(labelled(400, 12, 14))
    assert torch.equal(batch.past[0, :, 0], numbers[4:7])
    assert torch.equal(batch.future[0, :, 0], numbers[7:11])
    assert batch.past.shape == (3, 3, 1, 12, 14)
    assert batch.future.shape == (3, 4, 1, 12, 14)
    assert batch.time.tolist()[:2] == [START + 6 * CADENCE, START + 2 * CADENCE]
    assert batch.block.tolist() == [0, 0, -1]
    assert batch.time.dtype == batch.block.dtype == torch.int64
    assert batch.first.all()
    assert batch.static.shape == (3, 1, 12, 14)
    assert batch.static.dtype == torch.float32
    assert batch.static.mean().item() == pytest.approx(0, abs=1e-6)
    assert data.static_channels == 1
    assert data.cadence == CADENCE
    assert data.transform == Linear(low=-10.0, high=60.0)


def test_splits_share_no_frame_and_keep_the_guard_over_all_archives(write_archive: WriteArchive) -> None:
    gone = np.r_[0:100, 130:400]
    paths = [
        write_archive("one.nc", times=LONG[gone]),
        write_archive("two.zarr", times=every(300, START + 20 * HOUR), size=(9, 20)),
    ]
    data = radar(paths, crop=8, eval_crop=8, stride=1, eval_stride=1)
    data.setup()
    seen = {}
    for split in ("train", "validation", "test"):
        windows = data.windows(split)
        times = [
            windows.archives[a].times[s : s + 7]
            for a, s in zip(windows.index.archive, windows.index.start, strict=True)
        ]
        assert all((np.diff(each) == CADENCE).all() for each in times)
        assert set(windows.index.archive) == {0, 1}
        seen[split] = np.unique(times)
    assert seen["validation"].min() - seen["train"].max() >= 6 * HOUR
    assert seen["test"].min() - seen["validation"].max() >= 6 * HOUR


def test_each_frame_is_forecast_once_in_validation_and_test(write_archive: WriteArchive) -> None:
    data = radar(write_archive(times=LONG))
    windows = data.windows("test")
    starts = windows.index.start
    assert (np.diff(starts) == 4).all()


def test_of_several_places_drawn_the_wettest_is_cropped(write_archive: WriteArchive) -> None:
    numbers = labelled(400, 12, 14)
    data = radar(write_archive(times=LONG, numbers=numbers), crop=5, crop_draws=6)
    data.setup()
    train = data.windows("train")
    wet = (data.quantity.decode(torch.from_numpy(numbers))[0] >= 10).numpy()
    chosen = []
    for position in range(20):
        frames = slice(position, position + 7)
        places = train.places(2, position)
        shares = [int(wet[frames, *place].sum()) for place in places]
        rows, columns = places[chosen_place := int(np.argmax(shares))]
        chosen.append(chosen_place)
        batch = train[Draw(2, (position,))]
        dealt = torch.cat([batch.past, batch.future], dim=1)[0, :, 0]
        assert torch.equal(dealt, torch.from_numpy(numbers[frames, rows, columns]))
    assert len(places) == 6
    assert len(set(chosen)) > 1


def test_crops_are_random_in_training_and_central_elsewhere(write_archive: WriteArchive) -> None:
    path = write_archive(times=LONG)
    data = radar(path, crop=6, eval_crop=8)
    data.setup()
    train = data.windows("train")
    positions = tuple(range(20))
    assert_equal(train[Draw(3, positions)], train[Draw(3, positions)])
    assert_equal(train[Draw(3, (7,))], Batch(*(part[7:8] for part in train[Draw(3, positions)])))
    places = [train.places(epoch, position)[0] for epoch in range(9) for position in range(40)]
    assert {rows.start for rows, _ in places} == set(range(7))
    assert {columns.start for _, columns in places} == set(range(9))
    assert not torch.equal(train[Draw(0, positions)].past, train[Draw(1, positions)].past)
    other = radar(path, crop=6, eval_crop=8, seed=1).windows("train")
    assert not torch.equal(train[Draw(0, positions)].past, other[Draw(0, positions)].past)

    test = data.windows("test")
    batch = test[Draw(5, (0,))]
    first = int(test.index.start[0])
    assert torch.equal(batch.past[0, :, 0], torch.from_numpy(labelled(400, 12, 14)[first : first + 3, 2:10, 3:11]))
    assert data.grid.size == (8, 8)
    assert data.grid.origin == pytest.approx((46.0 - 2 * 0.01, 11.0 + 3 * 0.014))


@pytest.mark.parametrize("seed", [0, 7, -3])
def test_places_are_drawn_by_seed_epoch_and_window(seed: int, write_archive: WriteArchive) -> None:
    paths = [write_archive("a.nc", times=LONG, size=(12, 9)), write_archive("b.nc", times=LONG, size=(9, 40))]
    train = radar(paths, crop=9, eval_crop=9, crop_draws=3, seed=seed).windows("train")
    for epoch, window in ((0, 0), (0, len(train) - 1), (4, 25), (0, 25)):
        height, width = train.archives[train.index.archive[window]].grid.size
        random = np.random.default_rng([seed & 0xFFFF_FFFF_FFFF_FFFF, epoch, window])
        corners = random.integers(0, [height - 9, width - 9], (3, 2), endpoint=True).tolist()
        assert train.places(epoch, window) == [(slice(y, y + 9), slice(x, x + 9)) for y, x in corners]


@pytest.mark.parametrize("name", ["radar.nc", "radar.zarr"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_worker_processes_deal_what_the_main_process_deals(write_archive: WriteArchive, name: str) -> None:
    path = write_archive(name, times=LONG)
    batches = []
    for workers in (0, 2):
        data = radar(path, crop=6, workers=workers, batch_size=16)
        data.setup()
        data.windows("train")[Draw(0, (0,))]  # an open file in this process must do no harm to its children
        batches.append([*data.train_dataloader(), *data.val_dataloader()])
    assert len(batches[0]) == len(batches[1]) > 10
    for alone, dealt in zip(*batches, strict=True):
        assert_equal(alone, dealt)


def test_windows_can_be_sent_to_another_process(write_archive: WriteArchive) -> None:
    windows = radar(write_archive(times=LONG), crop=6).windows("train")
    draw = next(iter(BatchSampler(len(windows), 4, shuffle=True)))
    expected = windows[draw]
    assert_equal(pickle.loads(pickle.dumps(windows))[draw], expected)


def dry(*stretches: slice) -> NDArray[np.uint8]:
    """Frames for `LONG`, wet but for those stretches."""
    numbers = labelled(400, 12, 14)
    for stretch in stretches:
        numbers[stretch] = 0
    return numbers


def test_rain_events_are_parted_by_dry_hours_over_all_archives(write_archive: WriteArchive) -> None:
    split = {"train": ["2025-02-27", "2025-03-01"], "test": ["2025-03-01T06:00", "2025-03-03"]}
    one = write_archive("one.nc", times=LONG, numbers=dry(slice(60, 100), slice(150, 180)))
    windows = radar(one, split=split).windows("train")
    # Rain at frames 59 and 100 is 41 frames apart: the border is at 79.5, and windows are issued at their third frame.
    assert windows.blocks == 2
    assert windows.index.block.tolist() == [0 if start + 2 < 79.5 else 1 for start in windows.index.start]
    other = write_archive("two.nc", times=LONG, numbers=dry(slice(0, 79), slice(80, 400)))
    assert radar([one, other], split=split).windows("train").blocks == 1


def test_identical_frames_in_different_splits_are_told(
    write_archive: WriteArchive, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = dry(slice(1, 400, 2), slice(150, 400))  # dry frames are all alike, and no leak
    sound = radar(write_archive(times=LONG, numbers=numbers))
    sound.setup()
    assert sound.leaks() == []
    assert not caplog.records

    numbers[[361, 390, 391]] = numbers[[20, 40, 40]]
    data = radar(write_archive("leaky.nc", times=LONG, numbers=numbers))
    with caplog.at_level(logging.WARNING, logger="datamodules.radar"):
        data.setup()
    (record,) = caplog.records
    assert "2 in all" in record.getMessage()
    assert (
        "2025-02-27 03:20:00 of leaky.nc (train) = 2025-03-01 12:10:00 of leaky.nc (test); 2025-02-27 06:40:00 of "
        "leaky.nc (train) = 2025-03-01 17:00:00 of leaky.nc (test);" in record.getMessage()
    )


def test_thresholds_that_no_pixel_reaches_are_told(
    write_archive: WriteArchive, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = labelled(240, 12, 14)
    numbers[numbers < 255] = numbers[numbers < 255].clip(max=90)  # 35 dBZ
    split = {"train": ["2025-02-27", "2025-02-28"], "test": ["2025-02-28T06:00", "2025-03-01"]}
    path = write_archive(times=LONG[:240], numbers=numbers)

    def told(**options: Any) -> list[str]:
        caplog.clear()
        radar(path, split=split, **options).setup()
        return [record.getMessage() for record in caplog.records]

    (line,) = told()
    assert line.startswith("No pixel reaches 40 dBZ, since the largest value of the data is 35:")
    (line,) = told(relation="marshall_palmer", thresholds=[1, 5, 5.7, 8])  # (10^3.5 / 200)^(1 / 1.6) = 5.62
    assert line.startswith("No pixel reaches 5.7, 8 mm/h, since the largest value of the data is 5.61")
    assert told(thresholds=[10, 35]) == []


def test_splits_are_described_by_windows_events_time_and_rain(write_archive: WriteArchive) -> None:
    numbers = dry(slice(0, 40), slice(60, 100))
    numbers[:, 6:] = 0
    split = {"train": ["2025-02-27", "2025-02-28"], "validation": ["2025-02-28T06:00", "2025-02-28T12:00"]}
    data = radar(write_archive(times=LONG, numbers=numbers), split={**split, "test": ["2025-03-01", "2025-03-02"]})
    console = Console(record=True, width=80)
    console.print(table_of_splits(data))
    rows = {row.split()[1]: row.split() for row in console.export_text().splitlines() if "2025" in row}
    assert rows["train"][3::2][:2] == ["138", "2"]
    assert " ".join(rows["train"]).count("2025-02-27 00:00 │ 2025-02-27 23:50") == 1
    values = np.where(numbers == 255, np.nan, numbers)[:144]
    share = np.mean((values >= 40).sum((1, 2)) / np.isfinite(values).sum((1, 2)))
    assert rows["train"][-2] == f"{share:.1%}"


def archived(write_archive: WriteArchive, name: str = "radar.nc", **options: Any) -> str:
    """The fingerprint of an archive that is written so."""
    static = options.pop("static", [])
    more = {"height": (("y", "x"), labelled(1, 12, 14)[0] + options.pop("higher", 0.0), {})}
    return radar(write_archive(name, **{"times": LONG, "more": more, **options}), static=static).fingerprint


def test_a_fingerprint_is_of_the_data_and_not_of_the_file(write_archive: WriteArchive) -> None:
    known = archived(write_archive)
    assert len(known) == 16
    assert int(known, 16) >= 0
    assert archived(write_archive, "elsewhere.nc") == archived(write_archive, "chunked.zarr") == known
    again = radar(write_archive(times=LONG), past=2, batch_size=1, seed=5, crop=6, eval_crop=6, stride=3)
    assert again.fingerprint == known
    with_height = archived(write_archive, static=["height"])
    assert with_height == archived(write_archive, "elsewhere.nc", static=["height"])
    one_pixel = labelled(400, 12, 14)
    one_pixel[333, 7, 7] ^= 1
    different: Mapping[str, Mapping[str, Any]] = {
        "a pixel": {"numbers": one_pixel},
        "times": {"times": LONG + CADENCE},
        "a frame less": {"times": LONG[1:], "numbers": labelled(400, 12, 14)[1:]},
        "packing": {"attributes": {**DBZ, "add_offset": -10.5}},
        "the missing code": {"attributes": {**DBZ, "_FillValue": np.uint8(254)}},
        "quantity": {"attributes": {**DBZ, "long_name": "vertical maximum"}},
        "variable": {"variable": "zh"},
        "grid": {"coordinates": {**DEGREES, "y": {}}},
        "a static field": {"static": ["height"]},
        "another static field": {"static": ["height"], "higher": np.eye(12, 14)},
    }
    prints = [archived(write_archive, **options) for options in different.values()]
    assert len({known, with_height, *prints}) == 1 + len(different)
    pair = [write_archive(name, times=LONG) for name in ("one.nc", "two.nc")]
    pair.append(write_archive("three.nc", times=LONG, numbers=one_pixel))
    assert radar(pair[:2]).fingerprint != known
    assert radar(pair[1:]).fingerprint != radar(pair[:0:-1]).fingerprint


def test_rain_rate_from_reflectivity(write_archive: WriteArchive) -> None:
    data = radar(write_archive(times=LONG), relation="dwd", floor=0.1, thresholds=[1, 10])
    data.setup()
    assert (data.quantity.units, data.quantity.floor, data.quantity.thresholds) == ("mm/h", 0.1, (1.0, 10.0))
    assert data.quantity.relation == Z_R_RELATIONS["dwd"]
    assert Quantity.from_dict(data.quantity.to_dict()) == data.quantity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"past": 0}, "data.past is 0; it must be at least 1"),
        ({"stride": 0}, "data.stride is 0; it must be at least 1"),
        ({"crop": 0}, "data.crop is 0"),
        ({"crop": 13}, "data.crop is 13, but the frames of .* are 12 x 14 pixels; crop to 12 at most"),
        ({"eval_crop": 13}, "data.eval_crop is 13"),
        ({"relation": "z"}, "Unknown Z-R relation 'z'; choose one of marshall_palmer"),
        ({"thresholds": [20, 10]}, "data.thresholds are .20, 10.; give one or more, each above the last"),
        ({"floor": 10.0}, "data.thresholds begin at 10 dBZ, which every pixel reaches"),
        ({"static": ["height"]}, "data.static names 'height', .* of that kind there are: none"),
        ({"guard_hours": 5}, "data.guard_hours is 5; it must be at least 6"),
        ({"past": 200}, r"validation split has 24 frames but no 204 in a row .* longer archive"),
        ({"split": [0.9999, 0, 0.0001]}, "test split has 0 frames but no 7 in a row"),
        ({"split": {"train": ["2020-01-01", "2020-02-01"]}}, r"train split has 0 frames but no 7 in a row"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    write_archive: WriteArchive, options: dict[str, Any], message: str
) -> None:
    path = write_archive(times=LONG)
    with pytest.raises(UserError, match=message):
        radar(path, **options).setup()
    if "split" in options:  # a second call must not find the data half set up
        data = radar(path, **options)
        for _ in range(2):
            with pytest.raises(UserError, match=message):
                data.setup()


def test_a_missing_archive_and_a_missing_split_are_refused(write_archive: WriteArchive) -> None:
    for nothing in (None, "", []):
        with pytest.raises(UserError, match=r"data.archive is not set"):
            radar(nothing)  # type: ignore[arg-type]
    path = write_archive(times=LONG)
    with pytest.raises(UserError, match="names an archive twice"):
        radar([path, path])
    with pytest.raises(UserError, match="leaves nothing for train"):
        radar(path, split=[0, 0, 1]).windows("train")


def test_archives_that_do_not_fit_together_are_refused(write_archive: WriteArchive) -> None:
    one = write_archive("one.nc", times=LONG)
    with pytest.raises(UserError, match=r"hold different numbers .dBZ = 0.5 .* mm/h = 1 "):
        radar([one, write_archive("rate.nc", numbers=rain(), attributes=RATE)]).setup()
    with pytest.raises(UserError, match=r"different times between frames .* 600 s, .* 300 s"):
        radar([one, write_archive("fast.nc", times=every(40, cadence=300))]).setup()
    with pytest.raises(UserError, match=r"different sizes .* 12 x 14, .* 9 x 20.* set data.crop"):
        radar([one, write_archive("wide.nc", size=(9, 20))]).setup()
    with pytest.raises(UserError, match=r"holds mm/h already; set data.relation=null"):
        radar(write_archive("rate.nc", numbers=rain(), attributes=RATE), relation="dwd").setup()
    with pytest.raises(UserError, match=r"mixed.nc: The archive mixes time steps"):
        radar(write_archive("mixed.nc", times=np.append(every(20), START + 20 * CADENCE - 300))).setup()


def test_the_config_names_every_argument() -> None:
    config = OmegaConf.load(Path(__file__).parents[1] / "conf" / "data" / "radar.yaml")
    keys = [str(key) for key in config]
    assert keys == ["_target_", *list(signature(RadarData).parameters)]
    assert OmegaConf.is_missing(config, "archive")


def test_the_recipe_in_the_documentation_writes_a_good_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs" / "data.md"
    recipe = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(recipe, {})
    data = radar("radar.nc")
    data.setup()
    assert (data.quantity.units, data.grid.units, data.cadence) == ("dBZ", "m", CADENCE)
    assert all(len(data.windows(split)) for split in ("train", "validation", "test"))


def test_the_italian_archives_are_read_as_xarray_reads_them_and_split_without_a_leak(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STORMCELL_CACHE", str(tmp_path))
    paths = [str(shared_data / "radar" / f"italy_{place}_10min.nc") for place in ("north", "campania")]
    for path in paths:
        if not Path(path).exists():
            pytest.skip(f"no real observations: {path} is absent")
    data = radar(paths, past=6, future=6, crop=128, eval_crop=256)
    data.setup()
    assert (data.quantity.units, data.cadence, data.grid.units) == ("dBZ", 600, "degrees")
    seen = []
    for split in ("train", "validation", "test"):
        windows = data.windows(split)
        spans = [
            windows.archives[a].times[[s, s + 11]]
            for a, s in zip(windows.index.archive, windows.index.start, strict=True)
        ]
        assert all(last - first == 11 * 600 for first, last in spans)
        seen.append((min(first for first, _ in spans), max(last for _, last in spans)))
    assert all(later[0] - earlier[1] >= 6 * HOUR for earlier, later in pairwise(seen))

    assert [data.windows(split).blocks for split in ("train", "validation", "test")] == [3, 1, 1]
    assert not data.leaks()
    split = {"train": ["2025-03-23", "2025-03-24"], "test": ["2025-03-25", "2025-03-26"]}
    leaky = radar(paths[1], crop=128, eval_crop=128, split=split)
    leaky.setup()
    (record,) = caplog.records
    assert "2025-03-23 13:00:00 of italy_campania_10min.nc (train) = 2025-03-25 03:40:00 of" in record.getMessage()

    windows = data.windows("train")
    for position in (0, len(windows) - 1):
        batch = windows[Draw(0, (position,))]
        values, valid = data.quantity.decode(batch.past[0, :, 0])
        number, start = windows.index.archive[position], windows.index.start[position]
        rows, columns = windows.places(0, position)[0]
        with xr.open_dataset(paths[number]) as stored:
            truth = stored["dbz"][start : start + 6, rows, columns].values
        np.testing.assert_array_equal(valid.numpy(), np.isfinite(truth))
        np.testing.assert_array_equal(values.numpy(), np.fmax(truth, -10).astype(np.float32))
