"""Layers of the 3D U-Net: residual block with temporal convolution, spatial and temporal transformer, resizing.

All take the frames of all clips as one batch, `x_FDhw`, and the `Given` of the call, so that a stage of the U-Net is a list of them. A
layer that acts between frames folds them out again. Normalisation constants differ: 1e-5 in residual blocks and layer norms, 1e-6 in
the group norms of transformers. The blocks' last projections start at zero. Source: DynamiCrafter (arXiv 2310.12190), whose U-Net
Divot's de-tokenizer is.

Legend: B clips, T frames, F = B * T, D channels, h w latent positions, L context tokens, C context width, N queries, E width of the
time embedding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.tokenizers.divot.attention import attend

TRANSFORMER_EPS = 1e-6
MLP_RATIO = 4


@dataclass(frozen=True)
class Given:
    """What every layer of one call is told."""

    frames: int
    """T."""
    time_FE: Tensor
    """Embedding of the step and of the frame stride."""
    context_BLC: Tensor
    """Context tokens of the first keys and values; its batch is B."""
    second_GLC: Tensor | None
    """Context tokens of the second keys and values, where the context is split; its batch is B, or F where each frame has its own."""


class ResBlock(nn.Module):
    """Two convolutions of each frame with the time added between them, then a temporal convolution of the clip."""

    def __init__(self, channels: int, out: int, time_width: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, channels)
        self.conv_in = nn.Conv2d(channels, out, 3, padding=1)
        self.from_time = nn.Linear(time_width, out)
        self.norm_out = nn.GroupNorm(groups, out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.temporal = TemporalConvs(out, groups, dropout)

    def forward(self, x_FDhw: Tensor, given: Given) -> Tensor:
        out_FDhw: Tensor = self.temporal(self.spatial(x_FDhw, given.time_FE), given.frames)
        return out_FDhw

    def spatial(self, x_FDhw: Tensor, time_FE: Tensor) -> Tensor:
        """The part that acts on each frame alone."""
        h_FDhw = self.conv_in(F.silu(self.norm_in(x_FDhw))) + self.from_time(F.silu(time_FE))[:, :, None, None]
        h_FDhw = self.conv_out(self.dropout(F.silu(self.norm_out(h_FDhw))))
        return torch.add(self.skip(x_FDhw), h_FDhw)


class TemporalConvs(nn.Module):
    """Four convolutions along time, residual around all of them; norms see the whole clip."""

    def __init__(self, channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        zero(self.convs[-1])

    def forward(self, x_FDhw: Tensor, frames: int) -> Tensor:
        # Positions are one axis: two-dimensional convolutions have faster kernels than three-dimensional ones.
        clip_BDTN = torch.unflatten(x_FDhw, 0, (-1, frames)).transpose(1, 2).flatten(3)
        h_BDTN = clip_BDTN
        for place, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            h_BDTN = F.silu(norm(h_BDTN))
            h_BDTN = conv(self.dropout(h_BDTN) if place else h_BDTN)
        return torch.add(clip_BDTN, h_BDTN).transpose(1, 2).reshape(x_FDhw.shape)


class Attention(nn.Module):
    """Attention to the tokens themselves, or to a context of `context` numbers a token."""

    def __init__(self, width: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, width, bias=False)
        self.to_v = nn.Linear(context or width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        out_BND: Tensor = self.to_out(attend(self.to_q(x_BND), self.to_k(x_BND), self.to_v(x_BND), self.heads))
        return out_BND


class ContextAttention(Attention):
    """Attention of every position to the context of its clip, in two parts with softmaxes of their own where the context is split.

    out = attend(first part) + (tanh(alpha) + 1) * attend(second part)
    """

    def __init__(self, width: int, heads: int, context: int, *, split: bool) -> None:
        super().__init__(width, heads, context)
        self.to_k_second = nn.Linear(context, width, bias=False) if split else None
        self.to_v_second = nn.Linear(context, width, bias=False) if split else None
        # Not a scalar: DeepSpeed sends parameters as bytes, and a tensor without dimensions cannot be seen so.
        self.alpha = nn.Parameter(torch.zeros(1)) if split else None

    def read(self, x_FND: Tensor, given: Given) -> Tensor:
        """(F, N, D), frames of all clips."""
        q_FND = self.to_q(x_FND)
        out_FND = self._shared(q_FND, self.to_k(given.context_BLC), self.to_v(given.context_BLC))
        if given.second_GLC is not None and self.to_k_second is not None and self.to_v_second is not None and self.alpha is not None:
            second_FND = self._shared(q_FND, self.to_k_second(given.second_GLC), self.to_v_second(given.second_GLC))
            out_FND = out_FND + (self.alpha.tanh() + 1) * second_FND
        projected_FND: Tensor = self.to_out(out_FND)
        return projected_FND

    def _shared(self, q_FND: Tensor, k_GLD: Tensor, v_GLD: Tensor) -> Tensor:
        """Frames with one context are one long sequence of queries: keys and values are made once a clip."""
        return attend(q_FND.reshape(len(k_GLD), -1, q_FND.shape[-1]), k_GLD, v_GLD, self.heads).view_as(q_FND)


class GatedMlp(nn.Module):
    """GEGLU (arXiv 2002.05202): half of a projection, times the GELU of its other half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen = nn.Linear(width, 2 * MLP_RATIO * width)
        self.narrow = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        value_BND, gate_BND = self.widen(x_BND).chunk(2, dim=-1)
        out_BND: Tensor = self.narrow(value_BND * F.gelu(gate_BND))
        return out_BND


class SpatialTransformer(nn.Module):
    """Attention among the positions of a frame, then of each position to the context, then an MLP; residual around it; `width` inside."""

    def __init__(self, channels: int, heads: int, groups: int, context: int, width: int | None = None, *, split: bool) -> None:
        super().__init__()
        width = width or channels
        self.norm = nn.GroupNorm(groups, channels, eps=TRANSFORMER_EPS)
        self.to_in = nn.Linear(channels, width)
        self.norm_self, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_context, self.context = nn.LayerNorm(width), ContextAttention(width, heads, context, split=split)
        self.norm_mlp, self.mlp = nn.LayerNorm(width), GatedMlp(width)
        self.to_out = zero(nn.Linear(width, channels))

    def forward(self, x_FDhw: Tensor, given: Given) -> Tensor:
        h_FND = self.to_in(self.norm(x_FDhw).flatten(2).transpose(1, 2))
        h_FND = h_FND + self.attention(self.norm_self(h_FND))
        h_FND = h_FND + self.context.read(self.norm_context(h_FND), given)
        h_FND = h_FND + self.mlp(self.norm_mlp(h_FND))
        return torch.add(x_FDhw, self.to_out(h_FND).transpose(1, 2).reshape(x_FDhw.shape))


class TemporalTransformer(nn.Module):
    """Attention among the frames at each position, twice, then an MLP; residual around all of it; `width` inside."""

    def __init__(self, channels: int, heads: int, groups: int, width: int | None = None) -> None:
        super().__init__()
        width = width or channels
        self.norm = nn.GroupNorm(groups, channels, eps=TRANSFORMER_EPS)
        self.to_in = nn.Linear(channels, width)
        self.norm_first, self.first = nn.LayerNorm(width), Attention(width, heads)
        self.norm_second, self.second = nn.LayerNorm(width), Attention(width, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(width), GatedMlp(width)
        self.to_out = zero(nn.Linear(width, channels))

    def forward(self, x_FDhw: Tensor, given: Given) -> Tensor:
        clip_BDThw = torch.unflatten(x_FDhw, 0, (-1, given.frames)).transpose(1, 2)
        normal_BDThw = self.norm(clip_BDThw.contiguous())
        h_STD = self.to_in(normal_BDThw.permute(0, 3, 4, 2, 1).flatten(0, 2))
        h_STD = h_STD + self.first(self.norm_first(h_STD))
        h_STD = h_STD + self.second(self.norm_second(h_STD))
        h_STD = self.to_out(h_STD + self.mlp(self.norm_mlp(h_STD)))
        clips, _, _, rows, columns = clip_BDThw.shape
        return x_FDhw + torch.unflatten(h_STD, 0, (clips, rows, columns)).permute(0, 3, 4, 1, 2).flatten(0, 1)


class Downsample(nn.Module):
    """Halves rows and columns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_FDhw: Tensor, given: Given) -> Tensor:
        out_FDhw: Tensor = self.conv(x_FDhw)
        return out_FDhw


class Upsample(nn.Module):
    """Doubles rows and columns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_FDhw: Tensor, given: Given) -> Tensor:
        out_FDhw: Tensor = self.conv(F.interpolate(x_FDhw, scale_factor=2.0, mode="nearest"))
        return out_FDhw


def zero(module: nn.Module) -> nn.Module:
    """`module`, its parameters set to zero."""
    for weight in module.parameters():
        nn.init.zeros_(weight)
    return module
