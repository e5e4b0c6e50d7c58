"""Divot's noise schedule: betas, zero terminal signal-to-noise ratio, and the v-parameterisation.

    beta_t = (linspace(sqrt 0.00085, sqrt 0.012))^2, 1000 steps, then sqrt(alpha_bar) shifted and stretched so that alpha_bar_999 = 0
    x_t = a x_0 + s eps       v = a eps - s x_0       x_0 = a x_t - s v       eps = a v + s x_t       a^2 = alpha_bar_t = 1 - s^2

Sources: arXiv 2305.08891 (zero terminal ratio), 2202.00512 (v), 2412.04432 A.1. At t = 999 nothing is left of x_0, so no formula here
divides by a.

Legend: B clips, Z latent channels, T h w latent positions.
"""

from functools import cache

import torch
from torch import Tensor

STEPS = 1000
FIRST_BETA, LAST_BETA = 0.00085, 0.012


def betas() -> Tensor:
    """Before the rescaling, float64 (`STEPS`,)."""
    return torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, STEPS, dtype=torch.float64).square()


def zero_terminal_snr(beta: Tensor) -> Tensor:
    """The betas whose alpha_bar starts as that of `beta` and ends at exactly 0 (arXiv 2305.08891, algorithm 1)."""
    signal = (1 - beta).cumprod(0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    alpha_bar = ((signal - last) * first / (first - last)).square()
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def alpha_bar() -> Tensor:
    """Share of the signal's variance that is left at each step, float64 (`STEPS`,), 0 at the last."""
    return (1 - zero_terminal_snr(betas())).cumprod(0)


@cache
def _signal_and_noise(device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # a table first needed in inference mode must serve training too
        share = alpha_bar()
        return share.sqrt().float().to(device), (1 - share).sqrt().float().to(device)


def signal_and_noise(t_B: Tensor) -> tuple[Tensor, Tensor]:
    """a and s at integer steps `t_B`, float32 (B, 1, 1, 1, 1) each."""
    signal, noise = _signal_and_noise(t_B.device)
    return signal[t_B].view(-1, 1, 1, 1, 1), noise[t_B].view(-1, 1, 1, 1, 1)


def noisy(x_BZThw: Tensor, noise_BZThw: Tensor, t_B: Tensor) -> Tensor:
    """x_t."""
    a, s = signal_and_noise(t_B)
    return a * x_BZThw + s * noise_BZThw


def velocity(x_BZThw: Tensor, noise_BZThw: Tensor, t_B: Tensor) -> Tensor:
    """v, what the de-tokenizer is trained to say."""
    a, s = signal_and_noise(t_B)
    return a * noise_BZThw - s * x_BZThw


def clean(noisy_BZThw: Tensor, v_BZThw: Tensor, t_B: Tensor) -> Tensor:
    """x_0 from x_t and v."""
    a, s = signal_and_noise(t_B)
    return a * noisy_BZThw - s * v_BZThw


def noise(noisy_BZThw: Tensor, v_BZThw: Tensor, t_B: Tensor) -> Tensor:
    """eps from x_t and v."""
    a, s = signal_and_noise(t_B)
    return a * v_BZThw + s * noisy_BZThw
