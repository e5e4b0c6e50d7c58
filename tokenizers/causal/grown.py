"""A grown rung: twice the temporal compression of the frozen rung below it (ProMAG, arXiv 2501.05442, section 3 and its figure).

    full = E_k(x)       key = E_k(every 2nd frame of x)        frozen, the same weights
    r = E_k_2k(AdaNorm(full; key))                             residual blocks, then temporal downsampling
    u = key (+) r  ->  head  ->  latent  ->  head  ->  D_k_2k  residual blocks, then temporal upsampling
    video = D_k(...)                                           frozen; passes gradient to its input

Only the modulation, the mixing, both heads, E_k_2k and D_k_2k are trained, and where `unfreeze_decoder` says so a copy of D_k or of its
finest level, which stands in its place: the rung below itself stays as it is, whatever is grown on it. Growing works on any `Rung`, a
grown one included. What "(+)" and AdaNorm are the paper leaves open, so `GrownConfig` offers the readings; its defaults are a sum, and
a scale and a shift from the key features pooled over each frame.

Step-0 identity, for every mode that has a key path. Where (+) is a sum or starts as one (`concat`) r starts at zero, and where key
and residual stay apart (`dual`) the decoder starts deaf to the residual; the heads are copied from the rung below, D's residual
blocks start as the identity and its upsampling as duplication. So the untrained model encodes a video to the lower rung's latents
of its every second frame (in the first half of the channels, for `dual`), and decodes them as the lower decoder trunk applied to
the lower head's output with every step but the first standing twice (`repeat_frames`).

Without a key path u is r alone, and r keeps the amplitude of the features: only what the blocks add to them is computed of normalised
ones. So it starts as the features of every second step of the full-rate video, and what it lacks is the key path, not a scale.

Not covered: training the encoder below (its weights are the identity of cached features and are hashed around training).

Legend: B clips, C pixel channels, T H W frames, rows, columns, D trunk width, t h w positions at the lower rung's rate, s steps of
this rung (t = 2s - 1).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kinetok.tokenizers.base import Count, Geometry, GrowthFeatures, ModelConfig, Tokenizer, Tokens, TokenSpec, lower_stage
from kinetok.tokenizers.causal.layers import (
    CausalConv3d,
    FrameNorm,
    Memory,
    NormKind,
    ResBlocks,
    Upsample,
    pick_latest_,
    repeat_frames,
    zero_,
)
from kinetok.tokenizers.causal.posterior import DualHeads, Heads, LatentHeads
from kinetok.tokenizers.causal.rung import Rung, load_lower


class GrownConfig(ModelConfig):
    """Numbers of one grown rung; width, latent channels and geometry follow from the rung below."""

    kind: Literal["grown"] = "grown"
    blocks: Count = 2
    """Residual blocks on the encoder's side, and as many on the decoder's."""
    groups: Count = 32
    """Normalisation groups; must divide the trunk width."""
    norm: NormKind = "rms"
    """As in `CausalConfig`; `group` is for the ablation, `std` the other reading."""
    mix: Literal["add", "concat", "dual"] = "add"
    """u = key + r; a trained 1x1x1 projection of [key; r] back to the trunk width, which starts as the sum; or [key; r] itself with
    a head for each, so that the latent [z_key; z_res] has twice the channels of the rung below and its halves can be told apart."""
    ada: Literal["scale", "scale_shift", "none"] = "scale_shift"
    """What the key features do to the normalised full-rate features; `none` leaves a plain residual."""
    cond: Literal["pooled_per_frame", "spatial"] = "pooled_per_frame"
    """Whether AdaNorm sees the key features pooled over each frame, or those at each position."""
    key: bool = True
    """False is an ablation: u = r alone. With `ada: none` the key features are not used at all."""
    # The default is not dumped: it would give every rung that was grown before there was a choice another key.
    unfreeze_decoder: Annotated[Literal["none", "last", "all"], Field(exclude_if=lambda value: value == "none")] = "none"
    """How much of the decoder below is trained too, in this rung's own copy: nothing, its finest level with what makes pixels, or all."""

    @property
    def grows(self) -> bool:
        return True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.key and self.mix != "add":
            raise ValueError(f"key: without the key path there is nothing to {self.mix}; leave mix at add")
        return self


class AdaNorm(nn.Module):
    """Normalise the full-rate features, then modulate them by what their key step holds; starts as the plain norm."""

    def __init__(self, width: int, config: GrownConfig) -> None:
        super().__init__()
        self.norm = FrameNorm(width, config.groups, config.norm, affine=False)
        self.pooled = config.cond == "pooled_per_frame"
        self.modulation: nn.Linear | None = None
        if config.ada != "none":
            self.modulation = nn.Linear(width, width if config.ada == "scale" else 2 * width)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, full_BDthw: Tensor, key_BDshw: Tensor, *, first: bool = True) -> Tensor:
        normal_BDthw: Tensor = self.norm(full_BDthw)
        if self.modulation is None:
            return normal_BDthw
        condition_BDshw = key_BDshw.mean((3, 4), keepdim=True) if self.pooled else key_BDshw
        modulation_BDshw = self.modulation(condition_BDshw.movedim(1, -1)).movedim(-1, 1)
        # Two fine steps share the key step that ends with them: r reaches step s only with fine steps <= 2s, so nothing leaks back.
        scale_BDthw, *shift_BDthw = torch.split(repeat_frames(modulation_BDshw, first=first), full_BDthw.shape[1], dim=1)
        scaled_BDthw = normal_BDthw * (1 + scale_BDthw)
        return scaled_BDthw + shift_BDthw[0] if shift_BDthw else scaled_BDthw


class MixingEncoder(nn.Module):
    """E_k_2k and the cross-level feature mixing: r = downsample(blocks(AdaNorm(full; key))), u = key (+) r.

    Without a key path u = downsample(full + (blocks(AdaNorm(full; key)) - AdaNorm(full; key))).
    """

    worth_compiling: ClassVar[bool] = True

    def __init__(self, width: int, config: GrownConfig) -> None:
        super().__init__()
        self.mode, self.key = config.mix, config.key
        self.modulate = AdaNorm(width, config)
        self.blocks = ResBlocks(config.blocks, width, config.groups, config.norm)
        self.down = CausalConv3d(width, width, stride=(2, 1, 1))
        if not self.key:
            pick_latest_(self.down)  # r carries all there is: it starts as the features of every second step
        elif self.mode != "dual":
            zero_(self.down)
        if self.mode == "concat":
            self.project = nn.Conv3d(2 * width, width, 1)
            sum_halves_(self.project)

    def forward(self, features: GrowthFeatures, memory: Memory | None = None) -> Tensor:
        first = not (memory and self.down in memory)
        modulated_BDthw = self.modulate(features.full_BDthw, features.key_BDthw, first=first)
        fine_BDthw: Tensor = self.blocks(modulated_BDthw, memory)
        if not self.key:
            fine_BDthw = features.full_BDthw + (fine_BDthw - modulated_BDthw)
        r_BDshw: Tensor = self.down(fine_BDthw, memory)
        if not self.key:
            return r_BDshw
        if self.mode == "add":
            return torch.add(features.key_BDthw, r_BDshw)
        both_BEshw = torch.cat([features.key_BDthw, r_BDshw], dim=1)
        u_BDshw: Tensor = both_BEshw if self.mode == "dual" else self.project(both_BEshw)
        return u_BDshw


class DuplicatingDecoder(nn.Module):
    """D_k_2k: residual blocks, then twice the steps; starts as `repeat_frames`."""

    worth_compiling: ClassVar[bool] = True

    def __init__(self, width: int, config: GrownConfig) -> None:
        super().__init__()
        self.blocks = ResBlocks(config.blocks, width, config.groups, config.norm)
        self.up = Upsample(width, width, time=2, space=1)
        duplicate_(self.up.conv)

    def forward(self, features_BDshw: Tensor, memory: Memory | None = None) -> Tensor:
        features_BDthw: Tensor = self.up(self.blocks(features_BDshw, memory), memory)
        return features_BDthw


class GrownTokenizer(Rung):
    """One more doubling of the temporal compression on top of `lower`, which is frozen in place."""

    config_class = GrownConfig
    config: GrownConfig

    def __init__(self, config: GrownConfig, lower: Rung) -> None:
        super().__init__()
        for width in (lower.feature_channels, lower.decoder_channels):
            if width % config.groups:
                raise ValueError(f"groups: {config.groups} does not divide the trunk width {width} of the lower stage")
        self.config = config
        self.stand_on(lower)
        self.mix = MixingEncoder(lower.feature_channels, config)
        self.heads = grown_heads(lower, config)
        self.decoder = DuplicatingDecoder(lower.decoder_channels, config)
        below = lower.decoder_parts() if config.unfreeze_decoder != "none" else ()
        frozen = len(below) - 1 if config.unfreeze_decoder == "last" else 0
        self._frozen_below = below[:frozen]  # a tuple, which hides them like the rung that they belong to
        self.below = nn.ModuleList(copy.deepcopy(part).requires_grad_(True) for part in below[frozen:])

    @property
    def lower(self) -> Rung:
        """The frozen rung below."""
        return self._hidden[0]

    @property
    def geometry(self) -> Geometry:
        """Causal where the rung below is."""
        below = self.lower.geometry
        return replace(super().geometry, causal_encoder=below.causal_encoder, causal_decoder=below.causal_decoder)

    @property
    def feature_channels(self) -> int:
        return self.lower.feature_channels * (2 if self.config.mix == "dual" else 1)

    @property
    def decoder_channels(self) -> int:
        return self.lower.decoder_channels

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

    def feature_spec(self) -> TokenSpec:
        """Trunk features of the rung below."""
        return self.lower.spec().model_copy(update={"content": "features", "channels": self.lower.feature_channels})

    @torch.no_grad()
    def encode_features(self, features: Mapping[str, Tensor], frames: int) -> Tokens:
        mixed_BDthw: Tensor = self.mix(GrowthFeatures(features["full"], features["key"]))
        return Tokens(self.heads.posterior(mixed_BDthw).mean_BZthw, frames)

    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        if not self.below:
            return self.lower.decode_features(self.decoder(features_BDthw))
        return self._through_parts(features_BDthw, None)

    def decoder_parts(self) -> tuple[nn.Module, ...]:
        below = (*self._frozen_below, *self.below) if self.below else self.lower.decoder_parts()
        return self.decoder, *below

    def _through_parts(self, features_BDthw: Tensor, memory: Memory | None) -> Tensor:
        x_BCTHW = features_BDthw
        for part in self.decoder_parts():
            x_BCTHW = part(x_BCTHW, memory)
        return x_BCTHW

    @property
    def rates(self) -> int:
        return self.lower.rates + 1

    def next_features(self, video_BCTHW: Tensor, memories: Sequence[Memory]) -> list[Tensor]:
        below = self.lower.next_features(video_BCTHW, memories)
        return [self.mix(GrowthFeatures(*pair), memory) for pair, memory in zip(pairwise(below), memories, strict=False)]

    def next_frames(self, features_BDthw: Tensor, memory: Memory) -> Tensor:
        if not self.below:
            return self.lower.next_frames(self.decoder(features_BDthw, memory), memory)
        return self._through_parts(features_BDthw, memory)

    @classmethod
    def build(cls, config: ModelConfig, lower: Tokenizer | None = None) -> Self:
        """A fresh rung on `lower`, which must be a rung itself."""
        if lower is None:
            raise ValueError("a 'grown' model needs the frozen model it grows upon: give it as lower")
        below = lower_stage(lower)
        assert isinstance(config, GrownConfig) and isinstance(below, Rung)
        return cls(config, below)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model saved in `folder` on the lower model saved in `folder/lower`, both in eval mode."""
        return cls.build(cls.read_config(folder), load_lower(folder)).read_weights(folder)


def grown_heads(lower: Rung, config: GrownConfig) -> Heads:
    """A copy of the lower rung's heads to train on, whatever they are; in `dual` mode with new ones for the residual beside them."""
    copied = copy.deepcopy(lower.heads).requires_grad_(True)
    if config.mix != "dual":
        return copied
    return DualHeads(copied, LatentHeads(lower.feature_channels, copied.z, lower.decoder_channels))


@torch.no_grad()
def sum_halves_(conv: nn.Conv3d) -> None:
    """Make a 1x1x1 convolution add the first half of its input channels to the second."""
    zero_(conv)
    conv.weight[:, :, 0, 0, 0] = torch.eye(conv.out_channels, device="cpu").repeat(1, 2)


@torch.no_grad()
def duplicate_(conv: nn.Conv3d) -> None:
    """Make the convolution of a temporal `Upsample` copy its latest, central input to both of the steps it yields."""
    zero_(conv)
    conv.weight[:, :, -1, 1, 1] = torch.eye(conv.in_channels, device="cpu").repeat(2, 1)
