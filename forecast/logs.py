"""The training log as one file: metrics.csv, whole after every write."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from forecast.files import whole

PAUSE = 5.0  # seconds between two writes


class MetricsFile(Logger):
    """Writes one row per logged step, one column per metric. A resumed run goes on with the rows it finds.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self.rows: dict[int, dict[str, Any]] = {}
        self._written = float("-inf")
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    self.rows[int(row["step"])] = {name: value for name, value in row.items() if value != ""}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration is beside the file, in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = self.rows.setdefault(0 if step is None else step, {"step": step})
        row.update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Writes the file, unless it was written a moment ago: Lightning asks after every logged step."""
        if monotonic() - self._written >= PAUSE:
            self._write()

    def _write(self) -> None:
        if not self.rows:
            return
        self._written = monotonic()
        names = {name: None for row in self.rows.values() for name in row}
        with whole(self.path) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(names), restval="")
            writer.writeheader()
            writer.writerows(self.rows[step] for step in sorted(self.rows))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._write()
