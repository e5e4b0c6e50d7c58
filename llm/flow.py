"""Flow matching between latents and noise: the loss, and an Euler sampler with classifier-free guidance.

    x_t = (1 - t) * x + t * noise        target velocity = d x_t / d t = noise - x        loss = mean (velocity - target)^2

(rectified flow, arXiv 2209.03003 and 2210.02747), t from a logit-normal distribution (arXiv 2403.03206). All of it works on
normalised latents. What a sample draws comes from its own seed alone, whatever its batch, its worker and its device. Not covered:
shifting the times with resolution, other solvers.

Legend: B samples, Z latent channels, t h w latent positions, L text tokens, E text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from kinetok.tokenizers.causal.posterior import seeded_noise


class Velocity(Protocol):
    """What is trained and sampled from: `VideoDiT`, or a closed form."""

    def __call__(self, noisy_BZthw: Tensor, time_B: Tensor, text_BLE: Tensor, text_mask_BL: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training step."""

    normal_B: Tensor
    """Standard normal; its logistic function is a time."""
    uniform_B: Tensor
    """In [0, 1); decides whether a caption is dropped."""
    noise_BZthw: Tensor


def draw(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Draws:
    """Random numbers of the samples with these seeds, for latents of `shape` (Z, t, h, w)."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append((torch.randn((), generator=generator), torch.rand((), generator=generator), torch.randn(*shape, generator=generator)))
    normal_B, uniform_B, noise_BZthw = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
    return Draws(normal_B, uniform_B, noise_BZthw)


def logit_normal(normal_B: Tensor, mean: float, std: float) -> Tensor:
    """Times in (0, 1): logistic(mean + std * normal)."""
    return torch.sigmoid(mean + std * normal_B)


def flow_loss(model: Velocity, x_BZthw: Tensor, noise_BZthw: Tensor, time_B: Tensor, text_BLE: Tensor, text_mask_BL: Tensor) -> Tensor:
    """Mean squared error of the velocity for each sample, (B,); `x_BZthw` are normalised latents."""
    t = time_B[:, None, None, None, None]
    velocity = model((1 - t) * x_BZthw + t * noise_BZthw, time_B, text_BLE, text_mask_BL)
    return (velocity.float() - (noise_BZthw - x_BZthw)).square().flatten(1).mean(1)


def guided(model: Velocity, x_BZthw: Tensor, time_B: Tensor, text_BLE: Tensor, text_mask_BL: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): without + guidance * (with - without the text); 1 is plain conditioning."""
    if guidance == 1:
        return model(x_BZthw, time_B, text_BLE, text_mask_BL)
    x_2B, time_2B, text_2B = (torch.cat([part, part]) for part in (x_BZthw, time_B, text_BLE))
    with_text, without = model(x_2B, time_2B, text_2B, torch.cat([text_mask_BL, torch.zeros_like(text_mask_BL)])).chunk(2)
    return without + guidance * (with_text - without)


@torch.no_grad()
def euler_sample(
    model: Velocity,
    shape: Sequence[int],
    text_BLE: Tensor,
    text_mask_BL: Tensor,
    *,
    steps: int,
    guidance: float,
    seeds: Sequence[int],
) -> Tensor:
    """Normalised latents (B, *shape), `shape` being (Z, t, h, w): the flow followed from noise (t = 1) to data in equal Euler steps.

    One seed a sample, on the device of the text; `VideoDiT.denormalise` makes them a tokenizer's latents.
    """
    if len(seeds) != len(text_BLE):
        raise ValueError(f"{len(seeds)} seeds for {len(text_BLE)} texts: give one a sample")
    x_BZthw = seeded_noise(seeds, tuple(shape), text_BLE.device)
    times = torch.linspace(1, 0, steps + 1).tolist()
    for time, following in pairwise(times):
        time_B = torch.full((len(seeds),), time, device=x_BZthw.device)
        x_BZthw = x_BZthw + (following - time) * guided(model, x_BZthw, time_B, text_BLE, text_mask_BL, guidance)
    return x_BZthw
