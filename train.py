"""Train, test or describe a nowcaster: compose, check, build, fit, test the best, report.

    python train.py                                          # moving digits, a ConvLSTM, a few minutes on a CPU
    python train.py data=moving_mnist data.root=DIR          # Moving-MNIST
    python train.py data=radar data.archive=FILE             # radar
    python train.py run=describe model=convgru               # what it would be
    python train.py run=test ckpt_path=RUN/checkpoints/best.ckpt
    python train.py resume=auto hydra.run.dir=RUN            # start RUN, or go on with it after it was killed
    python train.py -m model=convlstm,lstm seed=0,1          # every combination, one after another

Everything that can be set is in conf/; docs/quickstart.md leads through it.
"""

import contextlib
import difflib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from datamodules.frames import FrameData
from forecast import checkpoint, command_line, config, launch
from forecast.allocator import keep_freed_memory
from forecast.compiling import compile_network
from forecast.describe import describe
from forecast.errors import UserError
from forecast.files import clear, whole
from forecast.forecaster import Forecaster, NetworkForecaster, check_given
from forecast.logs import WandB
from forecast.losses import Loss
from forecast.module import NowcastModule, OptimizerFactory, SchedulerFactory, horizon
from forecast.precision import allow_tf32
from forecast.recurrence import use_backend
from forecast.scoring import scoring_of
from forecast.tbptt import TruncatedBPTT
from forecast.teaching import FreeRunning

CONF = Path(__file__).parent / "conf"
CHANNELS = 1  # of a frame: the target quantity
REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR),
    errno.EEXIST,
)


def make_module(cfg: DictConfig, data: FrameData) -> NowcastModule:
    """The LightningModule that a configuration asks for, on data that is set up."""
    forecaster: Forecaster
    training: dict[str, Any] = {}
    if cfg.model.network is None:
        if cfg.init_from is not None or cfg.freeze or cfg.compile:
            raise UserError(f"model={cfg.model.name} has no network; leave out init_from, freeze and compile.")
        forecaster = config.build_baseline(cfg.model.baseline, data)
    else:
        network, head = config.build_network(
            cfg.model, channels=CHANNELS, static_channels=data.static_channels, size=data.grid.size
        )
        check_given(f"model={cfg.model.name}", network, data.after)
        if data.accumulate > 1 and (network.feeds_back or cfg.model.lagrangian):
            raise UserError(
                f"model={cfg.model.name} forecasts one frame of the archive from the other, but data.accumulate="
                f"{data.accumulate} asks for means of several; set it to 1, or take a model such as many_to_one."
            )
        forecaster = NetworkForecaster(network, head, data.transform, data.quantity.thresholds)
        loss: Loss = config.build(cfg.loss, head=head)
        if loss.units not in (None, data.quantity.units):
            raise UserError(
                f"This loss is for data in {loss.units}, but these are in {data.quantity.units}; use loss=mse."
            )
        teaching = config.build(cfg.teaching)
        if not (isinstance(teaching, FreeRunning) or network.feeds_back):
            raise UserError(
                f"model={cfg.model.name} is never fed its own forecasts, so that it cannot be taught; take teaching=none, "
                "or a model such as next_frame."
            )
        tbptt = None
        if cfg.tbptt.steps is not None:
            if not network.streams:
                raise UserError(
                    f"model={cfg.model.name} carries no state along a stream; set tbptt.steps=null, or take a model such as "
                    "convlstm."
                )
            tbptt = TruncatedBPTT(cfg.tbptt.steps, data.future if cfg.tbptt.every is None else cfg.tbptt.every)
        training = {
            "loss": loss,
            "optimizer": config.build(cfg.optimizer),
            "scheduler": config.build(cfg.scheduler),
            "teaching": teaching,
            "tbptt": tbptt,
            "seed": cfg.seed,
        }
        try_out(training["optimizer"], training["scheduler"])
        if cfg.init_from is not None:
            checkpoint.start_from(cfg.init_from, forecaster)
        checkpoint.freeze(forecaster, cfg.freeze)
        use_backend(network, cfg.backend)
        compile_network(network, cfg.compile)
    card = checkpoint.card(cfg, data)
    return NowcastModule(
        name=cfg.model.name,
        forecaster=forecaster,
        quantity=data.quantity,
        grid=data.grid,
        cadence=data.cadence,
        future=data.future,
        scoring=scoring_of(card.config, data),
        card=asdict(card),
        **training,
    )


def train(cfg: DictConfig) -> float | None:
    """One run, from a checked configuration to its report; the best value of the monitor."""
    keep_freed_memory()
    allow_tf32(cfg.tf32)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data: FrameData = config.build(cfg.data)
    data.setup()
    module = make_module(cfg, data)
    if cfg.run == "describe":
        describe(cfg, module, data)
        return None
    trained = isinstance(module.forecaster, NetworkForecaster)
    if cfg.run == "fit" and cfg.tbptt.steps is not None:
        data.train_along_streams(cfg.tbptt.steps, cfg.tbptt.length)
    start = starting_point(cfg)
    if cfg.run == "test" and trained and start is None:
        raise UserError("run=test scores a trained network; give its ckpt_path=RUN/checkpoints/best.ckpt.")
    if start is not None:
        size = getattr(getattr(module.forecaster, "network", None), "frame_size", None)
        now = checkpoint.card(cfg, data)
        checkpoint.check_matches(start, now, frame_size=size, resume=cfg.run == "fit")
    watched = {f"callbacks.{name}.monitor": part.get("monitor") for name, part in cfg.callbacks.items()}
    for where, metric in {"monitor.metric": cfg.monitor.metric, **watched}.items():
        if metric is not None and metric not in module.monitors:
            raise UserError(f"{where} is {metric}; choose one of {', '.join(nearest(metric, module.monitors))}.")
    found = torch.accelerator.current_accelerator()
    if cfg.trainer.accelerator == "auto" and found is not None and found.type == "mps":
        cfg.trainer.accelerator = "cpu"  # Apple's MPS has no float64, in which scores are summed
    loggers = [config.build(part) for part in cfg.logger.values()]
    callbacks = [config.build(part) for part in cfg.callbacks.values()]
    plugins = [checkpoint.WholeFiles(), *launch.environment()]
    trainer: pl.Trainer = config.build(cfg.trainer, logger=loggers or False, callbacks=callbacks, plugins=plugins)
    try:
        with launch.others(trainer, Path(__file__), OmegaConf.to_yaml(cfg, resolve=True)):
            rank_zero_only(begin)(cfg, trainer, module, data, start)
            if cfg.run == "fit" and trained:
                return fit_and_test(trainer, module, data, start)
            trainer.test(module, data, ckpt_path=start, verbose=False, weights_only=True)
            return None
    finally:
        for logger in loggers:
            if isinstance(logger, WandB):  # the next job of a sweep is a run of its own
                logger.finish(failed=sys.exc_info()[0] is not None)


def nearest(given: str, names: Sequence[str]) -> list[str]:
    """The first of many names, and some that are like the one that was given."""
    return list(dict.fromkeys([names[0], *(difflib.get_close_matches(given, names, n=5) or names[1:8])]))


def starting_point(cfg: DictConfig) -> str | None:
    """The checkpoint to go on from, or to score: one that is named, or the run folder's own."""
    own = Path(cfg.folder) / "checkpoints"
    if cfg.resume is not None:
        if cfg.ckpt_path is not None or cfg.run != "fit":
            raise UserError(
                "resume=auto looks for the checkpoint of a run to go on with; use it without ckpt_path and run."
            )
        return str(own / "last.ckpt") if (own / "last.ckpt").exists() else None
    if cfg.run == "fit" and cfg.ckpt_path is None and (own / "last.ckpt").exists():
        raise UserError(
            f"{cfg.folder} holds a training already; go on with it by resume=auto, or choose another folder."
        )
    return str(own / f"{cfg.ckpt_path}.ckpt") if cfg.ckpt_path in ("last", "best") else cfg.ckpt_path


def fit_and_test(trainer: pl.Trainer, module: NowcastModule, data: FrameData, start: str | None) -> float | None:
    """Trains, scores the best checkpoint, and returns the best value of the monitor."""
    if start is not None:
        # Lightning would do so too, but for a sharded network only after its loaders have begun to draw.
        data.load_state_dict(checkpoint.read(start)[type(data).__qualname__])
    trainer.fit(module, data, ckpt_path=start, weights_only=True)
    # The test stands in the row after the last step, also where Lightning had nothing left to train.
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
    chosen = trainer.checkpoint_callback
    best = getattr(chosen, "best_model_path", "") or None
    if best is None and trainer.is_global_zero:
        print("Nothing was validated: the last weights are scored.")
    trainer.test(module, data, ckpt_path=best, verbose=False, weights_only=True)
    value = getattr(chosen, "best_model_score", None)
    return None if value is None else float(value)


def try_out(optimizer: OptimizerFactory, scheduler: SchedulerFactory) -> None:
    """Builds both for one weight, so that a wrong argument is told before anything else happens."""
    try:
        made = optimizer([nn.Parameter(torch.zeros(1))])
        schedule = scheduler(made, **horizon(scheduler, 10))
        made.step()
        schedule.step()
    except UserError:
        raise
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"This optimizer or its scheduler cannot be: {error}") from None


def quieten() -> None:
    """Keeps the console for what the user asked to know."""
    # Lightning's advertisements and its account of the devices; its warnings still come through.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # batches are made faster than they are used, or data.workers says so
        ".*LeafSpec.*",  # Lightning's own use of something in torch that will go
        ".*exists and is not empty.*",  # a run folder is resumed into
        ".*smaller than the logging interval.*",
        ".*sync_dist=True.*",  # what is logged is the same in all processes: metrics that have added up over them
        ".*returned a view tensor.*",  # nobody writes into what a sharded network answers
        ".*all_gather is deprecated.*",  # torch's, by Lightning
        ".*compute.. method of metric.*was called before.*",  # counts may be recalled, or lie in another process
        ".*was called before the ``update`` method.*",  # counts that are recalled are merged
        ".*your dataloader is not resumable.*",  # the datamodule's state tells the sampler where to go on
    ):
        warnings.filterwarnings("ignore", message=message)


def begin(cfg: DictConfig, trainer: pl.Trainer, module: NowcastModule, data: FrameData, start: str | None) -> None:
    """Clears what a killed training left half-written, writes config.yaml, and says in a line what begins."""
    if cfg.run == "fit":
        clear(Path(cfg.folder))
        (Path(cfg.folder) / "error.txt").unlink(missing_ok=True)
    shown = checkpoint.told(cfg)
    with whole(Path(cfg.folder) / "config.yaml") as path:
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(shown)), encoding="utf-8")
    parameters = sum(weight.numel() for weight in module.parameters())
    known = {"parameters": parameters, "fingerprint": data.fingerprint, "commit": module.card["commit"]}
    for logger in trainer.loggers:
        logger.log_hyperparams({**shown, **known})
    sizes = " x ".join(map(str, data.grid.size))
    device = f"{trainer.world_size} {trainer.strategy.root_device.type}"
    print(
        f"{cfg.model.name}, {parameters:,} parameters: {data.task} of {sizes}, "
        f"{data.quantity.long_name} in {data.quantity.units}; on {device}; run folder {cfg.folder}"
        + ("" if start is None or cfg.run != "fit" else f"; goes on from {start}")
    )


def sentence(error: Exception) -> UserError | None:
    """What is for the user to mend: our own sentences, what the machine refuses, and what Lightning finds wrong."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in REFUSALS:
        where = error.filename or "a file of the run folder"
        return UserError(f"Cannot open or write {where}: {error.strerror}; make room, or choose another folder.")
    if isinstance(error, (MisconfigurationException, ValueError)) and error.__traceback__ is not None:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith("lightning."):
            return UserError(f"Lightning's Trainer says: {config.first_line(error)}.")
    return None


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def run(cfg: DictConfig) -> float | None:
    """What Hydra calls, once for a run and once for each job of a sweep."""
    cfg.folder = HydraConfig.get().runtime.output_dir
    try:
        config.check(cfg)
        return train(cfg)
    except Exception as error:
        mistake = sentence(error)
        # For the table of runs; a run that is finished stays so, and the disk may be full.
        if cfg.run == "fit" and not (Path(cfg.folder) / "skill.nc").exists():
            with contextlib.suppress(OSError), whole(Path(cfg.folder) / "error.txt") as path:
                path.write_text(f"{mistake or config.first_line(error)}\n", encoding="utf-8")
        if HydraConfig.get().mode is RunMode.RUN:
            if mistake is None:
                raise
            raise SystemExit(f"error: {mistake}") from None
        # The other jobs of the sweep go on; Hydra raises the first mistake again when all have ended.
        print(f"error: {cfg.folder}: {mistake or config.first_line(error)}", file=sys.stderr)
        raise (mistake or error) from None


def main() -> None:
    """The command line: every mistake in it is said in one sentence before anything runs."""
    quieten()
    if launch.is_worker():
        try:
            train(DictConfig(OmegaConf.create(launch.receive())))
        except UserError as error:
            raise SystemExit(f"error: process {os.environ['LOCAL_RANK']}: {error}") from None
        return
    given = get_args_parser().parse_args(sys.argv[1:])
    # Another configuration folder is Hydra's own business.
    elsewhere = given.config_dir or given.config_path or given.config_name
    if not (elsewhere or given.help or given.hydra_help or given.info or given.shell_completion):
        try:
            accepted = command_line.accept(CONF, given.overrides)
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
        replaced = dict(zip(given.overrides, accepted, strict=True))
        sys.argv[1:] = [replaced.get(one, one) for one in sys.argv[1:]]
        sys.argv += launch.same_folder(given.overrides)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come through as they are, so that the next line can tell them apart
    try:
        run()
    except (UserError, OSError) as error:  # the run folder is made by Hydra
        mistake = sentence(error)
        if mistake is None:
            raise
        raise SystemExit(f"error: {mistake}") from None


if __name__ == "__main__":
    main()
