"""`SpaceTimeEncoder`: all pooled patches of all frames together, and the tokens that are read from them (arXiv 2412.04432, A.1).

The tokens are a Perceiver's, which stand for no place, or the patches themselves, projected: the paper's comparison of resampled with
position-bound tokens.

Legend: B clips, T frames, P patches of a frame, N = T * P in the order of frames, rows, columns, D width, M tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.tokenizers.divot.block import Block
from kinetok.tokenizers.divot.perceiver import Perceiver, PerceiverConfig


class SpaceTimeEncoder(nn.Module):
    """(B, N, D) -> tokens (B, M, `out`), whose last layer norm is all the normalisation that tokens get."""

    def __init__(self, frames: int, patches: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.space_PD = nn.Parameter(torch.randn(patches, width) / width**0.5)
        self.time_TD = nn.Parameter(torch.randn(frames, width) / width**0.5)
        self.blocks = nn.Sequential(*(Block(width, heads, F.gelu) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, pooled_BND: Tensor) -> Tensor:
        """Features of every patch, normalised, (B, N, D)."""
        position_ND = (self.time_TD[:, None] + self.space_PD).flatten(0, 1)
        features_BND: Tensor = self.norm(self.blocks(pooled_BND + position_ND))
        return features_BND


class PositionTokens(nn.Module):
    """One token for each patch of each frame: a projection and a layer norm, (B, N, D) -> (B, N, `out`)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.to_out = nn.Linear(width, out)
        self.norm = nn.LayerNorm(out)

    def forward(self, features_BND: Tensor) -> Tensor:
        tokens_BND: Tensor = self.norm(self.to_out(features_BND))
        return tokens_BND


def token_head(config: PerceiverConfig | None, width: int, out: int) -> nn.Module:
    """What turns the features of all patches into tokens: a Perceiver, or without one a token for each patch."""
    return PositionTokens(width, out) if config is None else Perceiver(config, read=width, width=width, out=out)
