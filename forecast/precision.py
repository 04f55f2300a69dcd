"""How exactly GPUs multiply numbers of 32 bits."""

import torch


def allow_tf32(allowed: bool) -> None:
    """Lets convolutions and matrix products on GPUs round the numbers of 32 bits that they multiply to 10 bits after the
    leading one (TF32), and sum in 32 bits; otherwise they keep 23. torch alone would let convolutions, and not products.

    On machines without a GPU nothing is set, for it would reach CPUs that can do the like.

    Reference: docs.pytorch.org, "TensorFloat-32 (TF32) on Ampere (and later) devices".
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
