"""A protocol changes with all that is scored and with nothing that a model is given; other runs are refused."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import CADENCE, START, WriteArchive, every, labelled

from datamodules.frames import FrameData
from datamodules.moving_digits import MOST_BLOCKS, MovingDigitsData
from datamodules.radar import RadarData
from datamodules.sampler import Draw
from forecast import protocol
from forecast.errors import UserError
from forecast.metrics.balanced import Balanced
from forecast.metrics.contingency import Contingency
from forecast.metrics.continuous import Continuous
from forecast.metrics.neighbourhood import Fractions
from forecast.protocol import Protocol, check_alike, differences
from forecast.units import Decibel

LONG = every(400)  # enough for three splits with guards between them
METRICS = {"values": Continuous, "events": Contingency}
CONFIG = {"folder": "runs/one", "seed": 3, "model": {"name": "convlstm"}}


def radar(archive: str | list[str], **options: Any) -> RadarData:
    data = RadarData(archive, **{"past": 3, "future": 4, "batch_size": 5, "workers": 0, "seed": 0, **options})
    data.setup()
    return data


def digits(**options: Any) -> MovingDigitsData:
    data = MovingDigitsData(**{"past": 3, "future": 4, "train": 20, "validation": 6, "test": 7, **options})
    data.setup()
    return data


def of(data: FrameData) -> Protocol:
    return protocol.of(data, METRICS)


def named(lines: list[str]) -> set[str]:
    return {line.partition(": ")[0] for line in lines}


def test_a_protocol_is_json_and_comes_back_the_same(write_archive: WriteArchive) -> None:
    for data in (radar(write_archive(times=LONG)), digits()):
        terms = of(data)
        again = Protocol(**json.loads(terms.to_text()))
        assert again == terms
        assert differences(terms, again) == []


def test_what_is_scored_is_named_where_it_differs(write_archive: WriteArchive) -> None:
    path = write_archive(times=LONG)
    terms = of(radar(path))
    others: list[tuple[dict[str, Any], set[str]]] = [
        ({"thresholds": [15.0]}, {"quantity.thresholds"}),
        ({"floor": -5.0}, {"quantity.floor"}),
        ({"future": 5, "eval_stride": 4}, {"future"}),
        ({"eval_stride": 2}, {"data.stride", "data.issues", "data.windows", "data.last_issue"}),
        ({"eval_crop": 10}, {"grid.size", "grid.origin"}),
    ]
    for options, names in others:
        other = of(radar(path, **options))
        assert named(differences(terms, other)) == names
        assert terms != other


def test_a_difference_shows_both_values(write_archive: WriteArchive) -> None:
    path = write_archive(times=LONG)
    lines = differences(of(radar(path)), of(radar(path, relation="hko7", thresholds=[2.0])))
    assert 'quantity.units: "dBZ" | "mm/h"' in lines
    assert "quantity.thresholds: [10.0, 20.0, 30.0, 40.0] | [2.0]" in lines
    assert {"quantity.relation.a: - | 58.53", "quantity.relation: null | -"} <= set(lines)


def test_what_a_model_is_given_is_no_term(write_archive: WriteArchive) -> None:
    path = write_archive(times=LONG, more={"height": (("y", "x"), labelled(1, 12, 14)[0] * 1.0, {})})
    terms = of(radar(path))
    given: dict[str, Any] = {"static": ["height"], "crop": 10, "stride": 3, "seed": 5, "batch_size": 2}
    for name, value in given.items():
        assert of(radar(path, **{name: value})) == terms, name


def test_more_past_frames_are_the_same_protocol_where_forecasts_are_issued_at_the_same_times(
    write_archive: WriteArchive,
) -> None:
    path = write_archive(times=LONG)

    def terms(past: int, first: int) -> Protocol:
        test = [str(np.datetime64(int(START + frame * CADENCE), "s")) for frame in (first, 400)]
        ends = [str(np.datetime64(int(START + frame * CADENCE), "s")) for frame in (0, 100, 150, 250)]
        return of(radar(path, past=past, split={"train": ends[:2], "validation": ends[2:], "test": test}))

    assert terms(3, 300) == terms(5, 298)
    assert named(differences(terms(3, 300), terms(5, 300))) >= {"data.issues", "data.first_issue"}


def test_another_archive_or_another_event_is_another_protocol(write_archive: WriteArchive) -> None:
    path = write_archive(times=LONG)
    changed = labelled(400, 12, 14)
    changed[395, 5, 5] = 7
    other = write_archive("other.nc", times=LONG, numbers=changed)
    assert named(differences(of(radar(path)), of(radar(other)))) == {"data.archive"}
    dry = labelled(400, 12, 14)
    dry[355:395] = 0  # a pause of more than six hours within the test split
    lines = differences(of(radar(path)), of(radar(write_archive("dry.nc", times=LONG, numbers=dry))))
    assert named(lines) == {"data.archive", "data.events", "data.issues"}


def test_of_digits_only_the_test_sequences_count() -> None:
    terms = of(digits())
    for options in ({"train": 30}, {"validation": 9}, {"fresh": False}, {"seed": 4}):
        assert of(digits(**options)) == terms
    others: dict[str, dict[str, Any]] = {
        "windows": {"test": 8},
        "speed": {"speed": (1.0, 2.0)},
        "digits": {"digits": 3},
    }
    for name, options in others.items():
        assert f"data.{name}" in named(differences(terms, of(digits(**options))))
    # Another past shifts which frames of a sequence are forecast.
    assert {"data.first_frame", "data.archive"} <= named(differences(terms, of(digits(past=4))))


def test_options_of_metrics_are_terms_with_their_defaults() -> None:
    data = digits()
    pixel = protocol.of(data, {"any": partial(Balanced, transform=Decibel(relation="hko7"))}).scores["Balanced"][
        "transform"
    ]
    assert pixel == {"kind": "Decibel", "relation": "hko7", "low": -10.0, "high": 60.0}
    given = protocol.of(data, {"any": partial(Fractions, scales=(1, 2))})
    assert given.scores == {"Fractions": {"scales": [1, 2]}}
    default = protocol.of(data, {"other": Fractions})
    assert list(default.scores["Fractions"]) == ["scales"]
    assert named(differences(given, default)) == {"scores.Fractions.scales"}


def test_a_metric_that_only_one_has_is_no_difference() -> None:
    data = digits()
    one, more = of(data), protocol.of(data, {**METRICS, "fss": partial(Fractions, scales=(2,))})
    assert differences(one, more) == []
    assert one != more


def test_issue_times_are_those_of_the_batches(write_archive: WriteArchive) -> None:
    later = write_archive("later.nc", times=LONG + 5 * CADENCE)
    for data in (radar([write_archive(times=LONG), later]), digits()):
        windows = data.windows("test")
        assert windows.issue_times().tolist() == windows[Draw(0, tuple(range(len(windows))))].time.tolist()
        terms = data.terms("test")
        assert terms["windows"] == len(windows)
        assert terms["events"] == windows.blocks


def test_windows_are_decoded_as_they_are_named_and_nothing_is_added() -> None:
    data = digits(batch_size=3)
    frames = list(data.decoded("train", [4, 1, 19, 0]))
    assert [part.time.tolist() for part in frames] == [[4, 1, 19], [0]]
    expected = data.quantity.decode(data.windows("train")[Draw(0, (4, 1, 19, 0))].future)[0]
    assert torch.equal(torch.cat([part.truth for part in frames]), expected)


def test_windows_are_seen_at_places_drawn_by_chance_though_training_crops_by_rain(write_archive: WriteArchive) -> None:
    path = write_archive(times=every(400))
    seen = []
    for draws in (1, 8):
        data = RadarData(path, past=3, future=4, batch_size=5, workers=0, seed=0, crop=5, crop_draws=draws)
        seen.append(torch.cat([part.truth for part in data.decoded("train", range(20))]))
    assert torch.equal(*seen)


def test_many_sequences_share_few_blocks() -> None:
    data = digits(test=250)
    windows = data.windows("test")
    assert (len(windows), windows.blocks) == (250, MOST_BLOCKS)
    batch = windows[Draw(0, (0, 99, 100, 249))]
    assert batch.block.tolist() == [0, 99, 0, 49]
    assert batch.time.tolist() == [0, 99, 100, 249]


def test_provenance_tells_what_was_scored_and_what_that_was_trained_on() -> None:
    known = protocol.provenance_of(CONFIG)
    assert (known["folder"], known["seed"], known["model"]["name"], known["trained"]) == ("one", 3, "convlstm", None)
    assert {"time", "version", "commit", "versions", "hardware"} <= known.keys()
    card = {"config": {"seed": 8}, "past": 5, "fingerprint": "ab", "version": "1", "commit": None}
    trained = protocol.provenance_of(CONFIG, {"stormcell": card, "epoch": 6, "global_step": 70, "state_dict": {}})
    assert json.loads(json.dumps(trained))["trained"] == {
        "epoch": 6,
        "step": 70,
        "seed": 8,
        "past": 5,
        "fingerprint": "ab",
        "version": "1",
        "commit": None,
    }


def run(folder: Path, terms: Protocol) -> protocol.Run:
    return protocol.Run(folder, counts(), terms, {})


def counts(pixels: int = 30, threshold: float = 0.5) -> xr.Dataset:
    return xr.Dataset({"pixels": (("model", "block"), [[pixels, 20]])}, {"threshold": [threshold]})


def test_runs_that_were_scored_otherwise_are_refused_with_all_that_differs() -> None:
    terms = of(digits())
    runs = [run(Path("a"), terms), run(Path("b"), terms), run(Path("c"), replace(terms, future=9, cadence=60))]
    check_alike(runs[:2])
    with pytest.raises(UserError) as refused:
        check_alike(runs)
    assert str(refused.value).splitlines()[1:] == ["a | c", "  future: 4 | 9", "  cadence: null | 60"]


def test_a_test_that_was_cut_short_and_other_events_of_a_section_are_refused() -> None:
    terms = of(digits())
    whole = run(Path("a"), terms)
    check_alike([whole, run(Path("b"), terms)])
    with pytest.raises(UserError, match=r"valid pixels that were scored: 50 \| 40"):
        check_alike([whole, whole._replace(counts=counts(pixels=20))])
    with pytest.raises(UserError, match=r"threshold: \[0.5\] \| \[2.0\]"):
        check_alike([whole, whole._replace(counts=counts(threshold=2.0))])


def test_a_section_that_there_is_not_is_refused(tmp_path: Path) -> None:
    counts().to_netcdf(tmp_path / "skill.nc")
    with pytest.raises(UserError, match="has no section 'subsample'; choose one of /"):
        protocol.read(tmp_path, "subsample")


def test_a_run_without_a_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no .*skill\.nc; name the folder"):
        protocol.read(tmp_path)
    skill = xr.Dataset({"pixels": (("model", "block"), [[1]])}, {"threshold": [0.5]})
    terms = asdict(of(digits()))
    older = {"protocol": json.dumps({"future": 4}), "provenance": "{}"}
    for attributes in ({}, older, {"protocol": json.dumps(terms)}):
        skill.assign_attrs(attributes).to_netcdf(tmp_path / "skill.nc")
        with pytest.raises(UserError, match="score its checkpoint again by run=test"):
            protocol.read(tmp_path)
    skill.assign_attrs(protocol=json.dumps(terms), provenance="{}").to_netcdf(tmp_path / "skill.nc")
    assert protocol.read(tmp_path).protocol == of(digits())
