"""Which source each batch of a mixture comes from, as a function of its number alone, so that a resumed run needs no state.

Every batch is of one source: lengths and losses of comprehension and generation have little in common. Training has no end: in each cycle
of batches a source has its share exactly, in an order of the cycle's own (`Mixture`). Evaluation takes every sample once (`Once`). Not
covered: the order of samples inside a source.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

CYCLE = 100
"""Batches of one cycle; a weight of less than about half a batch of it is never drawn."""


class Mixture:
    """Sources with weights."""

    def __init__(self, weights: Mapping[str, float], *, seed: int) -> None:
        """ValueError where a weight is so small that its source would never be drawn."""
        self.sources, self.seed = tuple(weights), seed
        share = CYCLE * np.array(list(weights.values())) / sum(weights.values())
        # Largest remainders: whole batches first, then one more for those that lost most by rounding.
        counts = np.floor(share).astype(int)
        counts[np.argsort(counts - share, kind="stable")[: CYCLE - counts.sum()]] += 1
        if not counts.all():
            rare = self.sources[int(counts.argmin())]
            raise ValueError(f"a weight of {weights[rare]} gives {rare} none of {CYCLE} batches: raise it, or leave the source out")
        self.counts = counts
        self._cycle = lru_cache(maxsize=2)(self._shuffled)

    def draw(self, batch: int) -> tuple[str, int]:
        """The source of batch number `batch`, and how many batches of that source came before it."""
        cycle, place = divmod(batch, CYCLE)
        order = self._cycle(cycle)
        source = order[place]
        return self.sources[source], int(cycle * self.counts[source] + np.count_nonzero(order[:place] == source))

    def _shuffled(self, cycle: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        order = np.repeat(np.arange(len(self.sources)), self.counts)
        return np.random.Generator(np.random.PCG64([self.seed, cycle])).permutation(order)


class Once:
    """Every sample of every source, once.

    Groups of one source follow each other, those of a source spread evenly and its first one early: an evaluation that ends before all is
    seen has seen something of each.
    """

    def __init__(self, sizes: Sequence[int], *, group: int) -> None:
        """Sources of so many samples, in groups of `group`, the last of each source as short as it is."""
        starts = [np.arange(0, size, group) for size in sizes]
        share = np.concatenate([start / max(size, 1) for start, size in zip(starts, sizes, strict=True)])
        order = np.argsort(share, kind="stable")
        self.source = np.repeat(np.arange(len(sizes)), list(map(len, starts)))[order]
        self.first = np.concatenate(starts)[order]
        self.end = np.minimum(self.first + group, np.array(sizes)[self.source]).astype(np.int64)
        self.ends = np.cumsum(self.end - self.first)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def draw(self, position: int) -> tuple[int, int]:
        """The source of the sample at `position`, and its number there; past the end they begin again."""
        position %= len(self)
        group = int(np.searchsorted(self.ends, position, side="right"))
        return int(self.source[group]), int(self.end[group] - (self.ends[group] - position))
