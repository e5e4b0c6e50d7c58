"""`ddim_sample`: DDIM with classifier-free guidance and its rescaling, as Divot's de-tokenizer is sampled.

    x_{t'} = sqrt(alpha') x_0 + sqrt(1 - alpha' - sigma^2) eps + sigma z    sigma^2 = eta^2 (1 - alpha') (1 - alpha / alpha') / (1 - alpha)
    v = v_u + g (v_c - v_u), then a share r of it brought to the standard deviation of v_c

Sources: arXiv 2010.02502 (DDIM), 2207.12598 (guidance), 2305.08891 (rescaling and trailing steps). The step after the last is not the
clean latent but alpha' = alpha_bar_0, as in the published sampler: with eta 1 the last step still adds a little noise.

Legend: B clips, Z latent channels, T h w latent positions, S sampling steps.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kinetok.tokenizers.base import Config, Count
from kinetok.tokenizers.divot import schedule

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t_B) -> v."""


class SamplerConfig(Config):
    """How latents are sampled; the defaults are the published ones."""

    steps: Count = 50
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Noise added on the way: 0 none, 1 as much as the forward process."""
    guidance: Annotated[float, Field(ge=1)] = 7.5
    """1 asks for plain conditioning, and half as much work."""
    rescale: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Share of the guided v that is brought to the standard deviation of the conditional one."""
    spacing: Literal["uniform", "trailing"] = "uniform"
    """uniform is the published one, t = 1, 21, ..., 981; trailing ends at 999, where the schedule has no signal left."""
    # None is not dumped: it would give every model and stage with a sampler another key.
    stride: Annotated[float | None, Field(gt=0, exclude_if=lambda value: value is None)] = None
    """Frame stride that the U-Net is told, source frames from one frame to the next; None for that of its configuration."""
    half: bool = False
    """Round alpha_bar to float16 where the published sampler does: the same to three digits, needed to compare with it."""

    @property
    def passes(self) -> int:
        """Steps that are taken: `uniform` ones have whole strides between them, so there may be more than asked for."""
        return self.steps if self.spacing == "trailing" else len(range(0, schedule.STEPS, schedule.STEPS // self.steps))


@dataclass(frozen=True)
class Grid:
    """The steps of a sampler, in ascending order of t: the first is the last to be taken. float64 but for `t_S`."""

    t_S: Tensor
    alpha_S: Tensor
    before_S: Tensor
    """alpha_bar of the step that follows in sampling."""
    sigma_S: Tensor


def timesteps(steps: int, spacing: Literal["uniform", "trailing"]) -> Tensor:
    """Integer steps in ascending order; ValueError where `uniform` would run past the schedule.

    `uniform` counts in whole strides of 1000 // steps, so it has more steps than asked for where 1000 is no multiple.
    """
    if steps > schedule.STEPS:
        raise ValueError(f"steps: the schedule has {schedule.STEPS} steps, {steps} cannot be taken")
    if spacing == "trailing":
        return torch.from_numpy(np.arange(schedule.STEPS, 0, -schedule.STEPS / steps).round().astype(int)[:steps][::-1].copy()) - 1
    t_S = torch.arange(0, schedule.STEPS, schedule.STEPS // steps) + 1
    if t_S[-1] >= schedule.STEPS:
        raise ValueError(
            f"steps: {steps} uniform steps would run past t = {schedule.STEPS - 1}; take a divisor of {schedule.STEPS} below it"
        )
    return t_S


def make_grid(config: SamplerConfig) -> Grid:
    """Steps and their alpha_bar and sigma."""
    t_S = timesteps(config.steps, config.spacing)
    rounding = torch.float16 if config.half else torch.float32
    alpha_bar = schedule.alpha_bar().to(rounding)
    alpha_S, before_S = alpha_bar[t_S], torch.cat([alpha_bar[:1], alpha_bar[t_S[:-1]]])
    # The published sampler rounds 1 - alpha and its reciprocal too, and nothing else.
    inverse_S = (1 / (1 - alpha_S)).double()
    alpha_S, before_S = alpha_S.double(), before_S.double()
    sigma_S = config.eta * ((1 - before_S) * inverse_S * (1 - alpha_S / before_S)).sqrt()
    return Grid(t_S, alpha_S, before_S, sigma_S)


def guide(v_BZThw: Tensor, null_BZThw: Tensor, config: SamplerConfig) -> Tensor:
    """The guided v, rescaled."""
    guided_BZThw = null_BZThw + config.guidance * (v_BZThw - null_BZThw)
    wanted, found = (x.flatten(1).std(1).view(-1, 1, 1, 1, 1) for x in (v_BZThw, guided_BZThw))
    # An untrained model says 0 everywhere, which has no deviation to divide by.
    return guided_BZThw * (config.rescale * wanted / found.clamp(min=torch.finfo(found.dtype).tiny) + 1 - config.rescale)


def ddim_steps(velocity: Velocity, x_BZThw: Tensor, noise: Iterable[Tensor], grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """(x after the step, x_0 as predicted in it) of each step from the noise `x_BZThw` on; `noise` gives z for each step."""
    for place, z_BZThw in zip(reversed(range(len(grid.t_S))), noise, strict=False):
        t_B = grid.t_S[place].to(x_BZThw.device).expand(len(x_BZThw))
        v_BZThw = velocity(x_BZThw, t_B)
        x0_BZThw, eps_BZThw = schedule.clean(x_BZThw, v_BZThw, t_B), schedule.noise(x_BZThw, v_BZThw, t_B)
        before, sigma = grid.before_S[place], grid.sigma_S[place]
        # 1 - alpha' - sigma^2 is 0 at t = 999 with eta 1, and rounding can bring it below.
        direction = (1 - before - sigma**2).clamp(min=0).sqrt()
        x_BZThw = before.sqrt().item() * x0_BZThw + direction.item() * eps_BZThw + sigma.item() * z_BZThw
        yield x_BZThw, x0_BZThw


def ddim_sample(velocity: Velocity, shape: tuple[int, ...], config: SamplerConfig, seeds: Iterable[int], device: torch.device) -> Tensor:
    """Latents (B, *shape); every clip's noise depends on its own seed alone, whatever the batch and the device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    grid = make_grid(config)
    *_, (x_BZThw, _) = ddim_steps(velocity, draw(), (draw() for _ in grid.t_S), grid)
    return x_BZThw
