"""Learning-rate schedules as pure functions of the step, over the whole training."""

from math import cos, pi

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from forecast.errors import UserError


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.1) -> LambdaLR:
    """The learning rate rises linearly in the first part of the training, then falls to 0 along half a cosine.

    Args:
        optimizer: has the highest learning rate.
        total_steps: of the training.
        warmup: the part of the training in which it rises, 0 to below 1.
    """
    if not 0 <= warmup < 1:
        raise UserError(f"scheduler.warmup is {warmup}; it is a share of the training, from 0 to below 1.")
    rising = warmup * total_steps

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return (1 + cos(pi * min(1.0, (step - rising) / max(1.0, total_steps - rising)))) / 2

    return LambdaLR(optimizer, share)
