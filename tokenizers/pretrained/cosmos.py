"""Cosmos' causal tokenizer (arXiv 2501.03575; diffusers' AutoencoderKLCosmos): 4x8x8 and 8x8x8 lower stages.

Causal both ways, and the first latent is the latent of the image. Despite the name it is a plain autoencoder: its posterior is a
point, with the log variance at the floor, so the KL of a rung grown upon it is the mean square of its latents and a constant. Not
covered: streaming (the class attends over all past steps and carries no state).

Legend: B clips, C pixel channels, T H W frames, rows, columns, D trunk width, Z latent channels, t h w latent positions.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from kinetok.tokenizers.causal.posterior import LOG_VARIANCE_RANGE, Heads
from kinetok.tokenizers.pretrained.base import ConvHeads, Passage, PretrainedConfig, PretrainedRung, without


class CosmosConfig(PretrainedConfig):
    """What kinetok reads of the class's settings."""

    kind: Literal["cosmos"] = "cosmos"
    latent_channels: int
    encoder_block_out_channels: tuple[int, ...]
    """Width of each level, finest first; the last is the trunk width."""
    decode_block_out_channels: tuple[int, ...]
    """The same for the decoder."""
    spatial_compression_ratio: int
    """Pixels of one latent cell along an edge."""
    temporal_compression_ratio: int
    """Frames of one latent step."""

    @property
    def spatial(self) -> int:
        """Pixels of one latent cell along an edge."""
        return self.spatial_compression_ratio


class PointHeads(ConvHeads):
    """Heads of an autoencoder without variance."""

    def split(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        return moments, torch.full_like(moments, LOG_VARIANCE_RANGE[0])


class CosmosTokenizer(PretrainedRung):
    """AutoencoderKLCosmos as a rung."""

    class_name = "AutoencoderKLCosmos"
    config_class = CosmosConfig
    config: CosmosConfig

    def build_heads(self) -> Heads:
        part = self.model.get_submodule
        to_latent = nn.Sequential(nn.SiLU(), part("encoder.conv_out"), part("quant_conv"))
        return PointHeads(self.config.latent_channels, to_latent, nn.Sequential(part("post_quant_conv"), part("decoder.conv_in")))

    @property
    def feature_channels(self) -> int:
        return self.config.encoder_block_out_channels[-1]

    @property
    def decoder_channels(self) -> int:
        return self.config.decode_block_out_channels[-1]

    @property
    def temporal(self) -> int:
        return self.config.temporal_compression_ratio

    @property
    def spatial(self) -> int:
        return self.config.spatial

    def trunk(self, video_BCTHW: Tensor) -> Tensor:
        # Part by part: the class applies its activation and its head in one line after the norm.
        x_BCTHW = video_BCTHW
        for name in ("patch_embed", "conv_in", "down_blocks", "mid_block", "norm_out"):
            part = self.model.get_submodule(f"encoder.{name}")
            for module in part if isinstance(part, nn.ModuleList) else (part,):
                x_BCTHW = module(x_BCTHW)
        return x_BCTHW

    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        # As its own first layer leaves them: with channels last, its convolutions round otherwise.
        video_BCTHW: Tensor = without(self.model.get_submodule("decoder"), conv_in=Passage())(features_BDthw.contiguous())
        return video_BCTHW
