"""LTX-Video's autoencoder (arXiv 2501.00103; diffusers' AutoencoderKLLTXVideo), 8x32x32 with 128 channels.

The encoder is causal and the first latent is the latent of the image; the decoder looks ahead. The class keeps no memory from piece to
piece, so neither it nor what is grown upon it streams. One channel of the head is the log variance of all latent channels. Decoders that
take a timestep (0.9.1 and later) decode at timestep 0, as diffusers' pipelines do unless told otherwise; decoders that add noise are
refused, because their output is not a function of the latent.

Legend: B clips, C pixel channels, T H W frames, rows, columns, D trunk width, Z latent channels, t h w latent positions.
"""

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from kinetok.tokenizers.base import Geometry
from kinetok.tokenizers.causal.posterior import Heads
from kinetok.tokenizers.pretrained.base import ConvHeads, Passage, PretrainedConfig, PretrainedRung, without


class LTXConfig(PretrainedConfig):
    """What kinetok reads of the class's settings."""

    kind: Literal["ltx"] = "ltx"
    latent_channels: int
    block_out_channels: tuple[int, ...]
    """Width of each level, finest first; the last is the trunk width."""
    decoder_block_out_channels: tuple[int, ...]
    """The same for the decoder."""
    decoder_inject_noise: tuple[bool, ...]
    """Which levels of the decoder add noise."""
    timestep_conditioning: bool
    """Whether the decoder takes a timestep."""
    encoder_causal: bool
    decoder_causal: bool
    spatio_temporal_scaling: tuple[bool, ...]
    """Which levels halve frames, rows and columns."""
    patch_size: int
    """Edge of the square of pixels folded into channels first."""
    patch_size_t: int
    """Frames folded into channels first."""
    spatial_compression_ratio: int | None
    """Where the settings say what `spatial` would otherwise count."""
    temporal_compression_ratio: int | None
    """Where the settings say what `temporal` would otherwise count."""

    @property
    def spatial(self) -> int:
        """Pixels of one latent cell along an edge, as the class counts where its settings do not say."""
        return self.spatial_compression_ratio or self.patch_size << sum(self.spatio_temporal_scaling)

    @property
    def temporal(self) -> int:
        """Frames of one latent step, as the class counts where its settings do not say."""
        return self.temporal_compression_ratio or self.patch_size_t << sum(self.spatio_temporal_scaling)


class SharedVarianceHeads(ConvHeads):
    """Heads whose last channel is the log variance of every latent channel."""

    def split(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        mean = moments[:, : self.z]
        return mean, moments[:, self.z :].expand_as(mean)


class LTXTokenizer(PretrainedRung):
    """AutoencoderKLLTXVideo as a rung."""

    class_name = "AutoencoderKLLTXVideo"
    config_class = LTXConfig
    config: LTXConfig

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if any(self.config.decoder_inject_noise):
            raise ValueError(f"this {self.class_name} adds noise as it decodes (decoder_inject_noise): no two decodings would agree")
        if not self.config.encoder_causal:
            raise ValueError(
                f"this {self.class_name} has an encoder that looks ahead (encoder_causal: false): its first latent is no image's"
            )

    def build_heads(self) -> Heads:
        part = self.model.get_submodule
        to_moments = nn.Sequential(part("encoder.conv_act"), part("encoder.conv_out"))
        return SharedVarianceHeads(self.config.latent_channels, to_moments, nn.Sequential(part("decoder.conv_in")))

    @property
    def geometry(self) -> Geometry:
        return replace(super().geometry, causal_decoder=self.config.decoder_causal)

    @property
    def feature_channels(self) -> int:
        return self.config.block_out_channels[-1]

    @property
    def decoder_channels(self) -> int:
        return self.config.decoder_block_out_channels[-1]

    @property
    def temporal(self) -> int:
        return self.config.temporal

    @property
    def spatial(self) -> int:
        return self.config.spatial

    def _statistics(self, latent_BZthw: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (self.model.get_buffer(f"latents_{name}").view(1, -1, 1, 1, 1).to(latent_BZthw) for name in ("mean", "std"))
        return mean, self.config.scaling_factor / std

    def trunk(self, video_BCTHW: Tensor) -> Tensor:
        encoder = without(self.model.get_submodule("encoder"), conv_act=nn.Identity(), conv_out=Passage())
        features_BDthw: Tensor = encoder(video_BCTHW)
        return features_BDthw[:, : self.feature_channels]  # behind them the class repeats what it takes for the log variance

    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        decoder = without(self.model.get_submodule("decoder"), conv_in=Passage())
        timestep_B = features_BDthw.new_zeros(len(features_BDthw)) if self.config.timestep_conditioning else None
        video_BCTHW: Tensor = decoder(features_BDthw, timestep_B)
        return video_BCTHW
