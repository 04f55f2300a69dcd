"""Packed numbers, physical values and model space: what goes there comes back, and what is missing stays missing."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from forecast.errors import UserError
from forecast.units import (
    Z_R_RELATIONS,
    ZR,
    Decibel,
    Grid,
    Linear,
    Log,
    Quantity,
    Transform,
    default_transform,
    transform_from_dict,
    transform_to_dict,
    z_r_relation,
)

DBZ = Quantity("dbz", "reflectivity", "dBZ", (20.0,), floor=-10.0, scale=0.5, offset=-10.0, missing=255.0)
RAIN = Quantity(
    "rain", "rain rate", "mm/h", (0.5, 2.0), relation=ZR(200.0, 1.6), scale=0.5, offset=-10.0, missing=255.0
)
FLOATS = Quantity("rain", "rain rate", "mm/h", (0.5,))

relations = pytest.mark.parametrize("relation", Z_R_RELATIONS)


def rates(least: float, greatest: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(least, greatest, width=32), min_size=1, max_size=20)


def back_and_forth(transform: Transform, values: list[float]) -> tuple[Tensor, Tensor]:
    given_ = torch.tensor(values)
    return transform.inverse(transform.forward(given_)), given_


def test_packed_bytes_become_physical_and_the_missing_number_the_floor() -> None:
    values, valid = DBZ.decode(torch.tensor([0, 1, 60, 254, 255], dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert values.tolist() == [-10.0, -9.5, 20.0, 117.0, -10.0]
    assert valid.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32, torch.float64])
def test_every_packing_of_the_same_numbers_decodes_alike(dtype: torch.dtype) -> None:
    packed = torch.arange(256).view(2, 2, 1, 8, 8)
    values, valid = DBZ.decode(packed.to(dtype))
    assert torch.equal(values, torch.where(packed == 255, -10.0, packed * 0.5 - 10))
    assert torch.equal(valid, packed != 255)


def test_floats_that_are_not_finite_are_missing_and_become_the_floor() -> None:
    values, valid = FLOATS.decode(torch.tensor([torch.nan, torch.inf, -torch.inf, -0.1, 0.0, 3.5]))
    assert values.tolist() == [0, 0, 0, 0, 0, 3.5]
    assert valid.tolist() == [False, False, False, True, True, True]


def test_a_relation_turns_dbz_into_rain_and_none_where_there_is_no_echo() -> None:
    values, valid = RAIN.decode(torch.tensor([0, 1, 66, 255], dtype=torch.uint8))
    expected = [0.0, (10 ** (-9.5 / 10) / 200) ** (1 / 1.6), (10 ** (23 / 10) / 200) ** (1 / 1.6), 0.0]
    assert values.tolist() == pytest.approx(expected, rel=1e-5)
    assert valid.tolist() == [True, True, True, False]


@given(dbz=rates(-30, 70))
@relations
def test_z_r_relations_invert(relation: str, dbz: list[float]) -> None:
    zr = z_r_relation(relation)
    torch.testing.assert_close(zr.reflectivity(zr.rain_rate(torch.tensor(dbz))), torch.tensor(dbz), rtol=0, atol=1e-3)


@given(rain=rates(0.0078125, 300))
@relations
def test_z_r_relations_invert_the_other_way(relation: str, rain: list[float]) -> None:
    zr = z_r_relation(relation)
    torch.testing.assert_close(zr.rain_rate(zr.reflectivity(torch.tensor(rain))), torch.tensor(rain), rtol=1e-4, atol=0)


def test_marshall_and_palmer_by_hand() -> None:
    """Z = 200 R^1.6: 1 mm/h is 23 dBZ, ten times the rain is 16 dB more, and no rain is none."""
    dbz = z_r_relation("marshall_palmer").reflectivity(torch.tensor([1.0, 10.0, 0.0]))
    assert dbz.tolist() == pytest.approx([23.0103, 39.0103, -torch.inf], abs=1e-3)


def test_an_unknown_relation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        UserError, match="Unknown Z-R relation 'mars'; choose one of marshall_palmer, wsr88d, hko7, dwd"
    ):
        z_r_relation("mars")


@given(values=rates(-10, 80))
def test_linear_inverts_from_its_low_end_on(values: list[float]) -> None:
    back, there = back_and_forth(Linear(low=-10.0, high=60.0), values)
    torch.testing.assert_close(back, there, rtol=1e-5, atol=1e-4)


@given(dbz=rates(-9.9375, 60))
@relations
def test_decibel_inverts_between_its_ends(relation: str, dbz: list[float]) -> None:
    rain = z_r_relation(relation).rain_rate(torch.tensor(dbz)).tolist()
    back, there = back_and_forth(Decibel(relation), rain)
    torch.testing.assert_close(back, there, rtol=1e-4, atol=0)


@given(values=rates(0, 1000))
def test_log_inverts_up_to_ten_times_its_high_end(values: list[float]) -> None:
    back, there = back_and_forth(Log(), values)
    torch.testing.assert_close(back, there, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("transform", [Linear(0.0, 60.0), Decibel(), Log()])
def test_nothing_is_0_and_comes_back_as_nothing(transform: Transform) -> None:
    assert float(transform.forward(torch.tensor(0.0))) == 0
    assert transform.inverse(torch.tensor([0.0, -0.3])).tolist() == [0, 0]


@pytest.mark.parametrize("transform", [Linear(0.0, 60.0), Decibel(), Log()])
def test_more_rain_is_a_greater_number_and_the_other_way_round(transform: Transform) -> None:
    numbers = transform.forward(torch.linspace(0.1, 60, 200))
    assert (numbers.diff() > 0).all()
    assert (transform.inverse(torch.linspace(0, 1, 200)).diff() > 0).all()
    assert torch.isfinite(transform.inverse(torch.tensor([-1e6, 1e6]))).all()


@given(dbz=rates(-10, 60))
def test_decibel_with_hko7s_relation_is_hko7s_pixel(dbz: list[float]) -> None:
    rain = (torch.pow(10.0, torch.tensor(dbz) / 10) / 58.53).pow(1 / 1.56)
    torch.testing.assert_close(Decibel("hko7").forward(rain), (torch.tensor(dbz) + 10) / 70, rtol=0, atol=1e-5)


def test_beyond_its_ends_decibel_saturates() -> None:
    transform = Decibel("hko7")
    assert transform.forward(torch.tensor([0.0, 1e-9, 1e9])).tolist() == [0, 0, 1]
    assert transform.inverse(torch.tensor(2.0)) == transform.inverse(torch.tensor(1.0))


@relations
def test_the_default_transform_keeps_the_archives_own_relation(relation: str) -> None:
    rain = Quantity("rain", "rain rate", "mm/h", (0.5,), relation=Z_R_RELATIONS[relation])
    assert default_transform(rain) == Decibel(relation)
    assert default_transform(FLOATS) == Decibel("marshall_palmer")
    assert default_transform(DBZ) == Linear(-10.0, 60.0)
    assert default_transform(Quantity("x", "grey", "1", (0.5,))) == Linear(0.0, 1.0)


@pytest.mark.parametrize("quantity", [DBZ, RAIN, FLOATS])
def test_a_quantity_comes_back_from_json(quantity: Quantity) -> None:
    assert Quantity.from_dict(json.loads(json.dumps(quantity.to_dict()))) == quantity


@pytest.mark.parametrize(
    "grid",
    [
        Grid((12, 14)),
        Grid((2, 3), (46.0, 11.0), (-0.01, 0.014), "degrees", {"grid_mapping_name": "latitude_longitude"}),
    ],
)
def test_a_grid_comes_back_from_json(grid: Grid) -> None:
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


@pytest.mark.parametrize("transform", [Linear(-10.0, 60.0), Decibel("dwd", -5.0, 55.0), Log(0.2, 50.0)])
def test_a_transform_comes_back_from_json(transform: Transform) -> None:
    assert transform_from_dict(json.loads(json.dumps(transform_to_dict(transform)))) == transform
