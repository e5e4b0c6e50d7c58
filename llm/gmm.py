"""A mixture of diagonal Gaussians over continuous tokens: what a language model predicts where it cannot predict a class.

    p(x) = sum_k softmax(logit)_k * prod_j N(x_j; mean_kj, variance_kj)        variance = max(softplus(raw), floor)

GIVT's head (arXiv 2312.02116) as Divot uses it (arXiv 2412.04432, section 3.2). Always in float32 or better: in bfloat16 the third
digit of the likelihood is noise. Not covered: full covariances, a normal transformation of the tokens.

Legend: K components, D token width, P = 2KD + K parameters of one token, N tokens, B samples; `...` any leading dimensions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_2_PI = math.log(2 * math.pi)


def parameter_count(components: int, width: int) -> int:
    """P, the numbers that describe the mixture of one token."""
    return components * (2 * width + 1)


@dataclass(frozen=True)
class GaussianMixture:
    """One mixture for each token."""

    mean_KD: Tensor
    """(..., K, D)"""
    variance_KD: Tensor
    """(..., K, D), positive."""
    logit_K: Tensor
    """(..., K)"""

    @classmethod
    def of(cls, parameters_P: Tensor, components: int, floor: float) -> Self:
        """Read P numbers as [K*D means | K*D raw variances | K logits]; `floor` is the smallest variance, below it no gradient passes."""
        parameters_P = parameters_P.to(torch.promote_types(parameters_P.dtype, torch.float32))
        width = (parameters_P.shape[-1] // components - 1) // 2
        size = components * width
        mean, raw, logit_K = torch.split(parameters_P, [size, size, components], dim=-1)
        shape = (components, width)
        return cls(torch.unflatten(mean, -1, shape), torch.unflatten(F.softplus(raw).clamp(min=floor), -1, shape), logit_K)

    def log_prob(self, x_D: Tensor) -> Tensor:
        """Natural logarithm of the density at `x_D` (..., D), summed over the D numbers: (...)."""
        square_KD = (x_D.to(self.mean_KD.dtype)[..., None, :] - self.mean_KD).square() / self.variance_KD
        log_normal_K = -0.5 * (square_KD + self.variance_KD.log() + LOG_2_PI).sum(-1)
        return (self.logit_K.log_softmax(-1) + log_normal_K).logsumexp(-1)

    def mean(self) -> Tensor:
        """Expected token, (..., D)."""
        return (self.logit_K.softmax(-1)[..., None] * self.mean_KD).sum(-2)

    def draw(self, component: Tensor, normal_D: Tensor, variance_scale: float) -> Tensor:
        """The token that a component index (...) and standard normal noise (..., D) stand for, its variance scaled."""
        index = component[..., None, None].expand(*component.shape, 1, self.mean_KD.shape[-1])
        mean_D, variance_D = (part_KD.gather(-2, index).squeeze(-2) for part_KD in (self.mean_KD, self.variance_KD))
        return mean_D + (variance_scale * variance_D).sqrt() * normal_D

    def sample(self, seeds: Sequence[int], variance_scale: float) -> Tensor:
        """Tokens (B, N, D) of mixtures (B, N): a component by its weight, then its Gaussian with `variance_scale` times its variance.

        A sample's tokens depend on its own seed alone, whatever the batch and the device.
        """
        uniform_BN, normal_BND = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            uniform_BN.append(torch.rand(self.logit_K.shape[1:-1], generator=generator))
            normal_BND.append(torch.randn(*self.logit_K.shape[1:-1], self.mean_KD.shape[-1], generator=generator))
        below = self.logit_K.softmax(-1).cumsum(-1) <= torch.stack(uniform_BN).to(self.logit_K)[..., None]
        component_BN = below.sum(-1).clamp(max=self.logit_K.shape[-1] - 1)
        return self.draw(component_BN, torch.stack(normal_BND).to(self.mean_KD), variance_scale)
