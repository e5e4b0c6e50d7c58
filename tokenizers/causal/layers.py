"""Causal 3D-convolution layers of the ProMAG tokenizers (arXiv 2501.05442), after MagViT-v2 (arXiv 2310.05737).

Every layer is causal in time: output frame i never depends on input frames after the ones it stands for. The first frame stands
for itself alone and each further step of a layer of stride 2 for two frames, so 1 + 2k frames become 1 + k and back. A video may come
in pieces: layers that look back take a `Memory`, which the caller keeps from piece to piece. Channels that are last in memory
stay so. Not covered: spatial tiling (`tiling`).

Legend: B clips, C channels, D channels of a latent, E twice as many, G groups, T H W frames, rows, columns of the layer's input, t h w of
its output.
"""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind: TypeAlias = Literal["rms", "std", "group"]
EPSILON = 1e-6
PADDING = (0, 1, 1)

Memory: TypeAlias = dict[nn.Module, Tensor]
"""What a stream of pieces carries on: for each convolution the input frames that its next output needs again; empty before the first."""


class CausalConv3d(nn.Conv3d):
    """3D convolution, kernel 3, that sees the present and the past: the first frame stands twice more in front, nothing behind."""

    def __init__(self, width_in: int, width_out: int, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__(width_in, width_out, 3, stride=stride, padding=PADDING)

    def forward(self, x_BCTHW: Tensor, memory: Memory | None = None) -> Tensor:
        # The first frame twice, not expanded: beside a tensor with a stride of 0, `cat` forgets the memory format of x.
        past = [memory[self]] if memory and self in memory else [x_BCTHW[:, :, :1]] * 2
        seen_BCTHW = torch.cat([*past, x_BCTHW], dim=2)
        y_BCthw = self._convolve(seen_BCTHW)
        if memory is not None:
            memory[self] = seen_BCTHW[:, :, y_BCthw.shape[2] * self.stride[0] :].clone()  # a view would keep all of it
        return y_BCthw

    def _convolve(self, x_BCTHW: Tensor) -> Tensor:
        if not leaves_onednn_out(x_BCTHW):
            return super().forward(x_BCTHW)
        # By name: what tiles convolutions reads the arguments of all kinds alike.
        return torch.mkldnn_convolution(
            x_BCTHW, self.weight, self.bias, padding=PADDING, stride=self.stride, dilation=self.dilation, groups=self.groups
        )


def leaves_onednn_out(x_BCTHW: Tensor) -> bool:
    """Whether torch may convolve x without oneDNN although it is there: a single clip in float32 on a CPU. For a small one it takes a
    kernel of its own, with which the small preset needs more than twice as long to encode."""
    if torch.compiler.is_compiling():
        return False  # what follows would break the graph
    single = len(x_BCTHW) == 1 and x_BCTHW.device.type == "cpu" and x_BCTHW.dtype == torch.float32
    # The operator by its own name knows neither autocast nor tensors without data.
    known = type(x_BCTHW) is Tensor and not torch.is_autocast_enabled("cpu")
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return single and known and bool(available and torch.backends.mkldnn.enabled)


class FrameNorm(nn.Module):
    """Group normalisation of each frame by itself, pooled over a group's channels and positions but never over time.

    `rms`, the default, leaves the mean in: y = w * x / sqrt(mean_G(x^2) + eps) + b. `std` is the other reading of a norm whose mean
    subtraction is removed: y = w * x / sqrt(var_G(x) + eps) + b, the deviation taken about the mean, the output not centred. Subtracting
    the mean (`group`) makes bright spots in the corners once a model is grown (project page of arXiv 2501.05442). Statistics are
    float32 whatever the type of x.
    """

    def __init__(self, width: int, groups: int, kind: NormKind = "rms", *, affine: bool = True) -> None:
        super().__init__()
        self.groups, self.kind = groups, kind
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        if self.kind == "group":
            return self._group_norm(x_BCTHW)
        B, C, T, H, W = x_BCTHW.shape
        precise = x_BCTHW.to(torch.promote_types(x_BCTHW.dtype, torch.float32))
        grouped = precise.reshape(B, self.groups, C // self.groups, T, H, W)
        power_BGT = grouped.square().mean((2, 4, 5)) if self.kind == "rms" else grouped.var((2, 4, 5), correction=0)
        scale_BCT = (power_BGT + EPSILON).rsqrt().repeat_interleave(C // self.groups, 1)
        if self.weight is None or self.bias is None:
            scaled_BCTHW: Tensor = x_BCTHW * scale_BCT[..., None, None].to(x_BCTHW.dtype)
            return scaled_BCTHW
        scale_BCT11 = (scale_BCT * self.weight[:, None])[..., None, None].to(x_BCTHW.dtype)
        return torch.addcmul(self.bias.to(x_BCTHW.dtype).view(-1, 1, 1, 1), x_BCTHW, scale_BCT11)

    def _group_norm(self, x_BCTHW: Tensor) -> Tensor:
        frames = x_BCTHW.transpose(1, 2)
        normal = F.group_norm(frames.flatten(0, 1), self.groups, self.weight, self.bias, EPSILON)
        return normal.reshape(frames.shape).transpose(1, 2)


class AdaptiveNorm(nn.Module):
    """AdaGN: each frame normalised by itself, scaled by what the deviations of a `style` say and shifted by what its means do.

    Starts near the plain norm: the deviations scale about 1, the means shift about 0.
    """

    def __init__(self, style_width: int, width: int, groups: int, norm: NormKind) -> None:
        super().__init__()
        self.norm = FrameNorm(width, groups, norm, affine=False)
        self.scale = nn.Linear(style_width, width)
        self.shift = nn.Linear(style_width, width)
        nn.init.ones_(self.scale.bias)
        nn.init.zeros_(self.shift.bias)

    def forward(self, x_BCTHW: Tensor, style_BET11: Tensor) -> Tensor:
        """`style` (B, 2 * style_width, T, 1, 1) is `frame_style` of the latent, at the rate of x."""
        mean_BTD, deviation_BTD = style_BET11.flatten(2).movedim(1, -1).chunk(2, dim=-1)
        scale_BCT11, shift_BCT11 = (
            line(given).movedim(-1, 1)[..., None, None] for line, given in ((self.scale, deviation_BTD), (self.shift, mean_BTD))
        )
        return torch.addcmul(shift_BCT11.to(x_BCTHW.dtype), self.norm(x_BCTHW), scale_BCT11.to(x_BCTHW.dtype))


def frame_style(x_BCTHW: Tensor) -> Tensor:
    """Each frame's means over positions, then its deviations, (B, 2 * C, T, 1, 1)."""
    precise = x_BCTHW.to(torch.promote_types(x_BCTHW.dtype, torch.float32))
    deviation_BCT11 = (precise.var((3, 4), correction=0, keepdim=True) + EPSILON).sqrt()
    return torch.cat([precise.mean((3, 4), keepdim=True), deviation_BCT11], dim=1).to(x_BCTHW.dtype)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); starts as the identity."""

    def __init__(self, width: int, groups: int, norm: NormKind = "rms") -> None:
        super().__init__()
        self.norm1 = FrameNorm(width, groups, norm)
        self.conv1 = CausalConv3d(width, width)
        self.norm2 = FrameNorm(width, groups, norm)
        self.conv2 = CausalConv3d(width, width)
        zero_(self.conv2)

    def forward(self, x_BCTHW: Tensor, memory: Memory | None = None) -> Tensor:
        y_BCTHW = self.conv1(F.silu(self.norm1(x_BCTHW)), memory)
        y_BCTHW = self.conv2(F.silu(self.norm2(y_BCTHW)), memory)
        return torch.add(x_BCTHW, y_BCTHW)


class ResBlocks(nn.Sequential):
    """`count` residual blocks of one width."""

    def __init__(self, count: int, width: int, groups: int, norm: NormKind = "rms") -> None:
        super().__init__(*(ResBlock(width, groups, norm) for _ in range(count)))

    def forward(self, x_BCTHW: Tensor, memory: Memory | None = None) -> Tensor:
        for block in self:
            x_BCTHW = block(x_BCTHW, memory)
        return x_BCTHW


class Upsample(nn.Module):
    """Convolution to `time * space**2` times the width, then depth to space; surplus frames are dropped right here.

    A first frame has no past to share a step with: of its `time` frames only the last stays, so T frames become 1 + time * (T - 1).
    """

    def __init__(self, width_in: int, width_out: int, *, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.conv = CausalConv3d(width_in, width_out * time * space**2)

    def begins(self, memory: Memory | None) -> bool:
        """Whether the next frame is the first of its video."""
        return not (memory and self.conv in memory)

    def forward(self, x_BCTHW: Tensor, memory: Memory | None = None) -> Tensor:
        surplus = self.time - 1 if self.begins(memory) else 0
        y_BCTHW = depth_to_space(self.conv(x_BCTHW, memory), time=self.time, space=self.space)
        return y_BCTHW[:, :, surplus:]


def zero_(conv: nn.Conv3d) -> None:
    """A convolution that yields zeros, and still learns."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


@torch.no_grad()
def pick_latest_(conv: nn.Conv3d) -> None:
    """A convolution that passes on its latest, central input; with a stride, those that it steps on."""
    zero_(conv)
    conv.weight[:, :, -1, 1, 1] = torch.eye(conv.in_channels, device="cpu")


def depth_to_space(x_BCTHW: Tensor, *, time: int, space: int) -> Tensor:
    """(B, time*space*space*C, T, H, W) to (B, C, time*T, space*H, space*W), channels last in memory."""
    B, _, T, H, W = x_BCTHW.shape
    split = x_BCTHW.reshape(B, time, space, space, -1, T, H, W)
    return split.permute(0, 5, 1, 6, 2, 7, 3, 4).reshape(B, T * time, H * space, W * space, -1).movedim(-1, 1)


def space_to_depth(x_BCTHW: Tensor, *, space: int) -> Tensor:
    """(B, C, T, H, W) to (B, space*space*C, T, H/space, W/space): the inverse of `depth_to_space(time=1)`."""
    B, C, T, H, W = x_BCTHW.shape
    split = x_BCTHW.reshape(B, C, T, H // space, space, W // space, space)
    return split.permute(0, 2, 3, 5, 4, 6, 1).reshape(B, T, H // space, W // space, -1).movedim(-1, 1)


def pad_frames(video_BCTHW: Tensor, step: int) -> Tensor:
    """The video with its last frame repeated up to the next length 1 + k * step."""
    missing = -(video_BCTHW.shape[2] - 1) % step
    if not missing:
        return video_BCTHW
    return torch.cat([video_BCTHW, video_BCTHW[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


def repeat_frames(x_BCTHW: Tensor, *, first: bool = True) -> Tensor:
    """1 + k steps to 1 + 2k: the first stays, each later one stands twice (the two finer steps it covers); k to 2k where not `first`."""
    return x_BCTHW.repeat_interleave(2, dim=2)[:, :, 1 if first else 0 :]
