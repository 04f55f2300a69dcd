"""Compiling a network."""

from torch import nn

from forecast.errors import UserError

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Of torch.compile. The second and third record what a GPU is to do as CUDA graphs, and launch each as a whole."""


def compile_network(network: nn.Module, how: bool | str) -> None:
    """Has a network compiled when it first runs; its weights and what is saved of it stay the same.

    In modes with CUDA graphs what the network gives lies where its next run writes; what is kept longer has to be copied.

    Args:
        network: to be compiled.
        how: one of `MODES`; true is the first, false leaves it as it is.

    Raises:
        UserError: there is no such mode.
    """
    mode = MODES[0] if how is True else how
    if mode is False:
        return
    if mode not in MODES:
        raise UserError(f"compile is {how!r}; give true, false, or a mode of torch.compile: {', '.join(MODES)}.")
    network.compile(mode=mode)
