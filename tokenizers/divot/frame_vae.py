"""`FrameVAE`: an image autoencoder on every frame of a video (diffusers' AutoencoderKL), the latent space under Divot's de-tokenizer.

The published de-tokenizer stands on Stable Diffusion's, 8x8 with 4 channels, whose `scaling_factor` is 0.18215. Tokens are posterior
means: the published training draws from the posterior, whose deviation is far below the latents', and cannot be cached. Any other frozen
tokenizer with a grid of continuous tokens serves as well.

Legend: B clips, C pixel channels, T H W frames, rows, columns, Z latent channels, h w latent positions.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from kinetok.tokenizers.base import Geometry, Tokens, TokenSpec, check_video
from kinetok.tokenizers.pretrained.base import Pretrained, PretrainedConfig


class FrameVAEConfig(PretrainedConfig):
    """What kinetok reads of the class's settings."""

    kind: Literal["frame_vae"] = "frame_vae"
    latent_channels: int
    block_out_channels: tuple[int, ...]
    shift_factor: float | None = None

    @property
    def spatial(self) -> int:
        """Pixels of one latent cell along an edge."""
        return 1 << (len(self.block_out_channels) - 1)


class FrameVAE(Pretrained):
    """AutoencoderKL as a tokenizer of single frames: every latent step is one frame."""

    class_name = "AutoencoderKL"
    config_class = FrameVAEConfig
    config: FrameVAEConfig

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if self.config.shift_factor is not None:
            raise ValueError(
                f"{self.class_name} with a shift_factor ({self.config.shift_factor}) is not supported: name one without, such as that of "
                "Stable Diffusion 1 or 2"
            )

    @property
    def z(self) -> int:
        return self.config.latent_channels

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def geometry(self) -> Geometry:
        """No compression in time."""
        width = self.config.block_out_channels[-1]
        return Geometry(temporal=1, spatial=self.config.spatial, channels=self.z, encoder_width=width, decoder_width=width)

    def spec(self) -> TokenSpec:
        """A grid of continuous tokens, one step a frame."""
        return TokenSpec(
            tokenizer=self.config.kind, weights=self.digest(), layout="grid", channels=self.z, temporal=1, spatial=self.config.spatial
        )

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tokens:
        """Posterior means (B, Z, T, h, w), float32, of a video (B, 3, T, H, W) in [-1, 1]; not scaled, see `normalise`."""
        check_video(video_BCTHW, self.config.spatial)
        frames_FCHW = video_BCTHW.transpose(1, 2).flatten(0, 1).to(self._dtype)
        mean_FZhw: Tensor = self.model.encode(frames_FCHW).latent_dist.mean.float()  # type: ignore[operator]
        return Tokens(torch.unflatten(mean_FZhw, 0, (len(video_BCTHW), -1)).transpose(1, 2), frames=video_BCTHW.shape[2])

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """The video (B, 3, tokens.frames, H, W), clamped to [-1, 1]."""
        latent_FZhw = tokens.values[:, :, : tokens.frames].transpose(1, 2).flatten(0, 1).to(self._dtype)
        frames_FCHW: Tensor = self.model.decode(latent_FZhw).sample  # type: ignore[operator]
        return torch.unflatten(frames_FCHW, 0, (len(tokens.values), -1)).transpose(1, 2).clamp(-1, 1)
