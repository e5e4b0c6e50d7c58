"""Wan's causal autoencoder (arXiv 2503.20314; diffusers' AutoencoderKLWan): the best lower stage there is to grow upon.

Strictly causal both ways, and the first latent is the latent of the image. The class computes in pieces, the first frame alone, and
carries the last two frames of every convolution along; without that state its temporal strides do nothing. It keeps the state in the
module, here it belongs to a call. Wan 2.1 (4x8x8) and Wan 2.2 (4x16x16, encoder and decoder of different widths) both work.

Legend: B clips, C pixel channels, T H W frames, rows, columns, D trunk width, Z latent channels, t h w latent positions.
"""

import importlib
from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from kinetok.tokenizers.causal.posterior import Heads
from kinetok.tokenizers.pretrained.base import ConvHeads, Passage, PretrainedConfig, PretrainedRung, without

STEPS = 4
"""Latent steps computed at a time, after the first: any number gives the same, more is faster and takes more memory."""
Cache: TypeAlias = list[Tensor | str | None]
"""State between pieces, one entry per causal convolution, filled by the class."""


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
        whole = self.model.get_submodule("encoder")
        encoder, cache = without(whole, nonlinearity=nn.Identity(), conv_out=Passage()), fresh_cache(whole)
        x_BCTHW = self._patches("patchify", video_BCTHW)
        pieces = [encoder(piece, feat_cache=cache, feat_idx=[0]) for piece in pieces_of(x_BCTHW, STEPS * self.temporal)]
        return torch.cat(pieces, dim=2)

    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        whole = self.model.get_submodule("decoder")
        decoder, cache = without(whole, conv_in=Passage()), fresh_cache(whole)
        pieces = [
            decoder(piece, feat_cache=cache, feat_idx=[0], first_chunk=number == 0)
            for number, piece in enumerate(pieces_of(features_BDthw, STEPS))
        ]
        return self._patches("unpatchify", torch.cat(pieces, dim=2))

    def _patches(self, name: Literal["patchify", "unpatchify"], x_BCTHW: Tensor) -> Tensor:
        if self.config.patch_size is None:
            return x_BCTHW
        class_module = importlib.import_module(type(self.model).__module__)
        folded: Tensor = getattr(class_module, name)(x_BCTHW, self.config.patch_size)
        return folded


def fresh_cache(coder: nn.Module) -> Cache:
    """The state of a whole encoder or decoder before the first piece."""
    return [None] * sum(isinstance(module, nn.Conv3d) for module in coder.modules())


def pieces_of(x_BCTHW: Tensor, length: int) -> Iterator[Tensor]:
    """The first frame or step alone, then `length` at a time."""
    yield x_BCTHW[:, :, :1]
    for start in range(1, x_BCTHW.shape[2], length):
        yield x_BCTHW[:, :, start : start + length]
