"""The base rung: a causal 3D-convolution KL autoencoder, 4x8x8 in its full-size configuration.

Source: the continuous form of MagViT-v2 (arXiv 2310.05737) as ProMAG (arXiv 2501.05442) uses it; where the paper is silent, the
layout follows Open-MAGVIT2's video network (arXiv 2409.04410). Small and full-size models differ in the numbers of `CausalConfig`
only. Not covered: adversarial and perceptual losses, initialisation from an image model, tiling, streaming.

Legend: B clips, C pixel channels, T H W frames, rows, columns, D trunk width, t h w latent positions.
"""

from math import prod
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from kinetok.tokenizers.base import Count, ModelConfig
from kinetok.tokenizers.causal.layers import (
    CausalConv3d,
    FrameNorm,
    NormKind,
    ResBlock,
    Upsample,
    depth_to_space,
    pad_frames,
    space_to_depth,
)
from kinetok.tokenizers.causal.posterior import LatentHeads
from kinetok.tokenizers.causal.rung import Rung

PIXELS = 3


class CausalConfig(ModelConfig):
    """Numbers of the base autoencoder; the defaults are the full-size model for 256 x 256 pixels."""

    kind: Literal["causal"] = "causal"
    channels: Count = 128
    """Width that `mult` multiplies."""
    mult: tuple[Count, ...] = (1, 2, 2, 4)
    """Width of each level, finest first; the last is the trunk width D."""
    strides: tuple[tuple[Literal[1, 2], Literal[1, 2]], ...] = ((1, 2), (2, 2), (2, 2))
    """(time, space) factor between one level and the next, one fewer than levels."""
    blocks: Count = 4
    """Residual blocks per level."""
    z: Count = 16
    """Latent channels; 8 and 16 are in use."""
    patch: Count = 1
    """Edge of the square of pixels folded into channels before the first level; more is cheaper and coarser."""
    norm: NormKind = "rms"
    groups: Count = 32
    """Normalisation groups; must divide every level's width."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.strides) != len(self.mult) - 1:
            raise ValueError(f"strides: {len(self.mult)} levels need {len(self.mult) - 1} strides between them, got {len(self.strides)}")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"groups: {self.groups} does not divide the level width {width}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * factor for factor in self.mult)

    @property
    def temporal(self) -> int:
        """Frames of one latent step."""
        return prod(time for time, _ in self.strides)

    @property
    def spatial(self) -> int:
        """Pixels of one latent cell along an edge."""
        return self.patch * prod(space for _, space in self.strides)


class EncoderTrunk(nn.Module):
    """Pixels to trunk features: residual blocks at each level, a strided convolution between levels, norm and swish at the end."""

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.patch = config.patch
        width = config.widths[0]
        layers: list[nn.Module] = [CausalConv3d(PIXELS * config.patch**2, width)]
        for level, width_out in enumerate(config.widths):
            if level:
                time, space = config.strides[level - 1]
                layers.append(CausalConv3d(width, width, stride=(time, space, space)))
            for _ in range(config.blocks):
                layers.append(ResBlock(width, width_out, config.groups, config.norm))
                width = width_out
        self.layers = nn.Sequential(*layers)
        self.norm = FrameNorm(width, config.groups, config.norm)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        x_BCTHW = space_to_depth(video_BCTHW, space=self.patch).contiguous(memory_format=torch.channels_last_3d)
        return F.silu(self.norm(self.layers(x_BCTHW)))


class DecoderTrunk(nn.Module):
    """Trunk features to pixels: the encoder mirrored, with depth-to-space between levels; its output is not clamped."""

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.patch = config.patch
        width = config.widths[-1]
        layers: list[nn.Module] = []
        for level in reversed(range(len(config.widths))):
            layers += [ResBlock(width, width, config.groups, config.norm) for _ in range(config.blocks)]
            if level:
                time, space = config.strides[level - 1]
                layers.append(Upsample(width, config.widths[level - 1], time=time, space=space))
                width = config.widths[level - 1]
        self.layers = nn.Sequential(*layers)
        self.norm = FrameNorm(width, config.groups, config.norm)
        self.to_pixels = CausalConv3d(width, PIXELS * config.patch**2)

    def forward(self, features_BDthw: Tensor) -> Tensor:
        x_BCTHW = self.layers(features_BDthw.contiguous(memory_format=torch.channels_last_3d))
        return depth_to_space(self.to_pixels(F.silu(self.norm(x_BCTHW))), time=1, space=self.patch)


class CausalTokenizer(Rung):
    """The base autoencoder: `EncoderTrunk`, `LatentHeads`, `DecoderTrunk`."""

    config_class = CausalConfig
    config: CausalConfig

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = EncoderTrunk(config)
        self.heads = LatentHeads(self.feature_channels, config.z)
        self.decoder = DecoderTrunk(config)

    @property
    def feature_channels(self) -> int:
        return self.config.widths[-1]

    @property
    def temporal(self) -> int:
        return self.config.temporal

    @property
    def spatial(self) -> int:
        return self.config.spatial

    def feature_ladder(self, video_BCTHW: Tensor, rates: int) -> list[Tensor]:
        padded_BCTHW = pad_frames(video_BCTHW, self.temporal * 2 ** (rates - 1))
        return [self.encoder(padded_BCTHW[:, :, :: 2**rate]) for rate in range(rates)]

    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        video_BCTHW: Tensor = self.decoder(features_BDthw)
        return video_BCTHW
