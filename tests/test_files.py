"""A file is written whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forecast.files import whole


def test_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "skill.csv"
    with whole(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".csv"
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["skill.csv"]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "skill.csv"
    path.write_text("old")

    def interrupted() -> None:
        with whole(path) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["skill.csv"]


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole(tmp_path / "skill.csv"):
        pass
    assert os.listdir(tmp_path) == []


def test_left_over_of_a_killed_process_is_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "skill.nc"
    code = (
        "import os, sys; from pathlib import Path; from forecast.files import whole\n"
        "with whole(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('ha'); os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[1], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert not path.exists()
    assert left.startswith(".")
    assert ".part" in left
    with whole(path) as temporary:
        assert temporary.name != left
        temporary.write_text("whole")
    assert path.read_text() == "whole"
