"""Where a run writes what it learns: metrics.csv (whole after every write), Weights & Biases, TensorBoard.

Beside what Lightning asks of a logger, each says how a run goes on in its folder (`forget_after`), and what it shows of a
test (`publish`). Rows are numbered from 0: row n is that of the step that follows n finished ones.
"""

import csv
import importlib
import secrets
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from forecast.errors import UserError
from forecast.files import whole
from forecast.provenance import masked
from forecast.tables import headline, wide

if TYPE_CHECKING:
    from wandb import Run

PAUSE = 5.0  # seconds between two writes of metrics.csv


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
        number = step or 0
        if any(name.startswith("test/") for name in metrics):
            # A test in the folder of a training counts no steps: it stands after those, in place of an earlier test.
            last = max(self.rows, default=-1)
            tested = any(name.startswith("test/") for name in self.rows.get(last, {}))
            number = max(number, last if tested else last + 1)
        self.rows.setdefault(number, {"step": number}).update(metrics)

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drops the rows of all steps but the first `step`; a run that goes on from there writes them again."""
        self.rows = {number: row for number, row in self.rows.items() if number < step}

    @rank_zero_only
    def save(self) -> None:
        """Writes the file, unless it was written a moment ago: Lightning asks after every logged step."""
        if monotonic() - self._written >= PAUSE:
            self._write()

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Writes the file, so that it is never behind a checkpoint."""
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


class WandB(WandbLogger):
    """Logs to Weights & Biases, under one id for all runs in the same folder.

    Rows carry W&B's own step, which only grows: W&B refuses a row before its last one, as a resumed run repeats some.
    Neither the command line, the console, the source code nor the environment is sent.

    Args:
        save_dir: the run folder; W&B writes to wandb/ in it, and the id is kept in wandb/id.
        project: on the server.
        offline: write files only; `wandb sync` uploads them.
        entity: user or team that owns the project; None for the login's default.
        name: of the run; None lets W&B invent one.
        group: of runs that belong together.
        job_type: what kind of run this is within its group.
        tags: to find it by.
        notes: a longer description.

    Raises:
        UserError: wandb is not installed; or, when the first thing is logged, W&B refuses (no login).
    """

    def __init__(
        self,
        save_dir: str,
        project: str = "stormcell",
        offline: bool = False,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
    ) -> None:
        with _extra("wandb"):
            super().__init__(save_dir=save_dir, project=project, offline=offline, name=name)
        self._arguments = masked(
            {"entity": entity, "name": name, "group": group, "job_type": job_type, "tags": tags, "notes": notes}
        )

    @property
    @rank_zero_experiment
    def experiment(self) -> "Run":
        """W&B's run, begun when it is first asked for."""
        import wandb

        if self._experiment is None:
            assert self.save_dir is not None
            # What tells where a run comes from is in its configuration; W&B would take the command line with its secrets.
            settings = wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_meta=True)
            try:
                self._experiment = wandb.init(
                    dir=self.save_dir,
                    project=self.name,
                    id=_run_id(Path(self.save_dir) / "wandb" / "id"),
                    resume="allow",
                    mode="offline" if self._offline else None,
                    settings=settings,
                    **self._arguments,
                )
            except wandb.Error as error:
                reason = str(error).strip().splitlines()[0].rstrip(".")
                raise UserError(f"W&B says: {reason}; run 'wandb login', or set logger.wandb.offline=true.") from None
        return self._experiment  # type: ignore[return-value]  # never the disabled one, which mode= would have to ask for

    @rank_zero_only
    def finish(self, failed: bool) -> None:
        """Ends W&B's run, if one began: what follows in this process is a run of its own."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(failed))
            self._experiment = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # A test in the folder of a training counts no steps: it stands after those that W&B knows.
        tested = any(name.startswith("test/") for name in metrics)
        self.experiment.log(dict(metrics), step=self._after(step or 0) if tested else step)

    @rank_zero_only
    def publish(self, folder: Path, skill: xr.Dataset, step: int) -> None:
        """Shows a test: a line plot by lead time of each score that is printed, the table of all, the figures and the film.

        Args:
            folder: where `forecast.report.write` left them.
            skill: from `forecast.skill.Skill.dataset`.
            step: of the training.
        """
        import wandb

        scores = wide(skill)
        lead_time = scores.columns[1]
        content: dict[str, Any] = {"skill/scores": wandb.Table(dataframe=scores)}
        for name, by_model in _curves(skill).items():
            # W&B draws no NaN, but takes None for a gap.
            lines = [[float(one) if np.isfinite(one) else None for one in line] for line in by_model.values()]
            leads = [float(lead) for lead in skill["lead_time"].values]
            content[f"skill/{name}"] = wandb.plot.line_series(leads, lines, list(by_model), name, lead_time)
        for name, path in _figures(folder).items():
            content[name] = wandb.Video(str(path), format="gif") if path.suffix == ".gif" else wandb.Image(str(path))
        self.experiment.log(content, step=self._after(step))

    def _after(self, step: int) -> int:
        """That step, or W&B's present one: it refuses earlier ones."""
        return max(step, self.experiment.step)


class TensorBoard(TensorBoardLogger):
    """Logs to TensorBoard.

    Args:
        save_dir: folder of the event files.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, save_dir: str) -> None:
        with _extra("tensorboard"):
            super().__init__(save_dir=save_dir, name="", version="", default_hp_metric=False)

    @rank_zero_only
    def log_hyperparams(  # type: ignore[override]  # Lightning calls it with the parameters alone
        self, params: Mapping[str, Any]
    ) -> None:
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(_flat(params), {}):
            self.experiment.file_writer.add_summary(summary, 0)

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Marks the events of all steps but the first `step` as void; a run that goes on from there writes them again."""
        from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]  # tensorboard has no types
            Event,
            SessionLog,
        )

        start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        self.experiment.file_writer.add_event(start)

    @rank_zero_only
    def save(self) -> None:
        """Writes what is waiting. (Lightning's would also keep the configuration, which is in config.yaml.)"""
        self.experiment.flush()

    @rank_zero_only
    def publish(self, folder: Path, skill: xr.Dataset, step: int) -> None:
        """Shows a test: each printed score by lead time, every model as a run of its own, the figures and the film.

        Args:
            folder: where `forecast.report.write` left them.
            skill: from `forecast.skill.Skill.dataset`.
            step: of the training, under which the figures are found.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]  # as above
        from torch.utils.tensorboard import SummaryWriter

        for name, path in _figures(folder).items():
            width, height = Image.open(path).size
            image = Summary.Image(width=width, height=height, encoded_image_string=path.read_bytes())
            self.experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        leads = [round(float(lead)) for lead in skill["lead_time"].values]
        for model in skill["model"].values:
            # The curves of an earlier test in this folder become void.
            with SummaryWriter(str(Path(self.log_dir) / str(model)), purge_step=0) as writer:
                for name, by_model in _curves(skill).items():
                    for lead, value in zip(leads, by_model[str(model)], strict=True):
                        writer.add_scalar(f"skill/{name}", value, lead)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Says which of our extras brings the package that is wanting."""
    try:
        importlib.import_module(name)
        yield
    except ModuleNotFoundError:
        raise UserError(
            f"logger={name} needs a package that is not installed; pip install 'stormcell[{name}]'."
        ) from None


def _run_id(path: Path) -> str:
    """The id that is kept in that file, or a new one, kept from now on."""
    if not path.exists():
        with whole(path) as temporary:
            temporary.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _curves(skill: xr.Dataset) -> dict[str, dict[str, list[float]]]:
    """The scores of the printed tables by lead time: score -> model -> values."""
    scores = wide(headline(skill))
    models = [str(model) for model in skill["model"].values]
    return {
        name: {model: scores.loc[scores["model"] == model, name].tolist() for model in models}
        for name in scores.columns[2:]
    }


def _figures(folder: Path) -> dict[str, Path]:
    """The pictures of a report by the names under which they are logged."""
    kinds = {".png": "figures", ".gif": "films"}
    found = sorted(path for path in folder.glob("figures/*") if path.suffix in kinds and path.name[0] != ".")
    return {f"{kinds[path.suffix]}/{path.stem}": path for path in found}


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested parameters by their dotted names; what is no plain value as text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
