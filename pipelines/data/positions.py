"""What every feed shares: batches of samples named by their global position, loaded in the worker itself or in processes beside it.

Micro-batch m of a job covers positions start + m * batch * world onwards, and each rank takes its run of them, so the global order
does not depend on the number of workers. Not covered: which sample stands at a position (`order.py`), loading it (the feeds).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch.utils.data import DataLoader, Dataset

from kinetok.infra.errors import DataError
from kinetok.infra.training import Batch

Split = Literal["train", "val"]


class PositionFeed(ABC):
    """A `kinetok.infra.training.Feed` that loads samples by position; pickled to loader processes."""

    split: Split
    loaders: int
    """Loader processes of each training worker; 0 loads in the worker itself."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What the samples are of, for errors."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples of one epoch."""

    @abstractmethod
    def load(self, positions: list[int]) -> Batch:
        """The samples at these global positions."""

    def batches(self, *, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        """This rank's micro-batches of `batch` samples from global position `start` on, without end.

        Raises DataError where a global batch would train on a sample twice; evaluation counts each once, however often it comes.
        """
        if self.split == "train" and batch * world > len(self):
            raise DataError(
                f"the {self.split} split of {self.title} has {len(self)} samples, a global batch needs {batch * world}: lower the batch, "
                "or add data"
            )
        loader: DataLoader[Batch] = DataLoader(
            _Samples(self),
            sampler=_Positions(start, batch, rank, world),
            batch_size=None,
            num_workers=self.loaders,
            multiprocessing_context="forkserver" if self.loaders else None,
        )
        return iter(loader)


class _Samples(Dataset[Batch]):
    """Maps a list of global positions to a batch."""

    def __init__(self, feed: PositionFeed) -> None:
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
