"""Every sample once, whatever the number of processes."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.sampler import PADDING, BatchSampler

sizes = st.integers(1, 60)


@given(length=sizes, batch_size=st.integers(1, 9), world_size=st.integers(1, 5), shuffle=st.booleans())
def test_every_position_is_dealt_once_and_every_process_takes_as_many_batches(
    length: int, batch_size: int, world_size: int, shuffle: bool
) -> None:
    samplers = [
        BatchSampler(length, batch_size, shuffle=shuffle, seed=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    draws = [list(sampler) for sampler in samplers]
    assert {len(mine) for mine in draws} == {len(samplers[0])}
    assert {len(draw.positions) for draw in chain.from_iterable(draws)} == {batch_size}
    positions = list(chain.from_iterable(draw.positions for draw in chain.from_iterable(draws)))
    assert sorted(p for p in positions if p != PADDING) == list(range(length))
    assert positions.count(PADDING) == -length % (world_size * batch_size)


@given(length=sizes, seed=st.integers(0, 2**62), epoch=st.integers(0, 1000))
def test_the_order_is_a_function_of_seed_and_epoch(length: int, seed: int, epoch: int) -> None:
    orders = []
    for _ in range(2):
        sampler = BatchSampler(length, 4, shuffle=True, seed=seed)
        list(sampler)  # what was drawn before must not matter
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1]
    assert all(draw.epoch == epoch for draw in orders[0])


def test_epochs_and_seeds_differ_but_processes_share_one_order() -> None:
    def order(seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> list[int]:
        sampler = BatchSampler(50, 7, shuffle=True, seed=seed, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        return list(chain.from_iterable(draw.positions for draw in sampler))

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert [order(0, 0, rank, 2) for rank in range(2)] == [order(0, 0)[0::2], order(0, 0)[1::2]]


@given(length=sizes, batch_size=st.integers(1, 9), epoch=st.integers(0, 5), data=st.data())
def test_an_epoch_goes_on_where_it_was_left(length: int, batch_size: int, epoch: int, data: st.DataObject) -> None:
    whole = BatchSampler(length, batch_size, shuffle=True, seed=1)
    whole.set_epoch(epoch)
    done = data.draw(st.integers(0, len(whole)))
    rest = BatchSampler(length, batch_size, shuffle=True, seed=1, begin_at=lambda: (epoch, done))
    assert list(rest) == list(whole)[done:]


@given(length=sizes, batch_size=st.integers(1, 5), world_size=st.integers(1, 4))
def test_batches_of_all_processes_together_are_those_of_one(length: int, batch_size: int, world_size: int) -> None:
    one = BatchSampler(length, batch_size * world_size, shuffle=True, seed=2)
    many = [
        BatchSampler(length, batch_size, shuffle=True, seed=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for joined, parts in zip(one, zip(*many, strict=True), strict=True):
        assert sorted(joined.positions) == sorted(p for part in parts for p in part.positions)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_without_shuffling_the_order_is_that_of_time(world_size: int) -> None:
    for rank in range(world_size):
        sampler = BatchSampler(10, 4, shuffle=False, rank=rank, world_size=world_size)
        mine = [p for draw in sampler for p in draw.positions if p != PADDING]
        assert mine == list(range(rank, 10, world_size))
