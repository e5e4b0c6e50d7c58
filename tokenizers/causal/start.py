"""Where the base rung's training starts: at a linear transform coder, or at an image model, instead of at noise.

With the last convolution of every residual block at zero, all that is left of the autoencoder is its chain of patch, strided,
1x1x1 and depth-to-space convolutions. These are set to the cosine transform of each cell (for a factor of 2 the Haar wavelet), its
coefficients sorted by how much of natural video they are expected to carry and scaled to unit variance; the first z become the
latent, and the decoder inverts them. The untrained model is a blurred copy of its input, and training begins at what a linear coder
can do. Channels that the transform leaves free keep torch's own initialisation. Not in the paper: training starts some 10 dB higher for
it. `CausalConfig.start: random` does without (`reset_`): every convolution as torch initialises it, which is what a public MagViT-v2
begins with.

From an image model (arXiv 2501.05442; `inflate_`) it starts at the latest-frame inflation of Open-MAGVIT2 (arXiv 2409.04410).

Legend: factors are (time, space, space) between two levels; a band is one frequency per axis; a slot is one output channel.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import cos, pi, prod, sqrt
from typing import TypeAlias

import torch
from torch import Tensor, nn

COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 2.0, -1.0))
"""Luma and two chroma axes, mutually orthogonal."""
COLOUR_VARIANCE = (1.0, 0.15, 0.03)
CORRELATION = (0.95, 0.95, 0.95)
"""Of pixels one frame, one row and one column apart: the first-order Markov model that tells which coefficients matter."""
PIXEL_DEVIATION = 0.5
"""Of pixels in [-1, 1]."""
LOG_VARIANCE = -6.0
"""Start of the posterior: little noise beside latents of about unit variance."""

Axes: TypeAlias = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Slot:
    """One coefficient: its pattern (time, rows, columns) on a channel of the finer level, and what it amounts to in pixels."""

    channel: int
    pattern: Tensor
    axes: Axes
    """The whole separable pattern over frames, rows and columns of pixels."""
    scale: float
    """Variance of its colour axis."""

    @cached_property
    def variance(self) -> float:
        """Expected energy of the coefficient under the Markov model."""
        return self.scale * prod(_energy(axis, correlation) for axis, correlation in zip(self.axes, CORRELATION, strict=True))

    @cached_property
    def deviation(self) -> float:
        """Expected standard deviation of the pattern's share; every channel is divided by its own."""
        return PIXEL_DEVIATION * sqrt(self.variance / prod(float(axis.square().sum()) for axis in self.axes))


def transform_slots(finer: list[Slot], factors: tuple[int, int, int], width: int) -> list[Slot]:
    """The `width` coefficients expected to carry most among all bands of all slots of the finer level; fewer where there are fewer."""
    slots = []
    for channel, slot in enumerate(finer):
        for band in product(*(range(factor) for factor in factors)):
            waves = [_cosine(u, n) for u, n in zip(band, factors, strict=True)]
            time, rows, columns = (torch.kron(wave, axis) for wave, axis in zip(waves, slot.axes, strict=True))
            slots.append(Slot(channel, torch.einsum("i,j,k->ijk", *waves), (time, rows, columns), slot.scale))
    return sorted(slots, key=lambda slot: -slot.variance)[:width]


@torch.no_grad()
def analyse_(conv: nn.Conv3d, slots: list[Slot], finer: list[Slot]) -> None:
    """Make a strided causal convolution compute the slots: each is the pattern's share in the cell that ends at the output's place."""
    for index, slot in enumerate(slots):
        time, rows, columns = slot.pattern.shape
        ratio = finer[slot.channel].deviation / slot.deviation
        conv.weight[index] = 0
        conv.weight[index, slot.channel, -time:, 1 : 1 + rows, 1 : 1 + columns] = slot.pattern / slot.pattern.square().sum() * ratio
    _clear_bias(conv, len(slots))


@torch.no_grad()
def synthesise_(conv: nn.Conv3d, slots: list[Slot], finer: list[Slot], channels: int) -> None:
    """Make the convolution of an `Upsample` put its slots back together into the finer slots, the first of its `channels` channels."""
    weight = conv.weight.view(-1, channels, *conv.weight.shape[1:])
    weight[:, : len(finer)] = 0
    for index, slot in enumerate(slots):
        ratio = slot.deviation / finer[slot.channel].deviation
        weight[:, slot.channel, index, -1, 1, 1] = (slot.pattern.flatten() * ratio).to(weight)
    if conv.bias is not None:
        conv.bias.view(-1, channels)[:, : len(finer)] = 0


def pixel_slots(patch: int, width: int) -> list[Slot]:
    """Slots of the first convolution, whose inputs are the patch**2 pixels x 3 colours of a cell: patterns (patch**2 * 3, 1, 1)."""
    one = torch.ones(1, device="cpu")
    colours = [Slot(index, torch.ones(1, 1, 1, device="cpu"), (one, one, one), variance) for index, variance in enumerate(COLOUR_VARIANCE)]
    slots = transform_slots(colours, (1, patch, patch), width)
    mixed = [torch.outer(slot.pattern.flatten(), torch.tensor(COLOURS[slot.channel], device="cpu")) for slot in slots]
    return [replace(slot, pattern=pattern.reshape(-1, 1, 1)) for slot, pattern in zip(slots, mixed, strict=True)]


@torch.no_grad()
def analyse_pixels_(conv: nn.Conv3d, slots: list[Slot]) -> None:
    """Make the first convolution compute the pixel slots at its latest, central tap."""
    for index, slot in enumerate(slots):
        conv.weight[index] = 0
        conv.weight[index, :, -1, 1, 1] = slot.pattern.flatten() / slot.pattern.square().sum() / slot.deviation
    _clear_bias(conv, len(slots))


@torch.no_grad()
def synthesise_pixels_(conv: nn.Conv3d, slots: list[Slot]) -> None:
    """Make the last convolution put pixels back together."""
    nn.init.zeros_(conv.weight)
    for index, slot in enumerate(slots):
        conv.weight[:, index, -1, 1, 1] = slot.pattern.flatten() * slot.deviation
    _clear_bias(conv, conv.out_channels)


@torch.no_grad()
def pass_through_(to_posterior: nn.Conv3d, from_latent: nn.Conv3d, z: int) -> None:
    """Heads that carry the first z coefficients over, nearly without noise."""
    for conv in (to_posterior, from_latent):
        nn.init.zeros_(conv.weight)
        _clear_bias(conv, conv.out_channels)
    identity = torch.eye(z, min(z, to_posterior.in_channels), device="cpu")
    to_posterior.weight[:z, : identity.shape[1], 0, 0, 0] = identity
    from_latent.weight[: identity.shape[1], :, 0, 0, 0] = identity.T
    assert to_posterior.bias is not None
    to_posterior.bias[z:] = LOG_VARIANCE


def reset_(model: nn.Module) -> None:
    """Every convolution at torch's default initialisation, also those that elsewhere start at zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.reset_parameters()


@torch.no_grad()
def inflate_(video: nn.Module, image: nn.Module) -> None:
    """Make the video model treat every frame that ends a latent step as the image model treats it alone, and repeat what it decodes.

    To a frame alone, which stands for its own past, a causal kernel is the 2D kernel that its taps add up to. That goes to the latest
    tap, so past frames do not matter at first, and to each of the frames that a temporal upsampling makes out of one.
    """
    sources = dict(image.named_parameters())
    for name, weight in video.named_parameters():
        source = sources[name].detach()
        if weight.dim() == 5:
            source = nn.functional.pad(source.sum(2, keepdim=True), (0, 0, 0, 0, weight.shape[2] - 1, 0))
        weight.copy_(source.repeat(weight.shape[0] // source.shape[0], *[1] * (weight.dim() - 1)))


def _cosine(u: int, n: int) -> Tensor:
    """The u-th cosine over n places (for n = 2: sum and difference)."""
    return torch.tensor([cos(pi * (2 * x + 1) * u / (2 * n)) for x in range(n)], device="cpu") / cos(pi * u / (2 * n))


def _energy(axis: Tensor, correlation: float) -> float:
    """Variance of the unit-length pattern on a first-order Markov chain of unit variance."""
    places = torch.arange(len(axis), device="cpu")
    covariance = correlation ** (places[:, None] - places).abs()
    return float(axis @ covariance @ axis / axis.square().sum())


def _clear_bias(conv: nn.Conv3d, channels: int) -> None:
    if conv.bias is not None:
        conv.bias[:channels] = 0
