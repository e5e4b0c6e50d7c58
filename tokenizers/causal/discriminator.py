"""The adversarial part of the ladder's loss: a 3D patch discriminator, hinge losses, LeCAM and the adaptive weight.

    L_D = (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) / 2 + lecam * R          (hinge, arXiv 1705.02894)
    L_G = -mean D(x_hat)
    R   = mean relu(D(x) - a_fake)^2 + mean relu(a_real - D(x_hat))^2              (LeCAM, arXiv 2104.03310, as its code has it)
    adaptive weight = |dL_rec / dW| / (|dL_G / dW| + 1e-4), at most 1e4            (VQGAN, arXiv 2012.09841, equation 7)

a_real and a_fake are running averages of the logits over steps, W the weights of the last trained layer on the way to the pixels.
Logits and all that is computed of them are float32. ProMAG's description names a GAN term for its base model and no more; the layout is
PatchGAN's (arXiv 1611.07004) in three dimensions. Not covered: who calls this when (`training.py`).

Legend: B clips, C channels, T H W frames, rows, columns, t h w patches.
"""

from itertools import pairwise
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from kinetok.tokenizers.causal.layers import FrameNorm

WIDEST = 8
"""Levels are never wider than this many times the first."""
GROUPS = 32
LECAM_DECAY = 0.99
EPSILON = 1e-4
LARGEST_WEIGHT = 1e4


class ClipConv3d(nn.Conv3d):
    """A convolution that sees one frame to either side; the first and the last frame stand in for those beyond the ends.

    Padding in time is not left to torch: of 2 frames padded to 4, its bfloat16 kernels for CPUs make weight gradients of garbage (2.13).
    """

    def __init__(self, width_in: int, width_out: int, edge: int = 3, stride: int = 1) -> None:
        super().__init__(width_in, width_out, (3, edge, edge), stride=stride, padding=(0, 1, 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return super().forward(torch.cat([x_BCTHW[:, :, :1], x_BCTHW, x_BCTHW[:, :, -1:]], dim=2))


class PatchDiscriminator(nn.Module):
    """How real each space-time patch of a video looks: (B, 3, T, H, W) to float32 logits (B, 1, t, h, w).

    `layers` convolutions halve time and space, each after the first twice as wide as the one before (up to `WIDEST`); two more of
    stride 1 follow. It sees past and future alike, since it judges whole clips; its norms pool over single frames, so neither the clip
    length nor the company in a batch changes what a frame is normalised by. Any T >= 1; H and W at least 2**layers.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        widths = [width * min(2**level, WIDEST) for level in range(layers + 1)]
        self.first = ClipConv3d(3, width, edge=4, stride=2)
        self.convs = nn.ModuleList(ClipConv3d(narrow, wide, edge=4, stride=2) for narrow, wide in pairwise(widths[:-1]))
        self.convs.append(ClipConv3d(widths[-2], widths[-1]))
        self.norms = nn.ModuleList(FrameNorm(wide, gcd(wide, GROUPS)) for wide in widths[1:])
        self.last = ClipConv3d(widths[-1], 1)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        x_BCTHW = F.leaky_relu(self.first(video_BCTHW), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BCTHW = F.leaky_relu(norm(conv(x_BCTHW)), 0.2)
        logits_B1thw: Tensor = self.last(x_BCTHW)
        return logits_B1thw.to(torch.promote_types(logits_B1thw.dtype, torch.float32))


class Lecam(nn.Module):
    """Running averages of the mean logits of real and of reconstructed videos, and the penalty that keeps logits near them.

    They move once a step, by the mean over all its micro-batches and ranks, when the next step begins: a step is judged by the steps
    before it alone, however its clips are divided. All state is buffers, so checkpoints carry it, the same on every rank.
    """

    real: Tensor
    fake: Tensor
    step: Tensor
    """The one that `sums` are of."""
    sums: Tensor
    """Mean logits of its micro-batches so far, of real and of reconstructed videos."""
    parts: Tensor
    """How many micro-batches these are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(2))
        self.register_buffer("parts", torch.zeros(()))

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """average <- 0.99 * average + 0.01 * mean of the last step, where `step` is a new one. (Without a look at the device's numbers.)"""
        new = self.step != step
        means, weight = self.sums / self.parts.clamp(min=1), (1 - LECAM_DECAY) * (new & (self.parts > 0)).to(self.real)
        self.real.lerp_(means[0], weight)
        self.fake.lerp_(means[1], weight)
        self.sums *= ~new
        self.parts *= ~new
        self.step.fill_(step)

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """R: what real logits exceed the fakes' average by, and what fake ones fall short of the real average by, squared."""
        return F.relu(real_logits - self.fake).square().mean() + F.relu(self.real - fake_logits).square().mean()

    @torch.no_grad()
    def update(self, real_logits: Tensor, fake_logits: Tensor) -> None:
        """Add a micro-batch to the step that began. A collective where there are several ranks."""
        means = torch.stack([real_logits.mean(), fake_logits.mean()])
        if distributed.is_initialized():
            distributed.all_reduce(means)
            means /= distributed.get_world_size()
        self.sums += means
        self.parts += 1


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """L_D without LeCAM: 0 where real logits are at least 1 and fake ones at most -1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """L_G, any real number."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction: Tensor, generator: Tensor, kernel: Tensor) -> Tensor:
    """What L_G is multiplied by to move `kernel` as strongly as the reconstruction loss does; a scalar without gradient.

    Costs two backward passes from the losses down to `kernel`. Each rank and micro-batch computes its own, as VQGAN's code does: with
    it, losses are not quite independent of how a global batch is divided.
    """
    (pull,) = torch.autograd.grad(reconstruction, kernel, retain_graph=True)
    (push,) = torch.autograd.grad(generator, kernel, retain_graph=True)
    ratio: Tensor = pull.float().norm() / (push.float().norm() + EPSILON)
    return ratio.clamp(max=LARGEST_WEIGHT)
