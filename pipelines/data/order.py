"""The order of training samples: endless, seeded, and addressed by position, so that any worker can find sample p without the others.

One epoch permutes the shards, groups them into windows of `window` shards, and shuffles the samples inside each window: global enough
to train on, while a reader holds only one window of shards at a time. Position p is place p % n of epoch p // n, n samples an epoch.
Nothing here depends on the number of workers, loaders or the batch, which is what makes a resumed or resized run exact.
Not covered: which samples there are (`clip_index.py`) and reading them (`feed.py`).
"""

import bisect
import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDERS_HELD = 16
"""Windows, and epochs, whose order is kept: those of every task of a language model's training at once."""


def sample_order(shard_sizes: tuple[int, ...], *, seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """One whole epoch as (n, 2) rows of (shard, index in the shard); every sample once."""
    order = Order(shard_sizes, seed=seed, window=window)
    return order.at(np.arange(len(order), dtype=np.int64) + epoch * len(order))


def sample_seed(seed: int, position: int) -> int:
    """The random seed of the sample at global `position`: 63 bits, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Order:
    """The endless order over shards of the given sizes (empty ones are fine)."""

    shard_sizes: tuple[int, ...]
    seed: int
    window: int

    def __len__(self) -> int:
        """Samples of one epoch."""
        return sum(self.shard_sizes)

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """(k, 2) rows of (shard, index) for k global positions; a run of neighbours costs one shuffle of each window it touches."""
        found = np.empty((len(positions), 2), dtype=np.int64)
        epochs, places = np.divmod(positions, len(self))
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._in_epoch(int(epoch), places[here])
        return found

    def one(self, position: int) -> tuple[int, int]:
        """(shard, index) of one global position: `at` for those who ask for each sample by itself, without its arrays."""
        epoch, place = divmod(position, len(self))
        windows, ends = _windows(self.shard_sizes, self.seed, self.window, epoch)
        number = bisect.bisect_right(ends, place)
        rows = _shuffled(self.shard_sizes, windows[number], (self.seed, epoch, number))
        shard, index = rows[place - (int(ends[number - 1]) if number else 0)]
        return int(shard), int(index)

    def _in_epoch(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        windows, ends = _windows(self.shard_sizes, self.seed, self.window, epoch)
        found = np.empty((len(places), 2), dtype=np.int64)
        which = np.searchsorted(ends, places, side="right")
        for number in np.unique(which):
            here = which == number
            first = int(ends[number - 1]) if number else 0
            rows = _shuffled(self.shard_sizes, windows[number], (self.seed, epoch, int(number)))
            found[here] = rows[places[here] - first]
        return found


@lru_cache(maxsize=ORDERS_HELD)
def _windows(shard_sizes: tuple[int, ...], seed: int, window: int, epoch: int) -> tuple[list[tuple[int, ...]], NDArray[np.int64]]:
    """The shards of each window of an epoch, and the place just after each window's last sample."""
    shards = np.random.default_rng([seed, epoch]).permutation(len(shard_sizes)).tolist()
    groups = [tuple(shards[first : first + window]) for first in range(0, len(shards), window)]
    return groups, np.cumsum([sum(shard_sizes[shard] for shard in group) for group in groups], dtype=np.int64)


@lru_cache(maxsize=ORDERS_HELD)
def _shuffled(shard_sizes: tuple[int, ...], shards: tuple[int, ...], seed: tuple[int, int, int]) -> NDArray[np.int64]:
    """The samples of one window, shuffled: (n, 2)."""
    rows = np.concatenate([np.stack([np.full(shard_sizes[shard], shard), np.arange(shard_sizes[shard])], axis=1) for shard in shards])
    return rows[np.random.default_rng([*seed, 1]).permutation(len(rows))]
