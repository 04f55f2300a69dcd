"""Numbers that are looked up are those that the quantity decodes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.decoding import decode
from forecast.units import Quantity, z_r_relation

DBZ = Quantity("z", "z", "dBZ", (10.0,), floor=-10.0, scale=0.5, offset=-32.0, missing=100.0)
RATE = Quantity("r", "r", "mm/h", (1.0,), scale=0.5, offset=-10.0, relation=z_r_relation("hko7"))
TYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.float32]


def packed(dtype: torch.dtype) -> Tensor:
    """Every number of 8 bits, and the ends of the type, in a part of a larger tensor: B T C H W, not contiguous."""
    numbers = np.random.default_rng(0).permutation(2 * 5 * 7 * 13) % 256
    frames = torch.from_numpy(numbers - (0 if dtype == torch.uint8 else 128)).reshape(2, 5, 1, 7, 13).to(dtype)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        frames[0, 0, 0, 0, :2] = torch.tensor([limits.min, limits.max], dtype=dtype)
    else:
        frames[0, 0, 0, 0, 0] = np.nan
    return frames[:, :3]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("quantity", [DBZ, RATE], ids=["dBZ", "mm/h"])
def test_numbers_mean_what_the_quantity_says(quantity: Quantity, dtype: torch.dtype) -> None:
    for numbers in (packed(dtype), packed(dtype)[0, 0, 0, 0, 0], packed(dtype)[:0]):
        values, valid = decode(quantity, numbers)
        expected, observed = quantity.decode(numbers)
        assert (values.dtype, values.shape, valid.dtype) == (torch.float32, numbers.shape, torch.bool)
        assert torch.equal(valid, observed)
        # By a relation the last bit of a power depends on where in a tensor it stands.
        torch.testing.assert_close(values, expected, rtol=0 if quantity is DBZ else 4e-7, atol=0)


def test_a_number_means_the_same_wherever_it_stands() -> None:
    values, _ = decode(RATE, packed(torch.uint8))
    for number in range(256):
        assert len(values[packed(torch.uint8) == number].unique()) <= 1


def test_what_a_validation_decodes_serves_a_training() -> None:
    quantity = replace(RATE, scale=0.25)  # of no other test: nothing is known of it yet
    numbers = packed(torch.uint8)
    with torch.inference_mode():
        decode(quantity, numbers)
    weight = torch.ones((), requires_grad=True)
    values, _ = decode(quantity, numbers)
    (values * weight).sum().backward()
    torch.testing.assert_close(weight.grad, quantity.decode(numbers)[0].sum())
