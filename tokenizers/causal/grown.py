"""A grown rung: twice the temporal compression of the frozen rung below it (ProMAG, arXiv 2501.05442, section 3 and its figure).

    full = E_k(x)       key = E_k(every 2nd frame of x)        frozen, the same weights
    r = E_k_2k(AdaNorm(full; pooled key))                      residual blocks, then temporal downsampling
    u = key + r  ->  head  ->  latent  ->  head  ->  D_k_2k    residual blocks, then temporal upsampling
    video = D_k(...)                                           frozen; passes gradient to its input

Only the modulation, both heads, E_k_2k and D_k_2k are trained. Growing works on any `Rung`, a grown one included. Readings
where the paper is silent: the modulation is a scale and a shift from the key features pooled over each frame; "+" is a sum.

Step-0 identity. With r = 0, the heads copied from the rung below, D's residual blocks the identity and its upsampling initialised
to duplication, the untrained model encodes a video to the lower rung's latents of its every second frame, and decodes them as the
lower decoder trunk applied to the lower head's output with every step but the first standing twice (`repeat_frames`).

Not covered: mixing by concatenation or dual latents, unfreezing the decoder, layer-wise tiling.

Legend: B clips, C pixel channels, T H W frames, rows, columns, D trunk width, t h w positions at the lower rung's rate, s steps of
this rung (t = 2s - 1).
"""

import copy
import hashlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from kinetok.tokenizers.base import Count, GrowthFeatures, ModelConfig, Tokenizer
from kinetok.tokenizers.causal.layers import CausalConv3d, FrameNorm, ResBlock, Upsample, repeat_frames, zero_
from kinetok.tokenizers.causal.rung import Rung

LOWER_FOLDER = "lower"


class GrownConfig(ModelConfig):
    """Numbers of one grown rung; width, latent channels and geometry follow from the rung below."""

    kind: Literal["grown"] = "grown"
    grows: ClassVar[bool] = True
    blocks: Count = 2
    """Residual blocks on the encoder's side, and as many on the decoder's."""
    groups: Count = 32
    """Normalisation groups; must divide the trunk width."""


class AdaNorm(nn.Module):
    """Normalise the full-rate features, then scale and shift each frame by what its key frame pools to; starts as the plain norm."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = FrameNorm(width, groups, affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, full_BDthw: Tensor, key_BDshw: Tensor) -> Tensor:
        pooled_BDs11 = key_BDshw.mean((3, 4), keepdim=True)
        # Two fine steps share the key step that ends with them: r reaches step s only with fine steps <= 2s, so nothing leaks back.
        pooled_BtD = repeat_frames(pooled_BDs11).flatten(2).transpose(1, 2)
        scale_BDt, shift_BDt = self.modulation(pooled_BtD).transpose(1, 2).chunk(2, dim=1)
        modulated_BDthw: Tensor = self.norm(full_BDthw) * (1 + scale_BDt[..., None, None]) + shift_BDt[..., None, None]
        return modulated_BDthw


class MixingEncoder(nn.Module):
    """E_k_2k: cross-level feature mixing, u = key + downsample(blocks(AdaNorm(full; key))); the sum starts as `key` alone."""

    def __init__(self, width: int, config: GrownConfig) -> None:
        super().__init__()
        self.modulate = AdaNorm(width, config.groups)
        self.blocks = nn.Sequential(*(ResBlock(width, config.groups) for _ in range(config.blocks)))
        self.down = CausalConv3d(width, width, stride=(2, 1, 1))
        zero_(self.down)

    def forward(self, features: GrowthFeatures) -> Tensor:
        x_BDthw = self.blocks(self.modulate(features.full_BDthw, features.key_BDthw))
        return torch.add(features.key_BDthw, self.down(x_BDthw))


class DuplicatingDecoder(nn.Module):
    """D_k_2k: residual blocks, then twice the steps; starts as `repeat_frames`."""

    def __init__(self, width: int, config: GrownConfig) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResBlock(width, config.groups) for _ in range(config.blocks)))
        self.up = Upsample(width, width, time=2, space=1)
        duplicate_(self.up.conv)

    def forward(self, features_BDshw: Tensor) -> Tensor:
        features_BDthw: Tensor = self.up(self.blocks(features_BDshw))
        return features_BDthw


class GrownTokenizer(Rung):
    """One more doubling of the temporal compression on top of `lower`, which is frozen in place.

    `lower` is reached by this model's `to`, but is no sub-module of it: optimizers, checkpoints and ZeRO partitions see the new
    weights only, while `spec` and `save_pretrained` cover both.
    """

    config_class = GrownConfig
    config: GrownConfig

    def __init__(self, config: GrownConfig, lower: Rung) -> None:
        super().__init__()
        if lower.feature_channels % config.groups:
            raise ValueError(f"groups: {config.groups} does not divide the trunk width {lower.feature_channels} of the lower stage")
        self.config = config
        self._hidden = (lower.requires_grad_(False).eval(),)
        self.mix = MixingEncoder(lower.feature_channels, config)
        self.heads = copy.deepcopy(lower.heads).requires_grad_(True)
        self.decoder = DuplicatingDecoder(lower.feature_channels, config)

    @property
    def lower(self) -> Rung:
        """The frozen rung below. (A tuple hides it from `nn.Module`'s registration.)"""
        return self._hidden[0]

    @property
    def feature_channels(self) -> int:
        return self.lower.feature_channels

    @property
    def temporal(self) -> int:
        return 2 * self.lower.temporal

    @property
    def spatial(self) -> int:
        return self.lower.spatial

    def feature_ladder(self, video_BCTHW: Tensor, rates: int) -> list[Tensor]:
        with torch.no_grad():
            below = self.lower.feature_ladder(video_BCTHW, rates + 1)
        return [self.mix(GrowthFeatures(full_BDthw, key_BDshw)) for full_BDthw, key_BDshw in pairwise(below)]

    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        return self.lower.decode_features(self.decoder(features_BDthw))

    def digest(self) -> str:
        """sha256 over the new weights and the digest of the rung below."""
        return hashlib.sha256(f"{super().digest()} {self.lower.digest()}".encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """As for every tokenizer, with the rung below in `lower/`: the folder is whole by itself."""
        super().save_pretrained(folder)
        self.lower.save_pretrained(Path(folder) / LOWER_FOLDER)

    @classmethod
    def build(cls, config: ModelConfig, lower: Tokenizer | None = None) -> Self:
        """A fresh rung on `lower`, which must be a rung itself."""
        if lower is None:
            raise ValueError("a 'grown' model needs the frozen model it grows upon: give it as lower")
        if not isinstance(lower, Rung):
            raise ValueError(f"nothing can be grown upon a {lower.config.kind!r} model: it has no trunk features")
        assert isinstance(config, GrownConfig)
        return cls(config, lower)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model saved in `folder` on the lower model saved in `folder/lower`, both in eval mode."""
        from kinetok.tokenizers.catalog import load  # the catalog imports this module

        return cls.build(cls.read_config(folder), load(Path(folder) / LOWER_FOLDER)).read_weights(folder)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Device and type moves reach the hidden rung too."""
        self.lower._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


@torch.no_grad()
def duplicate_(conv: nn.Conv3d) -> None:
    """Make the convolution of a temporal `Upsample` copy its latest, central input to both of the steps it yields."""
    zero_(conv)
    identity = torch.eye(conv.in_channels, device=conv.weight.device)
    conv.weight[:, :, -1, 1, 1] = identity.repeat(2, 1)
