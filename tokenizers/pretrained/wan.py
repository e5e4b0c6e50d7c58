"""Wan's causal autoencoder (arXiv 2503.20314; diffusers' AutoencoderKLWan): the best lower stage there is to grow upon.

Strictly causal both ways, and the first latent is the latent of the image. The class computes in pieces, the first frame alone, and
carries the last two frames of every convolution along; without that state its temporal strides do nothing. It keeps the state in the
module, here it belongs to a call or to a stream. Wan 2.1 (4x8x8) and Wan 2.2 (4x16x16, encoder and decoder of different widths) both work.

Legend: B clips, C pixel channels, T H W frames, rows, columns, D trunk width, Z latent channels, t h w latent positions.
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from kinetok.tokenizers.causal.layers import Memory
from kinetok.tokenizers.causal.posterior import Heads
from kinetok.tokenizers.pretrained.base import ConvHeads, Passage, PretrainedConfig, PretrainedRung, without

STEPS = 4
"""Latent steps computed at a time, after the first: any number gives the same, more is faster and takes more memory."""
Cache: TypeAlias = list[Tensor | str | None]
"""State between pieces as the class fills it, one entry per convolution in the order they are reached."""
SKIPPED = "Rep"
"""The class's mark on an upsampling that left the first step alone."""


class WanConfig(PretrainedConfig):
    """What kinetok reads of the class's settings."""

    kind: Literal["wan"] = "wan"
    z_dim: int
    """Latent channels."""
    base_dim: int
    """Width that `dim_mult` multiplies."""
    decoder_base_dim: int | None
    """The same for the decoder; none: as the encoder."""
    dim_mult: tuple[int, ...]
    """Width of each level, finest first; the last is the trunk width."""
    temperal_downsample: tuple[bool, ...]
    """Which levels halve the frames (the name is the class's)."""
    patch_size: int | None
    """Edge of the square of pixels folded into channels first."""

    @property
    def spatial(self) -> int:
        """Pixels of one latent cell along an edge."""
        return (self.patch_size or 1) << (len(self.dim_mult) - 1)


class WanTokenizer(PretrainedRung):
    """AutoencoderKLWan as a rung."""

    class_name = "AutoencoderKLWan"
    config_class = WanConfig
    config: WanConfig

    def build_heads(self) -> Heads:
        part = self.model.get_submodule
        to_moments = nn.Sequential(part("encoder.nonlinearity"), part("encoder.conv_out"), part("quant_conv"))
        return ConvHeads(self.config.z_dim, to_moments, nn.Sequential(part("post_quant_conv"), part("decoder.conv_in")))

    @property
    def feature_channels(self) -> int:
        return self.config.base_dim * self.config.dim_mult[-1]

    @property
    def decoder_channels(self) -> int:
        return (self.config.decoder_base_dim or self.config.base_dim) * self.config.dim_mult[-1]

    @property
    def temporal(self) -> int:
        return 1 << sum(self.config.temperal_downsample)

    @property
    def spatial(self) -> int:
        return self.config.spatial

    def trunk(self, video_BCTHW: Tensor) -> Tensor:
        return self._encoded(video_BCTHW, {})

    def next_features(self, video_BCTHW: Tensor, memories: Sequence[Memory]) -> list[Tensor]:
        begins = not memories[0]
        steps = [2**rate for rate in range(len(memories))]
        # The frames that the coarser rates keep of a later piece are those with which their steps end.
        rates = [video_BCTHW[:, :, 0 if begins else step - 1 :: step] for step in steps]
        return [self._encoded(frames, memory) for frames, memory in zip(rates, memories, strict=True)]

    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        return self.next_frames(features_BDthw, {})

    def next_frames(self, features_BDthw: Tensor, memory: Memory) -> Tensor:
        whole = self.model.get_submodule("decoder")
        decoder, cache = without(whole, conv_in=Passage()), recall(whole, memory)
        pieces = [
            decoder(piece, feat_cache=cache, feat_idx=[0], first_chunk=first)
            for first, piece in pieces_of(features_BDthw, STEPS, begins=cache[0] is None)
        ]
        keep(whole, cache, memory)
        return self._patches("unpatchify", torch.cat(pieces, dim=2))

    def _encoded(self, video_BCTHW: Tensor, memory: Memory) -> Tensor:
        whole = self.model.get_submodule("encoder")
        encoder, cache = without(whole, nonlinearity=nn.Identity(), conv_out=Passage()), recall(whole, memory)
        pieces = [
            encoder(piece, feat_cache=cache, feat_idx=[0])
            for _, piece in pieces_of(self._patches("patchify", video_BCTHW), STEPS * self.temporal, begins=cache[0] is None)
        ]
        keep(whole, cache, memory)
        return torch.cat(pieces, dim=2)

    def _patches(self, name: Literal["patchify", "unpatchify"], x_BCTHW: Tensor) -> Tensor:
        if self.config.patch_size is None:
            return x_BCTHW
        class_module = importlib.import_module(type(self.model).__module__)
        folded: Tensor = getattr(class_module, name)(x_BCTHW, self.config.patch_size)
        return folded


def recall(coder: nn.Module, memory: Memory) -> Cache:
    """What a stream remembers of an encoder or decoder, as the class wants it; all None before the first piece."""
    kept = [memory.get(module) for module in slots(coder)]
    return [SKIPPED if tensor is not None and not tensor.numel() else tensor for tensor in kept]


def keep(coder: nn.Module, cache: Cache, memory: Memory) -> None:
    """The inverse of `recall`: the mark becomes an empty tensor."""
    for module, state in zip(slots(coder), cache, strict=True):
        if state is not None:
            memory[module] = torch.empty(0) if isinstance(state, str) else state


def slots(coder: nn.Module) -> list[nn.Module]:
    """One module per entry of the class's cache (which of them is which does not matter)."""
    return [module for module in coder.modules() if isinstance(module, nn.Conv3d)]


def pieces_of(x_BCTHW: Tensor, length: int, *, begins: bool) -> Iterator[tuple[bool, Tensor]]:
    """Pieces of `length` frames or steps, each with whether it is the first of all, which stands alone."""
    if begins:
        yield True, x_BCTHW[:, :, :1]
    for start in range(int(begins), x_BCTHW.shape[2], length):
        yield False, x_BCTHW[:, :, start : start + length]
