"""`Detokenizer`: tokens to the latents of a frozen video or image autoencoder, by diffusion (arXiv 2412.04432, 3.1 and A.1).

A conditioning Perceiver turns 64 tokens into 125 context tokens of the 3D U-Net, which says the v of a noisy latent. Latents come in and
go out as the autoencoder makes them; `mean_Z` and `std_Z` normalise them and belong to the saved model. The unconditional input is the
tokens of a grey window (`DivotTokenizer.null_tokens`), given by the caller.

Legend: B clips, N tokens, D token width, L context tokens, Z latent channels, T h w latent positions.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from kinetok.tokenizers.base import Config
from kinetok.tokenizers.divot.ddim import SamplerConfig, Velocity, ddim_sample, guide
from kinetok.tokenizers.divot.perceiver import Perceiver, PerceiverConfig
from kinetok.tokenizers.divot.unet import UNetConfig, VideoUNet


class DetokenizerConfig(Config):
    """Numbers of the de-tokenizer; the defaults are the published ones."""

    perceiver: PerceiverConfig = PerceiverConfig(queries=125)
    """Makes the context; as wide inside as a context token."""
    unet: UNetConfig = UNetConfig()


class Detokenizer(nn.Module):
    """Conditioning Perceiver and U-Net."""

    mean_Z: Tensor
    std_Z: Tensor

    def __init__(self, config: DetokenizerConfig, token_width: int) -> None:
        super().__init__()
        self.config = config
        context = config.unet.context
        self.perceiver = Perceiver(config.perceiver, read=token_width, width=context, out=context)
        self.unet = VideoUNet(config.unet)
        self.register_buffer("mean_Z", torch.zeros(config.unet.z))
        self.register_buffer("std_Z", torch.ones(config.unet.z))

    def forward(self, noisy_BZThw: Tensor, t_B: Tensor, tokens_BND: Tensor, stride_B: Tensor | None = None) -> Tensor:
        """v of a normalised noisy latent at integer steps `t_B`, of clips with frame strides `stride_B`, or with the configured one."""
        v_BZThw: Tensor = self.unet(noisy_BZThw, t_B, self.perceiver(tokens_BND), stride_B)
        return v_BZThw

    def normalise(self, latent_BZThw: Tensor) -> Tensor:
        """(latent - mean) / std of each channel."""
        return (latent_BZThw - self.mean_Z[:, None, None, None]) / self.std_Z[:, None, None, None]

    def denormalise(self, latent_BZThw: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latent_BZThw * self.std_Z[:, None, None, None] + self.mean_Z[:, None, None, None]

    def set_statistics(self, mean_Z: Tensor, std_Z: Tensor) -> Self:
        """Mean and standard deviation of each latent channel; ValueError unless they are Z finite numbers, deviations positive."""
        for name, values in (("mean_Z", mean_Z), ("std_Z", std_Z)):
            if values.shape != self.mean_Z.shape or not values.isfinite().all():
                raise ValueError(f"{name}: needed are {len(self.mean_Z)} finite numbers, one a latent channel, got {values.tolist()}")
        if not (std_Z > 0).all():
            raise ValueError(f"std_Z: a channel that never changes cannot be normalised, got {std_Z.tolist()}")
        self.mean_Z.copy_(mean_Z)
        self.std_Z.copy_(std_Z)
        return self

    @torch.no_grad()
    def sample(
        self, tokens_BND: Tensor, null_ND: Tensor, size: tuple[int, int, int], config: SamplerConfig, seeds: Sequence[int]
    ) -> Tensor:
        """Latents (B, Z, *size) that show what the tokens say, as the autoencoder decodes them.

        `null_ND` are the tokens of no condition; `seeds`, one a clip, decide the noise. With guidance, both conditions of all clips
        are one batch of the U-Net. A model of half precision is stepped in float32 all the same.
        """
        dtype = self.perceiver.latents_1MD.dtype
        context_BLC = self.perceiver(tokens_BND.to(dtype))
        velocity = self._velocity(context_BLC, config.stride)
        if config.guidance > 1:
            null_BLC = self.perceiver(null_ND[None].to(dtype)).expand_as(context_BLC)
            velocity = guided(self._velocity(torch.cat([context_BLC, null_BLC]), config.stride), config)
        return self.denormalise(ddim_sample(velocity, (self.config.unet.z, *size), config, seeds, tokens_BND.device))

    def _velocity(self, context_BLC: Tensor, stride: float | None) -> Velocity:
        stride_B = None if stride is None else torch.full((len(context_BLC),), stride, device=context_BLC.device)

        def velocity(x_BZThw: Tensor, t_B: Tensor) -> Tensor:
            v_BZThw: Tensor = self.unet(x_BZThw.to(context_BLC.dtype), t_B, context_BLC, stride_B)
            return v_BZThw.float()

        return velocity


def guided(both: Velocity, config: SamplerConfig) -> Velocity:
    """The guided v out of `both`, which takes every clip twice: with its condition, then without."""

    def velocity(x_BZThw: Tensor, t_B: Tensor) -> Tensor:
        v_BZThw, null_BZThw = both(torch.cat([x_BZThw, x_BZThw]), torch.cat([t_B, t_B])).chunk(2)
        return guide(v_BZThw, null_BZThw, config)

    return velocity
