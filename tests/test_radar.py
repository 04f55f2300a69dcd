"""Windows of radar are dealt the same whoever asks, leak nothing from split to split, and say what does not fit."""

import pickle
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import CADENCE, RATE, START, WriteArchive, every, labelled, rain
from omegaconf import OmegaConf

from datamodules.radar import RadarData
from datamodules.sampler import PADDING, BatchSampler, Draw
from forecast.batch import Batch
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


def test_crops_are_random_in_training_and_central_elsewhere(write_archive: WriteArchive) -> None:
    path = write_archive(times=LONG)
    data = radar(path, crop=6, eval_crop=8)
    data.setup()
    train = data.windows("train")
    positions = tuple(range(20))
    assert_equal(train[Draw(3, positions)], train[Draw(3, positions)])
    assert_equal(train[Draw(3, (7,))], Batch(*(part[7:8] for part in train[Draw(3, positions)])))
    places = [train.crop.place((12, 14), epoch, position) for epoch in range(9) for position in range(40)]
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


def test_the_italian_archives_are_read_as_xarray_reads_them_and_split_without_a_leak(shared_data: Path) -> None:
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

    windows = data.windows("train")
    for position in (0, len(windows) - 1):
        batch = windows[Draw(0, (position,))]
        values, valid = data.quantity.decode(batch.past[0, :, 0])
        number, start = windows.index.archive[position], windows.index.start[position]
        rows, columns = windows.crop.place(windows.archives[number].grid.size, 0, position)
        with xr.open_dataset(paths[number]) as stored:
            truth = stored["dbz"][start : start + 6, rows, columns].values
        np.testing.assert_array_equal(valid.numpy(), np.isfinite(truth))
        np.testing.assert_array_equal(values.numpy(), np.fmax(truth, -10).astype(np.float32))
