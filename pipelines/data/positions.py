"""What every feed shares: batches of samples named by their global position, loaded in the worker itself or in processes beside it.

Micro-batch m of a job covers positions start + m * batch * world onwards, and each rank takes its run of them, so the global order
does not depend on the number of workers. Not covered: which sample stands at a position (`order.py`), loading it (the feeds).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from torch.utils.data import DataLoader, Dataset

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import DataError
from kinetok.infra.training import Batch

Split = Literal["train", "val"]


class Loads(Protocol):
    """A feed that can load samples by position; pickled to loader processes."""

    @property
    def loaders(self) -> int:
        """Loader processes of each training worker; 0 loads in the worker itself."""

    def load(self, positions: list[int]) -> Batch:
        """The samples at these global positions."""


def by_position(feed: Loads, *, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
    """This rank's micro-batches of `batch` samples from global position `start` on, without end."""
    loader: DataLoader[Batch] = DataLoader(
        _Samples(feed),
        sampler=_Positions(start, batch, rank, world),
        batch_size=None,
        num_workers=feed.loaders,
        multiprocessing_context="forkserver" if feed.loaders else None,
    )
    return iter(loader)


def require_batch(source: Artifact, split: Split, samples: int, batch: int) -> None:
    """Raise DataError where a global batch would train on a clip twice; evaluation counts each once, however often it comes."""
    if split == "train" and batch > samples:
        raise DataError(
            f"the {split} split of {source.name} has {samples} clips, a global batch needs {batch}: lower the batch, or add clips"
        )


class _Samples(Dataset[Batch]):
    """Maps a list of global positions to a batch."""

    def __init__(self, feed: Loads) -> None:
        self.feed = feed

    def __getitem__(self, positions: list[int]) -> Batch:
        return self.feed.load(positions)


@dataclass(frozen=True)
class _Positions:
    """Endless lists of the global positions of one rank's micro-batches."""

    start: int
    batch: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch
        while True:
            yield list(range(first, first + self.batch))
            first += self.batch * self.world
