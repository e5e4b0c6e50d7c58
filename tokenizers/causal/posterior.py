"""The Gaussian posterior of a KL autoencoder and the 1x1x1 heads between encoder and decoder trunk.

Legend: B clips, D trunk width, Z latent channels, t h w latent positions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


class LatentHeads(nn.Module):
    """Encoder trunk -> posterior, and latent -> decoder trunk: the two 1x1x1 convolutions that growing replaces."""

    def __init__(self, width: int, z: int) -> None:
        super().__init__()
        self.z = z
        self.to_posterior = nn.Conv3d(width, 2 * z, 1)
        self.from_latent = nn.Conv3d(z, width, 1)

    def posterior(self, features_BDthw: Tensor) -> Posterior:
        moments = self.to_posterior(features_BDthw)
        mean, log_variance = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def decoder_features(self, latent_BZthw: Tensor) -> Tensor:
        features_BDthw: Tensor = self.from_latent(latent_BZthw.to(self.from_latent.weight.dtype))
        return features_BDthw


def seeded_noise(seeds: Iterable[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise (len(seeds), *shape): each sample's depends on its own seed alone, whatever the batch and the device."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(device)
