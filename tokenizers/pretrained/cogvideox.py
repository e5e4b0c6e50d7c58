"""CogVideoX' autoencoder (arXiv 2408.06072; diffusers' AutoencoderKLCogVideoX), 4x8x8: encodes and decodes, cannot be grown upon.

The class takes 8 frames at a time, the first time one more, and 2 latent steps at a time, the first time one more: only 1 + 8k frames
come back as many, so videos are padded to that. Its group norm pools over the frames of a piece, so that no latent is causal inside
one; `growth_obstacle` says why a rung on it is refused.

Legend: B clips, C pixel channels, T H W frames, rows, columns, Z latent channels, t h w latent positions.
"""

from typing import Literal

import torch
from torch import Tensor

from kinetok.tokenizers.base import Geometry, Tokens, TokenSpec, check_video
from kinetok.tokenizers.causal.layers import pad_frames
from kinetok.tokenizers.pretrained.base import Pretrained, PretrainedConfig

WINDOW = 8
"""Frames that the class encodes at a time."""


class CogVideoXConfig(PretrainedConfig):
    """What kinetok reads of the class's settings."""

    kind: Literal["cogvideox"] = "cogvideox"
    latent_channels: int
    block_out_channels: tuple[int, ...]
    """Width of each level, finest first."""
    temporal_compression_ratio: int
    """Frames of one latent step."""

    @property
    def spatial(self) -> int:
        """Pixels of one latent cell along an edge."""
        return 1 << (len(self.block_out_channels) - 1)


class CogVideoXTokenizer(Pretrained):
    """AutoencoderKLCogVideoX as a tokenizer."""

    class_name = "AutoencoderKLCogVideoX"
    config_class = CogVideoXConfig
    config: CogVideoXConfig
    growth_obstacle = (
        "its decoder's norms want the 4x latent at every level, which a grown rung does not have, and its group norm pools over time, "
        "so its first latent is not that of the image"
    )

    @property
    def z(self) -> int:
        return self.config.latent_channels

    @property
    def geometry(self) -> Geometry:
        """As measured, not as the names of its layers promise."""
        config = self.config
        width = config.block_out_channels[-1]
        return Geometry(
            temporal=config.temporal_compression_ratio,
            spatial=config.spatial,
            channels=self.z,
            encoder_width=width,
            decoder_width=width,
            causal_encoder=False,
            causal_decoder=False,
            image_first=False,
            window=WINDOW,
        )

    def spec(self) -> TokenSpec:
        geometry = self.geometry
        return TokenSpec(
            tokenizer=self.config.kind,
            weights=self.digest(),
            layout="grid",
            channels=geometry.channels,
            temporal=geometry.temporal,
            spatial=geometry.spatial,
        )

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tokens:
        """Posterior means (B, Z, t, h, w) with odd t, at least float32; ValueError on what is no video."""
        check_video(video_BCTHW, self.config.spatial)
        padded_BCTHW = pad_frames(video_BCTHW, WINDOW)
        latent_BZthw: Tensor = self.model.encode(padded_BCTHW).latent_dist.mode()  # type: ignore[operator]
        return Tokens(latent_BZthw.to(torch.promote_types(latent_BZthw.dtype, torch.float32)), frames=video_BCTHW.shape[2])

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """The video (B, 3, tokens.frames, H, W), clamped to [-1, 1]; ValueError on an even number of steps."""
        if tokens.values.shape[2] % 2 == 0:
            raise ValueError(f"{self.class_name} encodes to an odd number of steps; {tokens.values.shape[2]} would come back as others")
        latent_BZthw = tokens.values.to(next(self.model.parameters()).dtype)
        video_BCTHW: Tensor = self.model.decode(latent_BZthw).sample  # type: ignore[operator]
        return video_BCTHW[:, :, : tokens.frames].clamp(-1, 1)
