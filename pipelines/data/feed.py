"""`ClipFeed`: what feeds training, from a clip index and, where a lower stage's features were cached, from its shards.

Sample p of the job is the same clip with the same seed whatever the number of workers, loader processes or the micro-batch, and whether
features come from a cache or are computed on the fly (contract 5). Clips are decoded when they are needed, in the training worker itself
or in `loaders` processes beside it. Not covered: the order itself (`order.py`), augmentation (a trainable's own affair, from `seed_B`).

Legend: B samples, T H W C frames, rows, columns, colours; D t h w trunk features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.training import Batch
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.order import Order, sample_seed
from kinetok.pipelines.data.positions import Split, by_position, require_batch
from kinetok.pipelines.data.reasons import BadVideo
from kinetok.pipelines.data.token_shards import SHARDS_HELD, TokenShards


@dataclass(frozen=True)
class ClipFeed:
    """The samples of one split in endless seeded order; a `kinetok.infra.training.Feed`.

    Batches hold `video_BTHWC` (uint8), `seed_B` (int64) and, with `features`, `full_BDthw` and `key_BDthw` (float32).
    With `features` the order runs over the clips that have them. Raises DataError on an empty split, or one too small to train on.
    """

    clips: Artifact
    split: Split
    seed: int
    features: Artifact | None = None
    loaders: int = 0
    """Loader processes of each training worker; 0 loads in the worker itself."""

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._opened.order)

    def batches(self, *, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        """This rank's micro-batches of `batch` samples from global position `start` on, without end."""
        require_batch(self.clips, self.split, len(self), batch * world)
        return by_position(self, start=start, batch=batch, rank=rank, world=world)

    def load(self, positions: list[int]) -> Batch:
        """The samples at these global positions."""
        opened = self._opened
        rows = [opened.rows[shard][index] for shard, index in opened.order.at(np.array(positions, dtype=np.int64))]
        batch = {
            "video_BTHWC": torch.from_numpy(np.stack([opened.read_clip(int(row)) for row in rows])),
            "seed_B": torch.tensor([sample_seed(self.seed, position) for position in positions]),
        }
        if opened.features is not None:
            tensors = [opened.features.read(int(opened.feature_rows[row])) for row in rows]
            batch["full_BDthw"] = torch.stack([item["full"] for item in tensors]).float()
            batch["key_BDthw"] = torch.stack([item["key"] for item in tensors]).float()
        return batch

    @cached_property
    def _opened(self) -> "_Opened":
        return _Opened(self)

    def __reduce__(self) -> tuple[type["ClipFeed"], tuple[object, ...]]:
        """Pickle the description only: each process opens its own files."""
        return type(self), (self.clips, self.split, self.seed, self.features, self.loaders)


class _Opened:
    """The files behind a feed, in one process."""

    def __init__(self, feed: ClipFeed) -> None:
        self.index = ClipIndex.open(feed.clips)
        self.features = None if feed.features is None else _open_features(feed.features, self.index)
        self.wanted = pc.equal(self.index.rows["split"], feed.split).to_numpy(zero_copy_only=False)
        self.feature_rows: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        if self.features is not None:
            self.feature_rows = self.features.find(self.index.rows["id"])
            self.wanted &= self.feature_rows >= 0
        self.rows = [rows for shard in self.index.shards if len(rows := shard[self.wanted[shard]])]
        if not self.rows:
            raise DataError(f"{feed.clips.name} has no clips in the {feed.split} split: change val_fraction or the filters of `clips`")
        self.order = Order(tuple(len(rows) for rows in self.rows), seed=feed.seed, window=SHARDS_HELD)

    def read_clip(self, row: int) -> NDArray[np.uint8]:
        """The pixels of one clip; raises DataError naming the clip that can no longer be decoded."""
        try:
            return self.index.read_clip(row)
        except BadVideo as error:
            clip = self.index.rows["id"][row].as_py()
            raise DataError(
                f"clip {clip} of the index can no longer be decoded ({error.reason}: {error.message}); "
                "the source changed or is damaged: build `clips` again"
            ) from error


def _open_features(artifact: Artifact, index: ClipIndex) -> TokenShards:
    shards = TokenShards.open(artifact)
    if shards.spec.content != "features":
        raise ContractError(f"{artifact.name} holds {shards.spec.content}, growing needs content: features")
    if shards.spec.recipe != index.recipe:
        raise ContractError(f"{artifact.name} was made of other pixels: recipe {shards.spec.recipe}, the clips have {index.recipe}")
    return shards
