"""Heads that turn a language model's output into continuous tokens: a mixture of Gaussians, a regression, or a small diffusion model.

Divot's is the mixture; the others are what its ablations compare it with (arXiv 2412.04432, table 8). The diffusion head is MAR's (arXiv
2406.11838): an MLP that removes noise from one token, told by the language model which. Its noise follows the cosine
x_t = cos(pi t / 2) * x + sin(pi t / 2) * noise with t in [0, 1] (arXiv 2102.09672), and it predicts the noise, or the velocity
v = cos * noise - sin * x (arXiv 2202.00512). Losses are in float32 and per token.

Not covered: what a head is conditioned on (`model.py`).

Legend: B samples, N tokens, D token width, P numbers a head reads of a token, W width of the denoiser, F waves of
the time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.llm.dit import FREQUENCIES, TIME_SCALE, sinusoids
from kinetok.llm.gmm import GaussianMixture, parameter_count
from kinetok.tokenizers.base import Config, Count

Scale = Annotated[float, Field(ge=0)]


class GMMConfig(Config):
    """Mixture of diagonal Gaussians (`kinetok.llm.gmm`)."""

    kind: Literal["gmm"] = "gmm"
    components: Count = 16
    floor: Annotated[float, Field(gt=0)] = 1e-5
    """Smallest variance."""
    variance_scale: Scale = 0.1
    """Of the variance of what is sampled, over the predicted one."""


class MSEConfig(Config):
    """Regression to the token itself."""

    kind: Literal["mse"] = "mse"
    variance_scale: ClassVar[float] = 0.0


class DiffusionConfig(Config):
    """A denoising MLP for single tokens."""

    kind: Literal["diffusion"] = "diffusion"
    target: Literal["eps", "v"]
    """What it predicts: noise or velocity."""
    width: Count = 1024
    depth: Count = 3
    steps: Count = 100
    """Of sampling."""
    variance_scale: Scale = 1.0
    """Of the variance of the noise that sampling adds in every step."""


HeadConfig: TypeAlias = Annotated[GMMConfig | MSEConfig | DiffusionConfig, Field(discriminator="kind")]


class Head(nn.Module, ABC):
    """What is learned from, and made of, P numbers for each token."""

    inputs: int
    """P"""

    @abstractmethod
    def loss(self, condition_BNP: Tensor, token_BND: Tensor, seeds: Sequence[int]) -> Tensor:
        """Of each token, divided by D: (B, N), float32. What it draws comes from a sample's own seed."""

    @abstractmethod
    def sample(self, condition_BNP: Tensor, seeds: Sequence[int], variance_scale: float) -> Tensor:
        """Tokens (B, N, D), float32, one seed a sample."""


class GMMHead(Head):
    """Negative log-likelihood of a mixture."""

    def __init__(self, config: GMMConfig, token_width: int) -> None:
        super().__init__()
        self.config, self.inputs = config, parameter_count(config.components, token_width)

    def mixture(self, condition_BNP: Tensor) -> GaussianMixture:
        """What is predicted of every token."""
        return GaussianMixture.of(condition_BNP, self.config.components, self.config.floor)

    def loss(self, condition_BNP: Tensor, token_BND: Tensor, seeds: Sequence[int]) -> Tensor:
        return -self.mixture(condition_BNP).log_prob(token_BND) / token_BND.shape[-1]

    def sample(self, condition_BNP: Tensor, seeds: Sequence[int], variance_scale: float) -> Tensor:
        return self.mixture(condition_BNP).sample(seeds, variance_scale)


class MSEHead(Head):
    """The condition is the token; there is nothing to draw."""

    def __init__(self, token_width: int) -> None:
        super().__init__()
        self.inputs = token_width

    def loss(self, condition_BNP: Tensor, token_BND: Tensor, seeds: Sequence[int]) -> Tensor:
        return (condition_BNP.float() - token_BND.float()).square().mean(-1)

    def sample(self, condition_BNP: Tensor, seeds: Sequence[int], variance_scale: float) -> Tensor:
        return condition_BNP.float()


class DiffusionHead(Head):
    """Mean squared error of the predicted noise or velocity at a random time; sampled from noise in equal steps."""

    def __init__(self, config: DiffusionConfig, token_width: int) -> None:
        super().__init__()
        self.config, self.inputs, self.token_width = config, config.width, token_width
        self.net = Denoiser(token_width, config.width, config.depth)

    def loss(self, condition_BNP: Tensor, token_BND: Tensor, seeds: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        time_BN = torch.stack([torch.rand(token_BND.shape[1], generator=generator) for generator in generators]).to(token_BND.device)
        noise_BND, x_BND = self._noise(generators, token_BND.shape[1]).to(token_BND.device), token_BND.float()
        cos, sin = _angle(time_BN)
        output_BND = self.net(cos * x_BND + sin * noise_BND, time_BN, condition_BNP).float()
        target_BND = noise_BND if self.config.target == "eps" else cos * noise_BND - sin * x_BND
        loss_BN: Tensor = (output_BND - target_BND).square().mean(-1)
        return loss_BN

    def sample(self, condition_BNP: Tensor, seeds: Sequence[int], variance_scale: float) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        tokens, device = condition_BNP.shape[1], condition_BNP.device
        x_BND = self._noise(generators, tokens).to(device)
        # Midpoints: at t = 1 noise says nothing of the token, and it would be divided by zero.
        times = (1 - (torch.arange(self.config.steps, device=device) + 0.5) / self.config.steps).unbind()
        for time, following in zip(times, (*times[1:], torch.zeros((), device=device)), strict=True):
            fresh_BND = self._noise(generators, tokens).to(device)
            x_BND = self._step(x_BND, time, following, condition_BNP, variance_scale**0.5 * fresh_BND)
        return x_BND

    def _step(self, x_BND: Tensor, time: Tensor, following: Tensor, condition_BNP: Tensor, noise_BND: Tensor) -> Tensor:
        """One ancestral step (arXiv 2010.02502, eta = 1) from `time` to the smaller `following`."""
        output_BND = self.net(x_BND, time.expand(x_BND.shape[:2]), condition_BNP).float()
        (cos, sin), (cos_next, sin_next) = _angle(time), _angle(following)
        if self.config.target == "eps":
            eps_BND, token_BND = output_BND, (x_BND - sin * output_BND) / cos
        else:
            eps_BND, token_BND = sin * x_BND + cos * output_BND, cos * x_BND - sin * output_BND
        sigma = sin_next / sin * (1 - (cos / cos_next).square()).sqrt()
        next_BND: Tensor = cos_next * token_BND + (sin_next.square() - sigma.square()).clamp(min=0).sqrt() * eps_BND + sigma * noise_BND
        return next_BND

    def _noise(self, generators: Sequence[torch.Generator], tokens: int) -> Tensor:
        return torch.stack([torch.randn(tokens, self.token_width, generator=generator) for generator in generators])


def _angle(time: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of the token, and how much noise there is, at `time`; (..., 1)."""
    angle = (0.5 * math.pi * time)[..., None]
    return angle.cos(), angle.sin()


class Denoiser(nn.Module):
    """Residual MLP blocks whose norms are scaled, shifted and gated by time and condition; the output starts at zero."""

    def __init__(self, token_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.from_token = nn.Linear(token_width, width)
        self.from_time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.from_condition = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.to_token = nn.Linear(width, token_width)
        for layer in (self.modulation, self.to_token):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BND: Tensor, time_BN: Tensor, condition_BNW: Tensor) -> Tensor:
        """What `DiffusionConfig.target` says, (B, N, D)."""
        waves_BNF = torch.unflatten(sinusoids(TIME_SCALE * time_BN.flatten()), 0, time_BN.shape)
        told_BNW = F.silu(self.from_time(waves_BNF.to(condition_BNW.dtype)) + self.from_condition(condition_BNW))
        x_BNW = self.from_token(x_BND.to(condition_BNW.dtype))
        for block in self.blocks:
            x_BNW = block(x_BNW, told_BNW)
        shift_BNW, scale_BNW = self.modulation(told_BNW).chunk(2, dim=-1)
        output_BND: Tensor = self.to_token(self.norm(x_BNW) * (1 + scale_BNW) + shift_BNW)
        return output_BND


class Block(nn.Module):
    """x + gate * MLP(scale * norm(x) + shift); the gate starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BNW: Tensor, told_BNW: Tensor) -> Tensor:
        shift_BNW, scale_BNW, gate_BNW = self.modulation(told_BNW).chunk(3, dim=-1)
        output_BNW: Tensor = x_BNW + gate_BNW * self.mlp(self.norm(x_BNW) * (1 + scale_BNW) + shift_BNW)
        return output_BNW


def build_head(config: HeadConfig, token_width: int) -> Head:
    """A fresh head for tokens of that width."""
    if isinstance(config, GMMConfig):
        return GMMHead(config, token_width)
    if isinstance(config, MSEConfig):
        return MSEHead(token_width)
    return DiffusionHead(config, token_width)
