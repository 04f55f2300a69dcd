"""Truncated backpropagation through time: what a lane remembers from chunk to chunk, and where gradients end.

A training batch is a chunk of `steps` frames from each of B streams (`datamodules.streams`). Its frames are read in order,
starting from the state that the lane's last chunk ended with; every `every` frames a forecast is issued and costs. After the
chunk the optimizer may step, and the state goes on without its gradient. So `steps` says how far gradients reach back, and
nothing else: the forecasts of a stream are issued at the same times whatever it is.

Reference: Williams, Peng (1990), doi 10.1162/neco.1990.2.4.490.

Axes: B lanes, K frames of a chunk, T frames of a window, S forecast frames, C channels, H W space.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from forecast.batch import Frames
from forecast.cells.cell import State
from forecast.errors import UserError


class TruncatedBPTT:
    """Cuts chunks into windows, and carries the state of each lane without its gradient.

    Args:
        steps: frames of a chunk, K; a multiple of `every`.
        every: frames between two forecasts, T.

    Raises:
        UserError: they do not go together.
    """

    def __init__(self, steps: int, every: int) -> None:
        if min(steps, every) < 1 or steps % every:
            raise UserError(
                f"tbptt.steps is {steps} and tbptt.every {every}; give 1 or more, steps a multiple of every: a chunk "
                "ends where a forecast is issued."
            )
        self.steps = steps
        self.every = every
        self.state: list[State] | None = None
        """Of each layer, with the lanes in the first axis; None before the first chunk."""

    def windows(self, chunk: Frames) -> list[Frames]:
        """A chunk as windows that follow each other, T past frames and S truths each; lanes begin anew in the first alone.

        `time` stays that of the chunk.
        """
        S = chunk.truth.shape[1]
        real = (chunk.block >= 0).view(-1, 1, 1, 1, 1)
        frames = torch.cat([chunk.past, chunk.truth], dim=1)
        valid = torch.cat([chunk.known & real, chunk.valid], dim=1)
        windows = []
        for begin in range(0, chunk.past.shape[1], self.every):
            issue = begin + self.every
            windows.append(
                chunk._replace(
                    past=chunk.past[:, begin:issue],
                    known=chunk.known[:, begin:issue],
                    truth=frames[:, issue : issue + S],
                    valid=valid[:, issue : issue + S],
                    first=chunk.first if begin == 0 else torch.zeros_like(chunk.first),
                )
            )
        return windows

    def carried(self, device: torch.device) -> list[State] | None:
        """The state that the next chunk begins with."""
        return None if self.state is None else [tuple(one.to(device) for one in layer) for layer in self.state]

    def carry(self, state: Sequence[State] | None) -> None:
        """Keeps the state after a chunk for the next one, cut off from its graph.

        A copy of it, since a network that is compiled to CUDA graphs writes its next state in the same place.
        """
        self.state = None if state is None else [tuple(one.detach().clone() for one in layer) for layer in state]

    def gathered(self, all_gather: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
        """The state of the lanes of all processes, in the order in which `datamodules.streams` numbers them, on the CPU.

        Args:
            all_gather: B ... of each process -> P B ... of all.
        """
        # Lane i of process p is number i * P + p.
        return [
            [all_gather(one.contiguous()).reshape(-1, *one.shape).transpose(0, 1).flatten(0, 1).cpu() for one in layer]
            for layer in self.state or []
        ]

    def restore(self, lanes: Sequence[Sequence[Tensor]], rank: int, world_size: int) -> None:
        """Takes this process's lanes out of what `gathered` gave."""
        mine = [tuple(one[rank::world_size] for one in layer) for layer in lanes]
        self.state = mine or None
