"""The base rung: a causal 3D-convolution KL autoencoder, 4x8x8 in its full-size configuration.

Source: the continuous form of MagViT-v2 (arXiv 2310.05737) as ProMAG (arXiv 2501.05442) uses it; where the paper is silent, the
layout follows Open-MAGVIT2's video network (arXiv 2409.04410). Small and full-size models differ in the numbers of `CausalConfig`
only.

AdaGN. The decoder of MagViT-v2 normalises what enters each level and modulates it by the latent's deviations and means over the clip.
Whether ProMAG keeps that is not published, and it matters: frozen under a grown rung, it wants a latent at the base's own rate, which
is not there. `adagn` takes deviations and means of what the decoder is given, its head's linear image of the latent; a grown rung gives
the frozen decoder the same. They are of each frame and not of the clip, so that the decoder stays causal and streams. Where a rung above
trains its own copy of the finest level alone (`unfreeze_decoder: last`), the norm in front of that level stays frozen.

Image path. Before it learns motion the paper's base takes over an image model, "a frozen image encoder kept for the first frame
instead of only inflating 2D kernels"; the wiring is not published. Here the image model is a `CausalTokenizer` of the same numbers
without temporal strides (`CausalConfig.image`), trained on single frames, and `image_path` says what becomes of it:

    none      nothing: training starts at the linear transform coder of `start`, or at random
    inflate   its 2D kernels stand at the latest tap of the video kernels when training starts, so that every 4th frame is encoded as
              an image and decoded as itself, repeated; all weights are trained from there
    frozen2d  as inflate, and its encoder stays, frozen, as what computes the features of the first frame; the rest of the video, for
              which the first frame is the past, goes through the trained trunk alone

Not covered: losses (`training`).

Legend: B clips, C pixel channels, T H W frames, rows, columns, D trunk width, E two numbers for each of D, t h w latent positions.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kinetok.tokenizers.base import Count, ModelConfig, Tokenizer
from kinetok.tokenizers.causal import start
from kinetok.tokenizers.causal.layers import (
    AdaptiveNorm,
    CausalConv3d,
    Memory,
    NormKind,
    ResBlocks,
    Upsample,
    depth_to_space,
    frame_style,
    pad_frames,
    repeat_frames,
    space_to_depth,
)
from kinetok.tokenizers.causal.posterior import LatentHeads
from kinetok.tokenizers.causal.rung import Rung, load_lower

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
    """What a frame's groups are divided by: their root mean square, their deviation without centring (`std`), or GroupNorm."""
    groups: Count = 32
    """Normalisation groups; must divide every level's width."""
    # Not dumped at its default, like `start`.
    adagn: Annotated[bool, Field(exclude_if=lambda value: value is False)] = False
    """Whether the decoder has AdaGN in front of each level. With `start: random` only: a transform coder decodes by amplitudes."""
    image_path: Literal["none", "inflate", "frozen2d"] = "none"
    """What an image model, given as the lower one, is taken over for: nothing, the start, or the start and the first frame."""
    # The default is not dumped: it would give every rung that was trained before there was a choice another key.
    start: Annotated[Literal["transform", "random"], Field(exclude_if=lambda value: value == "transform")] = "transform"
    """Where training starts without an image model: at a linear transform coder, or at torch's default initialisation throughout."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.strides) != len(self.mult) - 1:
            raise ValueError(f"strides: {len(self.mult)} levels need {len(self.mult) - 1} strides between them, got {len(self.strides)}")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"groups: {self.groups} does not divide the level width {width}")
        if self.adagn and self.start != "random":
            raise ValueError("adagn: it normalises the amplitudes that a transform coder decodes by; set start: random, or adagn: false")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * factor for factor in self.mult)

    @property
    def grows(self) -> bool:
        return self.image_path != "none"

    @property
    def image(self) -> "CausalConfig":
        """The image model of this one: the same numbers without temporal strides."""
        return self.model_copy(update={"strides": tuple((1, space) for _, space in self.strides), "image_path": "none"})

    @property
    def temporal(self) -> int:
        """Frames of one latent step."""
        return prod(time for time, _ in self.strides)

    @property
    def spatial(self) -> int:
        """Pixels of one latent cell along an edge."""
        return self.patch * prod(space for _, space in self.strides)


class EncoderTrunk(nn.Module):
    """Pixels to trunk features: residual blocks at each level, a strided convolution from each level to the next, wider one.

    The features are the plain residual stream, not normalised: growing normalises them where it takes them in (AdaNorm).
    """

    worth_compiling: ClassVar[bool] = True

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.from_pixels = CausalConv3d(PIXELS * config.patch**2, config.widths[0])
        self.levels = nn.ModuleList(ResBlocks(config.blocks, width, config.groups, config.norm) for width in config.widths)
        self.downs = nn.ModuleList(
            CausalConv3d(width, wider, stride=(time, space, space))
            for (width, wider), (time, space) in zip(pairwise(config.widths), config.strides, strict=True)
        )

    def forward(self, video_BCTHW: Tensor, memory: Memory | None = None) -> Tensor:
        patches = space_to_depth(video_BCTHW, space=self.patch).contiguous(memory_format=torch.channels_last_3d)
        x_BCTHW: Tensor = self.levels[0](self.from_pixels(patches, memory), memory)
        for down, level in zip(self.downs, self.levels[1:], strict=True):
            x_BCTHW = level(down(x_BCTHW, memory), memory)
        return x_BCTHW


class DecoderTrunk(nn.Module):
    """Trunk features to pixels: the encoder mirrored, with depth-to-space between levels; its output is not clamped.

    `parts` are its two halves, which share its weights: a rung that trains one of them above this one copies it.
    """

    worth_compiling: ClassVar[bool] = True

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.levels = nn.ModuleList(ResBlocks(config.blocks, width, config.groups, config.norm) for width in config.widths)
        self.ups = nn.ModuleList(
            Upsample(wider, width, time=time, space=space)
            for (width, wider), (time, space) in zip(pairwise(config.widths), config.strides, strict=True)
        )
        self.norms = nn.ModuleList(
            AdaptiveNorm(config.widths[-1], width, config.groups, config.norm) for width in config.widths if config.adagn
        )
        self.to_pixels = CausalConv3d(config.widths[0], PIXELS * config.patch**2)

    def forward(self, features_BDthw: Tensor, memory: Memory | None = None) -> Tensor:
        x_BCTHW = climb(self.levels[1:], self.ups, self.norms, features_BDthw, memory)
        return depth_to_space(self.to_pixels(self.levels[0](x_BCTHW, memory), memory), time=1, space=self.patch)

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        """Up to the finest level, and that level with what makes pixels of it: one after the other they are this trunk."""
        return CoarseLevels(self), FinestLevel(self)


class CoarseLevels(nn.Module):
    """A decoder trunk up to its finest level."""

    worth_compiling: ClassVar[bool] = True

    def __init__(self, trunk: DecoderTrunk) -> None:
        super().__init__()
        self.levels, self.ups, self.norms = trunk.levels[1:], trunk.ups, trunk.norms

    def forward(self, features_BDthw: Tensor, memory: Memory | None = None) -> Tensor:
        return climb(self.levels, self.ups, self.norms, features_BDthw, memory)


class FinestLevel(nn.Module):
    """The rest of a decoder trunk."""

    worth_compiling: ClassVar[bool] = True

    def __init__(self, trunk: DecoderTrunk) -> None:
        super().__init__()
        self.level, self.to_pixels, self.patch = trunk.levels[0], trunk.to_pixels, trunk.patch

    def forward(self, x_BCTHW: Tensor, memory: Memory | None = None) -> Tensor:
        return depth_to_space(self.to_pixels(self.level(x_BCTHW, memory), memory), time=1, space=self.patch)


def climb(levels: nn.ModuleList, ups: nn.ModuleList, norms: nn.ModuleList, features_BDthw: Tensor, memory: Memory | None) -> Tensor:
    """Features through levels, finest first in the lists, each followed by the way up to the next finer one.

    `norms`, where there are any, stand in front of each level, that of the finest one included.
    """
    x_BCTHW = features_BDthw.contiguous(memory_format=torch.channels_last_3d)
    style_BET11 = frame_style(x_BCTHW) if norms else None
    if style_BET11 is not None:
        x_BCTHW = norms[-1](x_BCTHW, style_BET11)
    for index in reversed(range(len(ups))):
        up = ups[index]
        assert isinstance(up, Upsample)
        begins = up.begins(memory)
        x_BCTHW = up(levels[index](x_BCTHW, memory), memory)
        if style_BET11 is not None:
            style_BET11 = repeat_frames(style_BET11, first=begins) if up.time == 2 else style_BET11
            x_BCTHW = norms[index](x_BCTHW, style_BET11)
    return x_BCTHW


class CausalTokenizer(Rung):
    """The base autoencoder: `EncoderTrunk`, `LatentHeads`, `DecoderTrunk`.

    A fresh one starts from `image`, where given, else as `config.start` says.
    """

    config_class = CausalConfig
    config: CausalConfig
    heads: LatentHeads

    def __init__(self, config: CausalConfig, image: "CausalTokenizer | None" = None) -> None:
        super().__init__()
        self.config = config
        self._temporal, self._spatial = config.temporal, config.spatial
        self.encoder = EncoderTrunk(config)
        self.heads = LatentHeads(self.feature_channels, config.z)
        self.decoder = DecoderTrunk(config)
        if image is not None:
            start.inflate_(self, image)
        elif config.start == "transform":
            self._start()
        else:
            start.reset_(self)
        if image is not None and config.image_path == "frozen2d":
            self.stand_on(image)

    def _start(self) -> None:
        slots = start.pixel_slots(self.config.patch, self.config.widths[0])
        start.analyse_pixels_(self.encoder.from_pixels, slots)
        start.synthesise_pixels_(self.decoder.to_pixels, slots)
        for level, (time, space) in enumerate(self.config.strides):
            finer, slots = slots, start.transform_slots(slots, (time, space, space), self.config.widths[level + 1])
            down, up = self.encoder.downs[level], self.decoder.ups[level]
            assert isinstance(down, CausalConv3d) and isinstance(up, Upsample)
            start.analyse_(down, slots, finer)
            start.synthesise_(up.conv, slots, finer, self.config.widths[level])
        start.pass_through_(self.heads.to_posterior, self.heads.from_latent, self.config.z)

    @property
    def feature_channels(self) -> int:
        return self.config.widths[-1]

    @property
    def temporal(self) -> int:
        return self._temporal

    @property
    def spatial(self) -> int:
        return self._spatial

    def feature_ladder(self, video_BCTHW: Tensor, rates: int) -> list[Tensor]:
        return self._features(pad_frames(video_BCTHW, self.temporal * 2 ** (rates - 1)), [None] * rates)

    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        video_BCTHW: Tensor = self.decoder(features_BDthw)
        return video_BCTHW

    def decoder_parts(self) -> tuple[nn.Module, ...]:
        return self.decoder.parts

    def next_features(self, video_BCTHW: Tensor, memories: Sequence[Memory]) -> list[Tensor]:
        return self._features(video_BCTHW, memories)

    def next_frames(self, features_BDthw: Tensor, memory: Memory) -> Tensor:
        video_BCTHW: Tensor = self.decoder(features_BDthw, memory)
        return video_BCTHW

    def _features(self, video_BCTHW: Tensor, memories: Sequence[Memory | None]) -> list[Tensor]:
        """Trunk features at each rate, of a whole video or of a piece of one."""
        begins = not memories[0]
        steps = [2**rate for rate in range(len(memories))]
        # A later piece begins one frame behind a multiple of every step.
        rates = [video_BCTHW[:, :, 0 if begins else step - 1 :: step] for step in steps]
        features = [self.encoder(frames, memory) for frames, memory in zip(rates, memories, strict=True)]
        if self.lower is None or not begins:
            return features
        with torch.no_grad():
            image_BD1hw = self.lower.features(video_BCTHW[:, :, :1])
        return [torch.cat([image_BD1hw, features_BDthw[:, :, 1:]], dim=2) for features_BDthw in features]

    @classmethod
    def build(cls, config: ModelConfig, lower: Tokenizer | None = None) -> Self:
        """A fresh model; `lower` is its image model, which must be there exactly where `image_path` takes one over."""
        assert isinstance(config, CausalConfig)
        if not config.grows:
            return super().build(config, lower)
        if not isinstance(lower, CausalTokenizer) or lower.config != config.image:
            given = "none" if lower is None else lower.config.model_dump_json()
            raise ValueError(
                f"image_path: {config.image_path} needs the image model {config.image.model_dump_json()} as lower, got {given}"
            )
        return cls(config, lower)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model saved in `folder`, with its frozen image model where it has one, in eval mode."""
        config, image = cls.read_config(folder), load_lower(folder)
        assert isinstance(config, CausalConfig) and (image is None or isinstance(image, CausalTokenizer))
        return cls(config, image).read_weights(folder)
