"""The Gaussian posterior of a KL autoencoder and the heads between encoder and decoder trunk.

Legend: B clips, D trunk width, Z latent channels, t h w latent positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kinetok.tokenizers.causal.layers import Memory

LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class Posterior:
    """N(mean, exp(log_variance)) for each latent number, both (B, Z, t, h, w), at least float32."""

    mean_BZthw: Tensor
    log_variance_BZthw: Tensor

    def sample(self, noise_BZthw: Tensor) -> Tensor:
        """mean + standard deviation * noise."""
        return self.mean_BZthw + (0.5 * self.log_variance_BZthw).exp() * noise_BZthw

    def kl(self) -> Tensor:
        """KL(posterior || N(0, 1)) in nats, the mean over a clip's latent numbers, (B,); arXiv 1312.6114, appendix B."""
        variance = self.log_variance_BZthw.exp()
        return 0.5 * (self.mean_BZthw.square() + variance - 1 - self.log_variance_BZthw).flatten(1).mean(1)


class Heads(nn.Module, ABC):
    """Encoder trunk features -> posterior, and latent -> decoder trunk features: what growing copies and trains anew.

    Heads that look back in time take the `memory` of a stream.
    """

    z: int
    """Latent channels."""

    @abstractmethod
    def posterior(self, features_BDthw: Tensor, memory: Memory | None = None) -> Posterior:
        """The distribution of the latent, at least float32."""

    @abstractmethod
    def decoder_features(self, latent_BZthw: Tensor, memory: Memory | None = None) -> Tensor:
        """What the decoder trunk starts from, in the type of the heads' weights."""


class LatentHeads(Heads):
    """Two 1x1x1 convolutions; `decoder_width` is the decoder trunk's width where it differs from the encoder's."""

    def __init__(self, width: int, z: int, decoder_width: int | None = None) -> None:
        super().__init__()
        self.z = z
        self.to_posterior = nn.Conv3d(width, 2 * z, 1)
        self.from_latent = nn.Conv3d(z, decoder_width or width, 1)

    def posterior(self, features_BDthw: Tensor, memory: Memory | None = None) -> Posterior:
        moments = self.to_posterior(features_BDthw)
        mean, log_variance = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def decoder_features(self, latent_BZthw: Tensor, memory: Memory | None = None) -> Tensor:
        features_BDthw: Tensor = self.from_latent(latent_BZthw.to(self.from_latent.weight.dtype))
        return features_BDthw


class DualHeads(Heads):
    """Heads of a rung that keeps key and residual apart: features [key; r], latent [z_key; z_res], each half of the channels.

    The residual's share of the decoder features starts at zero, so that at first the latent decodes as its key half alone does.
    """

    def __init__(self, key: Heads, residual: LatentHeads) -> None:
        super().__init__()
        self.z = key.z + residual.z
        self.key, self.residual = key, residual
        nn.init.zeros_(residual.from_latent.weight)
        assert residual.from_latent.bias is not None
        nn.init.zeros_(residual.from_latent.bias)

    def posterior(self, features_BDthw: Tensor, memory: Memory | None = None) -> Posterior:
        key_BDthw, residual_BDthw = features_BDthw.chunk(2, dim=1)
        key, residual = self.key.posterior(key_BDthw, memory), self.residual.posterior(residual_BDthw)
        mean_BZthw = torch.cat([key.mean_BZthw, residual.mean_BZthw], dim=1)
        return Posterior(mean_BZthw, torch.cat([key.log_variance_BZthw, residual.log_variance_BZthw], dim=1))

    def decoder_features(self, latent_BZthw: Tensor, memory: Memory | None = None) -> Tensor:
        key_BZthw, residual_BZthw = torch.split(latent_BZthw, [self.key.z, self.residual.z], dim=1)
        return self.key.decoder_features(key_BZthw, memory) + self.residual.decoder_features(residual_BZthw)


def seeded_noise(seeds: Iterable[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise (len(seeds), *shape): each sample's depends on its own seed alone, whatever the batch and the device."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(device)
