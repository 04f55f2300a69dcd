"""Networks that outgrow a GPU: weights, gradients and optimizer states shared out over the processes (FSDP)."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from forecast.recurrence import Layer


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for a module that shards itself (in `configure_model`), on GPUs and on CPU processes.

    Its checkpoints are those of every other strategy: one file, written by the first process, with whole tensors.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn is not TrainerFn.FITTING:
            # Lightning would load a state for each optimizer that training left, and plain SGD keeps none.
            self.optimizers = []
        super().setup(trainer)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each process its share of every weight, in place; a network that is sharded already stays as it is.

    A recurrent layer has its weights whole only while it runs, forward and backward; what stands outside the layers,
    while the network runs. Gradients are shared out as soon as a layer has them, optimizer states are never whole.
    Every process must bring the same weights.

    Args:
        network: in model space.
        mesh: of all processes, laid out in whatever way.

    Reference: Zhao et al. (2023), PyTorch FSDP, PVLDB 16, 3848, doi 10.14778/3611540.3611569.
    """
    if isinstance(network, FSDPModule):
        return
    row = init_device_mesh(mesh.device_type, (mesh.size(),))
    for layer in [module for module in network.modules() if isinstance(module, Layer)]:
        fully_shard(layer, mesh=row)
        for method in ("sequence", "initial_state"):
            # torch gathers weights around `forward`, which layers do not have, and around what is registered.
            register_fsdp_forward_method(layer, method)
    # torch would leave the outermost weights whole after a forecast: zeroing gradients by the network would miss theirs.
    fully_shard(network, mesh=row, reshard_after_forward=True)
