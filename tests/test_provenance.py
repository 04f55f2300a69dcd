"""Provenance: the commit of the right tree, and a configuration that can be shown."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from forecast.provenance import commit, hardware, masked, versions

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *who, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With one committed file, package/module.py."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/module.py").write_text("x = 1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "--quiet", "--message", "Begin")
    return tmp_path


@needs_git
def test_commit_is_that_of_the_tree(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert len(head) == 40
    assert commit(repository) == head
    assert commit(repository / "package") == head


@needs_git
def test_changes_of_tracked_files_are_told(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    (repository / "package/untracked.txt").write_text("no matter")
    assert commit(repository) == head
    (repository / "package/module.py").write_text("x = 2\n")
    assert commit(repository) == f"{head}+changes"
    git(repository, "add", "package/module.py")
    assert commit(repository) == f"{head}+changes"


@needs_git
def test_another_repository_s_commit_is_not_ours(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the packages are installed into an environment that lies in somebody's own repository."""
    installed = repository / ".venv/site-packages"
    installed.mkdir(parents=True)
    (installed / "module.py").write_text("x = 1\n")
    assert commit(installed) is None
    # As in a git hook.
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert commit(repository) == git(repository, "rev-parse", "HEAD")
    assert commit(installed) is None


def test_outside_a_checkout_and_without_git_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None


def test_machine_and_versions_are_plain_values() -> None:
    assert set(versions()) == {"python", "torch", "lightning", "stormcell"}
    known = hardware()
    assert known["cpu"]
    assert known["cores"] >= 1
    assert yaml.safe_load(yaml.safe_dump({**versions(), **known})) == {**versions(), **known}


@pytest.mark.parametrize("key", ["key", "api_key", "API-KEY", "wandb_token", "Secret", "aws.secret.id", "db password"])
def test_values_under_names_of_secrets_are_hidden(key: str) -> None:
    assert masked({"a": [{key: "canary"}], key: {"deep": "canary"}}) == {"a": [{key: "***"}], key: "***"}


@pytest.mark.parametrize("key", ["keys", "monitor", "tokenizer", "monkey", "keyframe", "secretary", "passwords"])
def test_other_names_are_not(key: str) -> None:
    assert masked({key: "shown"}) == {key: "shown"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:canary@example.org/a?b=c", "https://me:***@example.org/a?b=c"),
        ("see s3+http://me:ca@nary@host:80, and ftp://x:canary@y", "see s3+http://me:***@host:80, and ftp://x:***@y"),
        ("redis://:canary@host", "redis://:***@host"),
        ("https://example.org:8080/a@b", "https://example.org:8080/a@b"),
        ("me@example.org at 10:30", "me@example.org at 10:30"),
    ],
)
def test_passwords_in_urls_are_hidden(text: str, shown: str) -> None:
    assert masked({"data": {"archive": [text]}}) == {"data": {"archive": [shown]}}


def test_the_rest_is_copied_as_it_is() -> None:
    given = {"a": {"b": [1, 2.5, None, True]}, "token": None, "sizes": (3, 4)}
    copy = masked(given)
    assert copy == {"a": {"b": [1, 2.5, None, True]}, "token": None, "sizes": [3, 4]}
    copy["a"]["b"].append(3)
    assert given["a"] == {"b": [1, 2.5, None, True]}
