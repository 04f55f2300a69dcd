"""Many of NumPy's generators side by side give the numbers that each of them gives alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.generators import integers, uniform

POSITIONS = np.array([0, 1, 2, 9_999, 2**31, 2**32 - 1])


@given(seed=st.lists(st.integers(0, 2**100), max_size=6), draws=st.integers(0, 12))
def test_each_position_draws_what_its_own_generator_would(seed: list[int], draws: int) -> None:
    expected = [np.random.default_rng((*seed, position)).random(draws) for position in POSITIONS.tolist()]
    np.testing.assert_array_equal(uniform(seed, POSITIONS, draws), expected)


@pytest.mark.parametrize("number", [0, 1, 2**32 - 1, 2**32, 2**64, 2**64 + 2**32 - 1])
def test_numbers_of_any_length_are_seeds(number: int) -> None:
    for seed in ((number,), (number, 0), (3, 1, number)):
        expected = [np.random.default_rng((*seed, position)).random(7) for position in POSITIONS.tolist()]
        np.testing.assert_array_equal(uniform(seed, POSITIONS, 7), expected)


def test_a_position_draws_the_same_whatever_is_drawn_beside_it() -> None:
    together = uniform((0, 2, 5), np.arange(100), 10)
    np.testing.assert_array_equal(uniform((0, 2, 5), np.array([70, 3]), 10), together[[70, 3]])
    np.testing.assert_array_equal(uniform((0, 2, 5), np.array([70, 3]), 4), together[[70, 3], :4])
    assert uniform((0,), np.array([], np.int64), 3).shape == (0, 3)


@given(
    seed=st.lists(st.integers(0, 2**100), max_size=4),
    most=st.lists(st.sampled_from([0, 1, 160, 2**16, 3 * 2**30, 2**32 - 2]), min_size=1, max_size=7),
)
def test_each_position_draws_the_integers_of_its_own_generator(seed: list[int], most: list[int]) -> None:
    mosts = np.array([np.roll(most, turn) for turn in range(len(POSITIONS))], np.int64).reshape(len(POSITIONS), -1)
    expected = [
        np.random.default_rng((*seed, position)).integers(0, own, endpoint=True)
        for position, own in zip(POSITIONS.tolist(), mosts, strict=True)
    ]
    np.testing.assert_array_equal(integers(seed, POSITIONS, mosts), expected)


def test_unfair_draws_are_repeated() -> None:
    """Of 3 * 2**30 + 1 numbers one draw in four is."""
    positions, most = np.arange(200), np.full((200, 5), 3 * 2**30)
    expected = [np.random.default_rng((1, n)).integers(0, own, endpoint=True) for n, own in enumerate(most)]
    np.testing.assert_array_equal(integers((1,), positions, most), expected)
