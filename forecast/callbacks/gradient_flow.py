"""How far back the loss of a training reaches, measured on the same windows from its beginning to its end."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
from torch import Tensor

from forecast.batch import Frames
from forecast.errors import UserError
from forecast.files import whole
from forecast.forecaster import NetworkForecaster
from forecast.gradients import NAME, factors, flow, flow_figure, read
from forecast.module import NowcastModule


class GradientFlow(pl.Callback):
    """Measures |dLoss/dh(t)| against lag (`forecast.gradients`) on the first validation batch.

    The loss of the last forecast frame alone is differentiated by the states: it is as far away from each of them as lag
    says, while that of all frames is near to some. The norms of the weights' gradients are of the loss of all. All is in
    the precision of the weights, since tiny gradients are what is looked for.

    gradient_flow.csv holds every measurement and figures/gradient_flow.png draws the first and the last;
    gradient_flow/<layer>/<h or c> is logged: the factor by which the norm changes per step backwards. The first process
    measures, and nothing that trains is touched.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._batch: Frames | None = None
        self._measured = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device_mesh is not None:
            raise UserError("callbacks=gradient_flow needs whole weights, but trainer=fsdp shards them; leave one out.")
        if trainer.is_global_zero:
            self._batch = _first_batch(trainer)
            if trainer.global_step == 0:
                self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure(trainer, pl_module)
        self._batch = None

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        # Without a batch: another process, or a trial validation before training.
        if self._batch is None or self._measured == step:
            return
        self._measured = step
        assert isinstance(module, NowcastModule)
        assert isinstance(module.forecaster, NetworkForecaster)
        found = flow(module.forecaster.network, losses_of(module, self._batch), module.future)
        found.insert(0, "step", step)
        path = self.folder / NAME
        if path.exists():
            # A run that goes on measures again what a killed one had measured after its checkpoint.
            known = read(path)
            found = pd.concat([known[known["step"] < step], found])
        with whole(path) as temporary:
            found.to_csv(temporary, index=False)
        with whole(self.folder / "figures" / "gradient_flow.png") as temporary:
            flow_figure({module.name: found}).savefig(temporary, dpi=150)
        if step:
            metrics = {f"gradient_flow/{name}": one for name, one in factors(found[found["step"] == step]).items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step - 1)


def _first_batch(trainer: pl.Trainer) -> Frames:
    """The first validation batch, read here: a loader would start its workers, and draw a random number."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it where mypy does not look
    loader = data.val_dataloader()
    return trainer.strategy.batch_to_device(loader.dataset[next(iter(loader.sampler))])


def losses_of(module: NowcastModule, batch: Frames) -> Callable[[], tuple[Tensor, Tensor]]:
    """What runs the network on a batch, and answers the loss of the last forecast frame, and of all."""

    def losses() -> tuple[Tensor, Tensor]:
        forecaster, loss = module.forecaster, module.loss
        assert isinstance(forecaster, NetworkForecaster)
        assert loss is not None
        raw = forecaster(batch.past, module.future, batch.static).raw[:, -module.future :].float()
        parts = (raw, forecaster.transform.forward(batch.truth), batch.valid, batch.truth)
        return loss(*(one[:, -1:] for one in parts)), loss(*parts)

    return losses
