"""Order: every sample once an epoch, the same at any position however it is asked for."""

import numpy as np
import pytest

from kinetok.pipelines.data.order import Order, sample_order, sample_seed

SIZES = (5, 0, 32, 7, 32, 1)


@pytest.mark.parametrize("window", [1, 2, 100])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_holds_every_sample_once(window: int, epoch: int) -> None:
    rows = sample_order(SIZES, seed=1, epoch=epoch, window=window)
    expected = {(shard, index) for shard, size in enumerate(SIZES) for index in range(size)}
    assert len(rows) == len(expected)
    assert {(int(shard), int(index)) for shard, index in rows} == expected


def test_a_position_is_the_same_sample_however_it_is_asked_for() -> None:
    order = Order(SIZES, seed=7, window=2)
    everything = order.at(np.arange(300))
    assert (np.concatenate([order.at(np.arange(p, p + 1)) for p in range(300)]) == everything).all()
    backwards = np.arange(299, -1, -1)
    assert (order.at(backwards) == everything[::-1]).all()
    assert [order.one(position) for position in range(300)] == [tuple(row) for row in everything.tolist()]


def test_epochs_seeds_and_windows_differ() -> None:
    first = sample_order(SIZES, seed=1, epoch=0, window=2)
    assert (first != sample_order(SIZES, seed=1, epoch=1, window=2)).any()
    assert (first != sample_order(SIZES, seed=2, epoch=0, window=2)).any()


def test_a_window_holds_only_its_own_shards() -> None:
    rows = sample_order((10,) * 12, seed=3, epoch=0, window=3)
    assert [len(set(rows[first : first + 30, 0])) for first in range(0, 120, 30)] == [3, 3, 3, 3]
    assert len(set(rows[:10, 0])) > 1, "samples of a window must mix"


def test_the_order_is_pinned() -> None:
    """A change here changes what every earlier run would have trained on: bump the version of `train` with it."""
    assert sample_order((2, 3), seed=0, epoch=0, window=2).tolist() == [[1, 0], [0, 0], [1, 2], [1, 1], [0, 1]]
    assert sample_seed(0, 0) == 2928822574489494037


def test_sample_seeds_differ_and_fit_int64() -> None:
    seeds = {sample_seed(seed, position) for seed in range(3) for position in range(1000)}
    assert len(seeds) == 3000
    assert min(seeds) >= 0 and max(seeds) < 2**63
