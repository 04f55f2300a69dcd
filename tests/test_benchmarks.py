"""The benchmarks: they run, and tell no time of wrong results."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scores, tbptt
from benchmarks.scores import CASES, STREAMS, agree, main, rain
from forecast.errors import UserError

CASE = CASES[1]._replace(samples=1, size=16, future=2)
STREAM = STREAMS[0]._replace(size=32, steps=2, scales=(1, 4))
SMALL = ["--samples", "20", "--out"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "ROUNDS", 1)


def test_cost_names_each_default_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--cost", "--out", str(tmp_path / "made" / "cost.md")], cases=[CASE])
    written = (tmp_path / "made" / "cost.md").read_text()
    assert capsys.readouterr().out == written
    rows = [line.split(" | ")[0].removeprefix("| ") for line in written.splitlines() if line.startswith("| ")]
    alone = [
        f"{kind}: {metric}" for kind in ("test", "validation") for metric in ("Continuous", "Contingency", "Fractions")
    ]
    assert {"forward pass", "test", "validation", "test: Spectrum", *alone} <= set(rows)
    assert "python benchmarks/scores.py --cost" in written
    assert "## Beside pysteps" not in written


def test_equals_pysteps_and_tells_how_much_faster(tmp_path: Path) -> None:
    pytest.importorskip("pysteps", reason="pysteps is an extra")
    main(["--pysteps", *SMALL, str(tmp_path / "peer.md")], streams=[STREAM])
    written = (tmp_path / "peer.md").read_text()
    assert "We score 20 samples" in written
    assert "times faster is promised" in written
    assert "## Beside the forward pass" not in written


def test_no_time_is_told_of_wrong_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = pytest.importorskip("pysteps.verification.spatialscores", reason="pysteps is an extra")
    right = theirs.fss_compute
    monkeypatch.setattr(theirs, "fss_compute", lambda window: right(window) + 2e-10)
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"error: The fss .* differences up to 2\.0e-10 \(1e-10 is allowed\)") as ended:
        main(["--pysteps", *SMALL, str(tmp_path / "peer.md")], streams=[STREAM])
    assert ended.value.code != 0
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("theirs", [[0.5, 0.1 + 2e-10], [0.5, np.nan], [np.nan, 0.1]])
def test_gate_refuses_what_is_not_equal(theirs: list[float]) -> None:
    agree("csi", np.array([0.5, 0.1, np.nan]), np.array([0.5, 0.1 + 5e-11, np.nan]))
    with pytest.raises(UserError, match="The csi is a number in 2 places by us"):
        agree("csi", np.array([0.5, 0.1]), np.array(theirs))


def test_gate_refuses_to_compare_nothing() -> None:
    with pytest.raises(UserError, match="in 0 places by us and in 0 by pysteps"):
        agree("csi", np.full(3, np.nan), np.full(3, np.nan))


@pytest.mark.parametrize("wet", [0.1, 0.6])
def test_rain_is_as_wet_as_asked_and_reaches_the_highest_threshold(wet: float) -> None:
    fields = rain(samples=4, steps=3, size=240, wet=wet, seed=1)
    for part in (fields.forecast, fields.truth):
        assert (part >= 0.5).float().mean().item() == pytest.approx(wet, rel=0.3)
        assert part.max() > 30
    assert 0.8 < fields.valid.float().mean() < 1
    assert not fields.forecast.equal(fields.truth)


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="samples is 3; memory is compared after a tenth, so give 20 or more"):
        main(["--pysteps", "--samples", "3", "--out", str(tmp_path / "peer.md")])


def test_truncated_backpropagation_keeps_no_more_of_a_longer_stream(tmp_path: Path) -> None:
    tbptt.main(["--out", str(tmp_path / "tbptt.md")], lengths=(20, 40, 80))
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (tmp_path / "tbptt.md").read_text(), re.MULTILINE)
    whole, again, cut = zip(
        *([float(cell.split(",")[0]) for cell in cells.split(" | ")] for _, cells in rows), strict=True
    )
    assert whole[2] == pytest.approx(4 * whole[0], rel=0.1)
    assert len(set(cut)) == 1
    assert cut[0] == whole[0]
    assert all(less < all_of / 2 for less, all_of in zip(again, whole, strict=True))
    assert (tmp_path / "tbptt.png").read_bytes().startswith(b"\x89PNG")
