"""`LatentFeed`: what feeds a generator's training, from cached latents and cached text embeddings; no pixel is read.

The order is that of `order.py` over the clips that have both, so sample p of a job is the same clip with the same seed whatever the
workers. `GeneratorSpec` is the contract that a generator carries: what made its latents, and what made its text. Not covered: making
either (`encoding.py`, `text_shards.py`).

Legend: B samples, Z latent channels, t h w latent positions, L text tokens, E text width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from kinetok.infra.artifact import Artifact
from kinetok.infra.config import Config
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.training import Batch
from kinetok.pipelines.data.order import Order, sample_seed
from kinetok.pipelines.data.positions import PositionFeed, Split
from kinetok.pipelines.data.text_shards import TextShards, TextSpec
from kinetok.pipelines.data.token_shards import SHARDS_HELD, TOKENS, TokenShards
from kinetok.tokenizers.base import DecodeRecipe, TokenSpec
from kinetok.tokenizers.causal.chunks import ChunkPlan

GENERATOR_FILE = "generator.json"


class GeneratorSpec(Config):
    """`generator.json`: what a generator makes, and what it listens to."""

    latents: TokenSpec
    shape: tuple[int, int, int, int]
    """Of one clip's latent, (Z, t, h, w)."""
    text: TextSpec

    @property
    def plan(self) -> ChunkPlan:
        """The chunks that the clips were encoded in: the whole clip where there are none."""
        return ChunkPlan(frames=self.latents.chunk_frames or self.recipe.frames, overlap=self.latents.chunk_overlap)

    @property
    def chunk(self) -> int:
        """Latent steps of one chunk."""
        return self.shape[1] // len(self.plan.spans(self.recipe.frames))

    @property
    def recipe(self) -> DecodeRecipe:
        """The pixels behind the latents."""
        assert self.latents.recipe is not None, "`encode` stamps it"
        return self.latents.recipe


@dataclass(frozen=True)
class LatentFeed(PositionFeed):
    """The samples of one split in endless seeded order.

    Batches hold `latent_BZthw` (float32, as the tokenizer made them), `text_BLE` (float32), `text_mask_BL` (bool) and `seed_B` (int64).
    Raises ContractError where latents and text are not of the same clips, DataError on a split that is too small to train on.
    """

    latents: Artifact
    text: Artifact
    split: Split
    seed: int
    loaders: int = 0

    @property
    def title(self) -> str:
        """What the samples are of, for errors."""
        return self.latents.name

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._opened.order)

    @property
    def spec(self) -> GeneratorSpec:
        """What the latents and the text are."""
        opened = self._opened
        channels, steps, rows, columns = opened.latent(0).shape
        return GeneratorSpec(latents=opened.latents.spec, shape=(channels, steps, rows, columns), text=opened.text.spec)

    def load(self, positions: list[int]) -> Batch:
        """The samples at these global positions."""
        opened = self._opened
        rows = [int(opened.rows[shard][index]) for shard, index in opened.order.at(np.array(positions, dtype=np.int64))]
        texts, masks = zip(*(opened.text.embeddings(int(opened.text_rows[row])) for row in rows), strict=True)
        return {
            "latent_BZthw": torch.stack([opened.latent(row) for row in rows]).float(),
            "text_BLE": torch.stack(texts),
            "text_mask_BL": torch.stack(masks),
            "seed_B": torch.tensor([sample_seed(self.seed, position) for position in positions]),
        }

    @cached_property
    def _opened(self) -> "_Opened":
        return _Opened(self)

    def __reduce__(self) -> tuple[type["LatentFeed"], tuple[object, ...]]:
        """Pickle the description only: each process opens its own files."""
        return type(self), (self.latents, self.text, self.split, self.seed, self.loaders)


class _Opened:
    """The shards behind a feed, in one process."""

    def __init__(self, feed: LatentFeed) -> None:
        self.latents, self.text = TokenShards.open(feed.latents), TextShards.open(feed.text)
        _require_latents(feed.latents, self.latents.spec)
        require_same_clips(feed.latents, feed.text)
        self.text_rows = self.text.find(self.latents.rows["id"])
        wanted = pc.equal(self.latents.rows["split"], feed.split).to_numpy(zero_copy_only=False) & (self.text_rows >= 0)
        self.rows = list(_by_shard(self.latents.rows["shard"].to_numpy(), np.flatnonzero(wanted)))
        if not self.rows:
            raise DataError(
                f"{feed.latents.name} and {feed.text.name} share no clips of the {feed.split} split: change val_fraction of `clips`"
            )
        self.order = Order(tuple(len(rows) for rows in self.rows), seed=feed.seed, window=SHARDS_HELD)

    def latent(self, row: int) -> torch.Tensor:
        return self.latents.read(row)[TOKENS]


def require_same_clips(latents: Artifact, text: Artifact) -> None:
    """Refuse text of other clips: ids may be the same where the clips are not (contract 3)."""
    digests = [[info.digest for info in artifact.record.inputs.get("data", ())] for artifact in (latents, text)]
    if digests[0] != digests[1]:
        raise ContractError(
            f"{latents.name}-{latents.key} and {text.name}-{text.key} were made of different clips: let both name the same `data`, and "
            "build what is older again"
        )


def splits(latents: Artifact) -> set[str]:
    """The splits that have latents."""
    return set(pc.unique(TokenShards.open(latents).rows["split"]).to_pylist())


def _by_shard(shards: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """`rows` in groups of the same shard, in order; shards without a row give none."""
    return (group for group in np.split(rows, np.flatnonzero(np.diff(shards[rows])) + 1) if len(group))


def _require_latents(artifact: Artifact, spec: TokenSpec) -> None:
    if spec.content != "tokens" or spec.layout != "grid" or spec.vocabulary is not None:
        kind = "discrete" if spec.vocabulary else "continuous"
        raise ContractError(
            f"{artifact.name} holds {spec.content}, {kind}, as a {spec.layout}: a diffusion model needs continuous tokens on a grid"
        )
