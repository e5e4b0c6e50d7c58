"""`VideoUNet`: the 3D U-Net of Divot's de-tokenizer, which is DynamiCrafter's (arXiv 2310.12190) without the image beside the latent.

Each level has residual blocks with temporal convolutions and, where asked, a spatial and a temporal transformer after each; one more
temporal transformer stands at the very beginning. Context tokens reach it through the cross-attention of the spatial transformers.
Published checkpoints split the context after 77 tokens: what follows has keys and values of its own (`split`). That is left from a
text and an image encoder, and makes the order of the tokens matter; without it they are a set.

Not covered: relative or causal temporal positions, classes, transformers deeper than one block.

Legend: B clips, Z latent channels, T frames, F = B * T, h w latent positions, D channels, L context tokens, C context width, E width
of the time embedding.
"""

from collections.abc import Iterator
from math import lcm, log
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kinetok.tokenizers.base import Config, Count
from kinetok.tokenizers.divot.unet_layers import (
    Downsample,
    Given,
    ResBlock,
    SpatialTransformer,
    TemporalTransformer,
    Upsample,
    zero,
)

FIRST_HEADS = 8
"""Heads of the temporal transformer at the beginning, whatever its channels."""
TIME_RATIO = 4
"""Width of the time embedding over `channels`."""
LONGEST = 10000.0
"""Longest wave of the sinusoids, over 2 pi."""
FRAME_TOKENS = 16
"""Tokens of the second context part that belong to one frame, where each frame has its own."""


class UNetConfig(Config):
    """Numbers of the U-Net; the defaults are the published ones."""

    z: Count = 4
    """Latent channels."""
    channels: Count = 320
    """Width that `mult` multiplies."""
    mult: tuple[Count, ...] = (1, 2, 4, 4)
    """Width of each level, finest first, which must be 1."""
    blocks: Count = 2
    """Residual blocks of a level on the way down, and one more on the way up."""
    attention: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    """Levels with transformers; the middle always has them."""
    head_width: Count = 64
    groups: Count = 32
    """Normalisation groups. With one channel a group, what is added to whole channels vanishes: the time would have no effect."""
    context: Count = 1024
    """Numbers of a context token."""
    split: Count | None = 77
    """Tokens of the first context part; None for one part."""
    stride: Count = 3
    """Frame stride where none is given: source frames from one frame to the next, 3 for 8 of 24 frames a second."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mult[0] != 1:
            raise ValueError(f"mult: the finest level must have `channels` channels, a multiplier of 1, got {self.mult[0]}")
        if self.channels % self.groups or self.channels % self.head_width:
            raise ValueError(
                f"channels: {self.channels} are no multiple of {self.groups} groups and of heads of {self.head_width}; "
                f"{_next_multiple(self.channels, lcm(self.groups, self.head_width))} are"
            )
        if any(level >= len(self.mult) for level in self.attention):
            raise ValueError(f"attention: levels are 0 to {len(self.mult) - 1}, got {self.attention}")
        return self

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return TIME_RATIO * self.channels


class Stage(nn.ModuleList):
    """Layers that are run one after the other, each told what is `Given`."""

    def forward(self, x_FDhw: Tensor, given: Given) -> Tensor:
        for layer in self:
            x_FDhw = layer(x_FDhw, given)
        return x_FDhw


class VideoUNet(nn.Module):
    """v at a noisy latent; starts as zero."""

    worth_compiling: ClassVar[bool] = True

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether stages compute their activations anew in the backward pass instead of keeping them."""
        self.from_step = embedding(config.channels, config.time_width)
        self.from_stride = embedding(config.channels, config.time_width)
        zero(self.from_stride[-1])
        self.from_latent = nn.Conv2d(config.z, config.channels, 3, padding=1)
        self.first = TemporalTransformer(config.channels, FIRST_HEADS, config.groups, width=FIRST_HEADS * config.head_width)
        self.down = nn.ModuleList(self._down())
        widest = config.channels * config.mult[-1]
        self.middle = Stage([self._block(widest, widest), *self._transformers(widest), self._block(widest, widest)])
        self.up = nn.ModuleList(self._up())
        self.norm = nn.GroupNorm(config.groups, config.channels)
        self.to_latent = zero(nn.Conv2d(config.channels, config.z, 3, padding=1))

    def forward(self, x_BZThw: Tensor, t_B: Tensor, context_BLC: Tensor, stride_B: Tensor | None = None) -> Tensor:
        """v of x at integer steps `t_B`, told by the context what to show.

        `stride_B` are frame strides, `config.stride` where left out. ValueError where rows or columns cannot be halved often enough.
        """
        factor = 2 ** (len(self.config.mult) - 1)
        clips, _, frames, rows, columns = x_BZThw.shape
        if rows % factor or columns % factor:
            raise ValueError(
                f"rows and columns of a latent must be multiples of {factor}, got {rows} x {columns}: take clips of "
                f"{_next_multiple(rows, factor)} x {_next_multiple(columns, factor)} latent cells, or a U-Net with fewer levels in mult"
            )
        given = self._given(t_B, context_BLC, stride_B, frames)
        h_FDhw = self.first(self.from_latent(x_BZThw.transpose(1, 2).flatten(0, 1)), given)
        skips = [h_FDhw]
        for stage in self.down:
            h_FDhw = self._run(stage, h_FDhw, given)
            skips.append(h_FDhw)
        h_FDhw = self._run(self.middle, h_FDhw, given)
        for stage in self.up:
            h_FDhw = self._run(stage, torch.cat([h_FDhw, skips.pop()], dim=1), given)
        v_FZhw = self.to_latent(F.silu(self.norm(h_FDhw)))
        return torch.unflatten(v_FZhw, 0, (clips, frames)).transpose(1, 2)

    def _run(self, stage: nn.Module, x_FDhw: Tensor, given: Given) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            kept: Tensor = checkpoint(stage, x_FDhw, given, use_reentrant=False)
            return kept
        out_FDhw: Tensor = stage(x_FDhw, given)
        return out_FDhw

    def _given(self, t_B: Tensor, context_BLC: Tensor, stride_B: Tensor | None, frames: int) -> Given:
        if stride_B is None:
            stride_B = torch.full_like(t_B, self.config.stride)
        dtype, width = self.from_latent.weight.dtype, self.config.channels
        time_BE = self.from_step(sinusoids(t_B, width).to(dtype)) + self.from_stride(sinusoids(stride_B, width).to(dtype))
        first_BLC, second_GLC = split_context(context_BLC, self.config.split, frames)
        return Given(frames, time_BE.repeat_interleave(frames, dim=0), first_BLC, second_GLC)

    def _down(self) -> Iterator[Stage]:
        """Stages on the way down: blocks of each level, then a halving."""
        config = self.config
        for level, factor in enumerate(config.mult):
            wide, before = config.channels * factor, config.channels * config.mult[max(level - 1, 0)]
            for place in range(config.blocks):
                yield Stage([self._block(wide if place else before, wide), *self._transformers(wide, level)])
            if level < len(config.mult) - 1:
                yield Stage([Downsample(wide)])

    def _up(self) -> Iterator[Stage]:
        """Stages on the way up, each of which takes what one on the way down left."""
        config = self.config
        skips = self._skip_channels()
        current = config.channels * config.mult[-1]
        for level, factor in reversed(list(enumerate(config.mult))):
            wide = config.channels * factor
            for place in range(config.blocks + 1):
                layers = [self._block(current + skips.pop(), wide), *self._transformers(wide, level)]
                if level and place == config.blocks:
                    layers.append(Upsample(wide))
                current = wide
                yield Stage(layers)

    def _skip_channels(self) -> list[int]:
        """Channels of what is kept for the way up, in the order it comes."""
        config = self.config
        channels = [config.channels]
        for level, factor in enumerate(config.mult):
            channels += [config.channels * factor] * (config.blocks + (level < len(config.mult) - 1))
        return channels

    def _block(self, channels: int, out: int) -> nn.Module:
        return ResBlock(channels, out, self.config.time_width, self.config.groups, self.config.dropout)

    def _transformers(self, channels: int, level: int | None = None) -> list[nn.Module]:
        config = self.config
        if level is not None and level not in config.attention:
            return []
        heads = channels // config.head_width
        spatial = SpatialTransformer(channels, heads, config.groups, config.context, split=config.split is not None)
        return [spatial, TemporalTransformer(channels, heads, config.groups)]


def _next_multiple(number: int, factor: int) -> int:
    """The first multiple of `factor` that is no less than `number`."""
    return -(-number // factor) * factor


def embedding(width: int, out: int) -> nn.Sequential:
    """Sinusoids to an embedding."""
    return nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))


def sinusoids(position_B: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of a position at geometric frequencies from 1 on; an odd width ends with a zero. float32 (B, width)."""
    half = width // 2
    # In this order: at step 999 the rounding of a frequency shows in the fifth digit.
    frequency = torch.exp(-log(LONGEST) * torch.arange(half, device=position_B.device, dtype=torch.float32) / half)
    angle = position_B.float()[:, None] * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, width % 2))


def split_context(context_BLC: Tensor, split: int | None, frames: int) -> tuple[Tensor, Tensor | None]:
    """The two parts of the context, the second None where nothing is left for it.

    Of exactly `split` + 16 * T tokens, the last 16 * T belong to one frame each, 16 to a frame, and the second part is (F, 16, C).
    """
    if split is None or context_BLC.shape[1] <= split:
        return context_BLC, None
    first_BLC, second_BLC = context_BLC[:, :split], context_BLC[:, split:]
    if second_BLC.shape[1] == FRAME_TOKENS * frames:
        return first_BLC, second_BLC.reshape(-1, FRAME_TOKENS, second_BLC.shape[-1])
    return first_BLC, second_BLC
