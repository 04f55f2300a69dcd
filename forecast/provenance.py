"""Where a result comes from: the code, the versions, the machine, and the configuration without its secrets."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).resolve().parent.parent
SECRETS = {"key", "token", "secret", "password"}
MASK = "***"
_PASSWORDS = (
    re.compile(r"(://[^/:@\s]*:)(?!\d+/)\S*(@)"),
    re.compile(r"([?&]\w*(?:passw|token|secret|key)\w*=)[^&\s]*()", re.IGNORECASE),
)


def commit(tree: Path = SOURCES) -> str | None:
    """The git commit of a source tree, with "+changes" where its tracked files differ from it.

    Args:
        tree: a folder; that of `forecast` and `train.py`.

    Returns:
        None without git, and where git does not keep that folder: installed packages may lie inside another repository.
    """
    head, tracked = _git(tree, "rev-parse", "HEAD"), _git(tree, "ls-files", "--", ".")
    if not head or not tracked:
        return None
    changes = _git(tree, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{head}+changes" if changes else head


def _git(tree: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails."""
    # Inside a git hook these name the repository of the hook.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(tree), *arguments]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()


def versions() -> dict[str, str]:
    """Of Python and the packages that a result hangs on."""
    packages = {name: version(name) for name in ("torch", "lightning", "stormcell")}
    return {"python": platform.python_version(), **packages}


def hardware() -> dict[str, Any]:
    """The CPU's model, the number of its logical cores, and the GPUs that torch sees, by name."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": _cpu(), "cores": os.cpu_count(), "gpus": gpus}


def _cpu() -> str:
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        described = ""
    found = re.search(r"^model name\s*:\s*(.+)$", described, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def masked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy of a configuration, fit to be shown.

    The value of a key that has one of the words key, token, secret and password in it (api_key and WANDB_TOKEN, but not
    keys or tokenizer) becomes "***", and so does a password in a URL
    (scheme://user:password@host, or ?password=...), wherever it stands.

    Args:
        config: mappings, lists and plain values, however deep.
    """
    return {key: MASK if _names_a_secret(key) and value is not None else _mask(value) for key, value in config.items()}


def masked_text(text: str) -> str:
    """A text with "***" for the passwords of the URLs in it, those of their queries too."""
    for pattern in _PASSWORDS:
        text = pattern.sub(rf"\1{MASK}\2", text)
    return text


def _names_a_secret(key: object) -> bool:
    return not SECRETS.isdisjoint(re.split(r"[^a-z]+", str(key).lower()))


def _mask(value: Any) -> Any:
    if isinstance(value, Mapping):
        return masked(value)
    if isinstance(value, (list, tuple)):
        return [_mask(one) for one in value]
    return masked_text(value) if isinstance(value, str) else value
