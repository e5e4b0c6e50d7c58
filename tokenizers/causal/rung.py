"""What the base model and every grown model share: a rung of the ladder 4x -> 8x -> 16x with KL heads between two trunks.

A rung may stand on a frozen one, `lower`: that follows its `to`, but is no sub-module of it, so optimizers, checkpoints and ZeRO
partitions see the rung's own weights only, while `digest` and `save_pretrained` cover both.

Legend: B clips, C pixel channels, T H W frames, rows, columns, D trunk width, Z latent channels, t h w latent positions.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from kinetok.tokenizers.base import Geometry, LowerStage, Tokens, TokenSpec, check_video
from kinetok.tokenizers.causal.layers import Memory
from kinetok.tokenizers.causal.posterior import Heads

LOWER_FOLDER = "lower"


class Rung(LowerStage):
    """A causal KL tokenizer: video -> encoder trunk -> head -> latent grid -> head -> decoder trunk -> video.

    Any number of frames T >= 1: the end is padded by repeating the last frame, and `Tokens.frames` keeps T. Because everything is
    causal, latent step 0 is the latent of the first frame alone, and step j sees frames up to `temporal * j`. Rows and columns must
    be multiples of `spatial`.
    """

    heads: Heads
    _hidden: tuple["Rung", ...] = ()

    @property
    def lower(self) -> "Rung | None":
        """The frozen rung that this one computes with; None for one that stands on its own."""
        return self._hidden[0] if self._hidden else None

    def stand_on(self, lower: "Rung") -> None:
        """Freeze `lower`, in eval mode, and keep it. (A tuple hides it from `nn.Module`'s registration.)"""
        self._hidden = (lower.requires_grad_(False).eval(),)

    @property
    def decoder_channels(self) -> int:
        """Width of the decoder trunk's features: that of the encoder's, `feature_channels`, unless a rung says otherwise."""
        return self.feature_channels

    @property
    def geometry(self) -> Geometry:
        """Causal both ways, as every rung is that does not say otherwise."""
        return Geometry(self.temporal, self.spatial, self.heads.z, self.feature_channels, self.decoder_channels)

    def spec(self) -> TokenSpec:
        """A grid of continuous tokens, and the digest of all weights that made them."""
        return TokenSpec(
            tokenizer=self.config.kind,
            weights=self.digest(),
            layout="grid",
            channels=self.heads.z,
            temporal=self.temporal,
            spatial=self.spatial,
        )

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tokens:
        """Posterior means (B, Z, t, h, w), float32, of a video (B, 3, T, H, W) in [-1, 1]; ValueError on any other shape."""
        check_video(video_BCTHW, self.spatial)
        return Tokens(self.heads.posterior(self.features(video_BCTHW)).mean_BZthw, frames=video_BCTHW.shape[2])

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """The video (B, 3, tokens.frames, H, W), clamped to [-1, 1]. For gradients use `decode_latent`."""
        return self.decode_latent(tokens.values, tokens.frames).clamp(-1, 1)

    def decode_latent(self, latent_BZthw: Tensor, frames: int) -> Tensor:
        """The first `frames` frames of the decoded latent, not clamped, with gradient."""
        return self.decode_features(self.heads.decoder_features(latent_BZthw))[:, :, :frames]

    def decoder_parts(self) -> tuple[nn.Module, ...]:
        """The modules that make video of decoder features, one after the other, the last those of its finest level; each takes features
        and a `Memory` or None. A rung above copies those that it trains. ValueError where the decoder does not come apart like that."""
        raise ValueError(
            f"unfreeze_decoder: the decoder of a {self.config.kind!r} model runs inside a class of its own and stays frozen; set it to none"
        )

    @property
    def rates(self) -> int:
        """Of how many rates of the video this rung needs the lowest trunk's features: 1 for the base, one more with each doubling."""
        return 1

    def next_features(self, video_BCTHW: Tensor, memories: Sequence[Memory]) -> list[Tensor]:
        """`feature_ladder` of the next piece of a stream, without padding; `memories`, one for each rate that the lowest trunk runs at,
        are brought up to date. The first piece has 1 + m frames and each later one m, multiples of `temporal` at the coarsest rate."""
        raise ValueError(f"a {self.config.kind!r} model does not stream: it keeps no memory from piece to piece; see `chunks`")

    def next_frames(self, features_BDthw: Tensor, memory: Memory) -> Tensor:
        """`decode_features` of the next latent steps of a stream, any number; `memory` is brought up to date."""
        raise ValueError(f"a {self.config.kind!r} model does not stream: it keeps no memory from piece to piece; see `chunks`")

    def digest(self) -> str:
        """sha256 over the rung's own weights and the digest of the one below, where there is one."""
        own = super().digest()
        return own if self.lower is None else hashlib.sha256(f"{own} {self.lower.digest()}".encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """As for every tokenizer, with the rung below in `lower/`: the folder is whole by itself."""
        super().save_pretrained(folder)
        if self.lower is not None:
            self.lower.save_pretrained(Path(folder) / LOWER_FOLDER)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Device and type moves reach the hidden rung too."""
        for lower in self._hidden:
            lower._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def load_lower(folder: str | Path) -> Rung | None:
    """The rung saved in `folder/lower`, in eval mode; None where there is none."""
    from kinetok.tokenizers.catalog import load  # the catalog imports the rungs

    below = Path(folder) / LOWER_FOLDER
    lower = load(below) if below.is_dir() else None
    assert lower is None or isinstance(lower, Rung)
    return lower
