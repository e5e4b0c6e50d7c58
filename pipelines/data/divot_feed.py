"""`DivotFeed`: what feeds the training of a Divot tokenizer: cached latents and cached features or tokens of clips, or their pixels.

Sample p is the same clip with the same seed whatever is cached (contract 5), in the order of `ClipFeed`. With latents, and features or
tokens, no pixel is read. Tokens that were drawn several times take turns by the epoch. Tensors stay in the type they are stored in; the
trainable widens them on its device. Not covered: what the caches are made by (`stages/encode.py`, `stages/vit.py`).

Legend: B clips, T frames seen or latent steps, Z h w latents, N patches or tokens, D width, L text tokens, E text width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import DataError
from kinetok.infra.training import Batch
from kinetok.pipelines.data.feed import OrderedClips
from kinetok.pipelines.data.positions import PositionFeed, Split
from kinetok.pipelines.data.text_shards import TextShards
from kinetok.pipelines.data.token_shards import DRAWS, Shards, TokenShards
from kinetok.pipelines.data.token_shards import TOKENS as STORED

LATENTS, FEATURES, TOKENS, TEXT = "latents", "features", "tokens", "text"


@dataclass(frozen=True)
class DivotCaches:
    """What of a clip is cached; None is made on the fly."""

    latents: Artifact | None = None
    """Tokens of the frozen autoencoder."""
    features: Artifact | None = None
    """Of the frozen vision transformer."""
    tokens: Artifact | None = None
    """In place of features: encoded, or drawn by a language model."""
    text: Artifact | None = None
    """Embeddings of the captions, which are never made on the fly."""

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """Those that are there, by name."""
        named = {LATENTS: self.latents, FEATURES: self.features, TOKENS: self.tokens, TEXT: self.text}
        return {name: artifact for name, artifact in named.items() if artifact is not None}


@dataclass(frozen=True)
class DivotFeed(PositionFeed):
    """The samples of one split in endless seeded order.

    Batches hold `seed_B` (int64), `latent_BTZhw` where latents are cached, `token_BND` or `vit_BTND` where tokens or features are,
    `text_BLE` (float32, zero after a caption's tokens) with text, `stride_B` (float32, source rate over clip rate) with `strides`, and
    `video_BTHWC` (uint8) where anything has to be made of pixels.
    Raises DataError on an empty split, or one too small to train on.
    """

    clips: Artifact
    split: Split
    seed: int
    caches: DivotCaches = DivotCaches()
    loaders: int = 0
    strides: bool = False
    """Whether batches hold the frame strides of the clips."""

    @property
    def title(self) -> str:
        """What the samples are of, for errors."""
        return self.clips.name

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._opened.order)

    def load(self, positions: list[int]) -> Batch:
        """The samples at these global positions."""
        opened, found = self._opened, self.caches.artifacts
        rows = opened.rows_at(positions)
        batch = {"seed_B": opened.seeds(positions)}
        if LATENTS in found:
            batch["latent_BTZhw"] = self._stored(LATENTS, rows).transpose(1, 2)
        if TOKENS in found:
            samples = zip(opened.cached(TOKENS, rows), positions, strict=True)
            batch["token_BND"] = torch.stack([drawn(sample, position // len(self)) for sample, position in samples])
        elif FEATURES in found:
            batch["vit_BTND"] = self._stored(FEATURES, rows)
        if TEXT in found:
            batch["text_BLE"] = self._text(rows)
        if self.strides:
            batch["stride_B"] = torch.tensor([self._stride(row) for row in rows])
        if LATENTS not in found or not {TOKENS, FEATURES} & found.keys():
            batch["video_BTHWC"] = opened.videos(rows)
        return batch

    def _stored(self, name: str, rows: list[int]) -> torch.Tensor:
        return torch.stack([item[STORED] for item in self._opened.cached(name, rows)])

    def _stride(self, row: int) -> float:
        """Source frames from one frame of a clip to the next; DataError where its index does not know the source's rate."""
        index = self._opened.index
        about = index.rows.slice(row, 1).select(["id", "source_fps"]).to_pylist()[0]
        if not about["source_fps"]:
            raise DataError(f"{self.clips.name} does not say the rate of the source of {about['id']}: leave objective.stride out")
        return float(about["source_fps"]) / index.fps

    def _text(self, rows: list[int]) -> torch.Tensor:
        shards, places = self._opened.caches[TEXT], self._opened.places[TEXT]
        assert isinstance(shards, TextShards)
        return torch.stack([shards.embeddings(int(places[row]))[0] for row in rows])

    @cached_property
    def _opened(self) -> OrderedClips:
        shards: dict[str, Shards] = {
            name: TextShards.open(artifact) if name == TEXT else TokenShards.open(artifact)
            for name, artifact in self.caches.artifacts.items()
        }
        return OrderedClips(self.clips, self.split, self.seed, shards)

    def __reduce__(self) -> tuple[type["DivotFeed"], tuple[object, ...]]:
        """Pickle the description only: each process opens its own files."""
        return type(self), (self.clips, self.split, self.seed, self.caches, self.loaders, self.strides)


def drawn(sample: Mapping[str, torch.Tensor], epoch: int) -> torch.Tensor:
    """The tokens (N, D) of a sample in an epoch: of its draws, one after the other."""
    others_KND = sample.get(DRAWS)
    turn = epoch % (1 if others_KND is None else 1 + len(others_KND))
    return sample[STORED] if turn == 0 or others_KND is None else others_KND[turn - 1]
