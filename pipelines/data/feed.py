"""`ClipFeed`: what feeds a rung's training, from a clip index and, where a lower stage's features were cached, from its shards.
`OrderedClips` is what it shares with the other feeds on clips (`divot_feed.py`): which clips, in which order, and their files.

Sample p of the job is the same clip with the same seed whatever the number of workers, loader processes or the micro-batch, and whether
features come from a cache or are computed on the fly (contract 5). Clips are decoded when they are needed, in the training worker itself
or in `loaders` processes beside it; those of a small split only the first time. Not covered: the order itself (`order.py`), augmentation
(a trainable's own affair, from `seed_B`).

Legend: B samples, T H W C frames, rows, columns, colours; D t h w trunk features.
"""

from collections.abc import Mapping
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
from kinetok.pipelines.data.positions import PositionFeed, Split
from kinetok.pipelines.data.reasons import BadVideo
from kinetok.pipelines.data.token_shards import SHARDS_HELD, Shards, TokenShards

FEATURES = "features"
HELD_BYTES = 2**28
"""A split whose pixels fit into that is held by each process that reads it, once decoded. Without it a training of a few clips on a CPU
decodes for as long as it computes: a clip in the middle of a video costs all frames before it."""


@dataclass(frozen=True)
class ClipFeed(PositionFeed):
    """The samples of one split in endless seeded order.

    Batches hold `video_BTHWC` (uint8), `seed_B` (int64) and, with `features`, `full_BDthw` and `key_BDthw` (float32).
    With `features` the order runs over the clips that have them. Raises DataError on an empty split, or one too small to train on.
    """

    clips: Artifact
    split: Split
    seed: int
    features: Artifact | None = None
    loaders: int = 0

    @property
    def title(self) -> str:
        """What the samples are of, for errors."""
        return self.clips.name

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._opened.order)

    def load(self, positions: list[int]) -> Batch:
        """The samples at these global positions."""
        opened = self._opened
        rows = opened.rows_at(positions)
        batch = {"video_BTHWC": opened.videos(rows), "seed_B": opened.seeds(positions)}
        if self.features is not None:
            tensors = opened.cached(FEATURES, rows)
            batch["full_BDthw"] = torch.stack([item["full"] for item in tensors]).float()
            batch["key_BDthw"] = torch.stack([item["key"] for item in tensors]).float()
        return batch

    @cached_property
    def _opened(self) -> "OrderedClips":
        caches = {} if self.features is None else {FEATURES: _growth_features(self.features)}
        return OrderedClips(self.clips, self.split, self.seed, caches)

    def __reduce__(self) -> tuple[type["ClipFeed"], tuple[object, ...]]:
        """Pickle the description only: each process opens its own files."""
        return type(self), (self.clips, self.split, self.seed, self.features, self.loaders)


class OrderedClips:
    """The files behind a feed, in one process: the clips of one split that every cache has, in the order of training."""

    def __init__(self, clips: Artifact, split: Split, seed: int, caches: Mapping[str, Shards]) -> None:
        self.index, self.seed, self.caches = ClipIndex.open(clips), seed, caches
        for name, shards in caches.items():
            if isinstance(shards, TokenShards) and shards.spec.recipe != self.index.recipe:
                raise ContractError(
                    f"the {name} were made of other pixels: recipe {shards.spec.recipe}, the clips have {self.index.recipe}"
                )
        wanted = pc.equal(self.index.rows["split"], split).to_numpy(zero_copy_only=False)
        self.places = {name: shards.find(self.index.rows["id"]) for name, shards in caches.items()}
        for found in self.places.values():
            wanted = wanted & (found >= 0)
        self.rows = [rows for shard in self.index.shards if len(rows := shard[wanted[shard]])]
        if not self.rows:
            raise DataError(f"{clips.name} has no clips in the {split} split: change val_fraction or the filters of `clips`")
        self.order = Order(tuple(len(rows) for rows in self.rows), seed=seed, window=SHARDS_HELD)
        self.holds = sum(map(len, self.rows)) * self.index.clip_bytes <= HELD_BYTES
        self.held: dict[int, NDArray[np.uint8]] = {}

    def rows_at(self, positions: list[int]) -> list[int]:
        """Rows of the index at these global positions."""
        return [int(self.rows[shard][index]) for shard, index in self.order.at(np.array(positions, dtype=np.int64))]

    def seeds(self, positions: list[int]) -> torch.Tensor:
        """The samples' own random seeds, int64."""
        return torch.tensor([sample_seed(self.seed, position) for position in positions])

    def cached(self, name: str, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        """What the cache `name` holds of these rows."""
        return [self.caches[name].read(int(self.places[name][row])) for row in rows]

    def videos(self, rows: list[int]) -> torch.Tensor:
        """The pixels of these rows, uint8 (B, T, H, W, C)."""
        return torch.from_numpy(np.stack([self._read_clip(row) for row in rows]))

    def _read_clip(self, row: int) -> NDArray[np.uint8]:
        """The pixels of one clip, from memory where it is held."""
        if row in self.held:
            return self.held[row]
        pixels_THWC = self._decode(row)
        if self.holds:
            self.held[row] = pixels_THWC
        return pixels_THWC

    def _decode(self, row: int) -> NDArray[np.uint8]:
        """The pixels of one clip; raises DataError naming the clip that can no longer be decoded."""
        try:
            return self.index.read_clip(row)
        except BadVideo as error:
            clip = self.index.rows["id"][row].as_py()
            raise DataError(
                f"clip {clip} of the index can no longer be decoded ({error.reason}: {error.message}); "
                "the source changed or is damaged: build `clips` again"
            ) from error


def _growth_features(artifact: Artifact) -> TokenShards:
    shards = TokenShards.open(artifact)
    if shards.spec.content != "features":
        raise ContractError(f"{artifact.name} holds {shards.spec.content}, growing needs content: features")
    return shards
