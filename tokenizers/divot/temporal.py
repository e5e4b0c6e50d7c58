"""`TemporalEncoder`: what moves at each place, from the frozen features of a few frames (arXiv 2412.04432, A.1).

One sequence for each patch position, over the frames; not causal, no residual around the whole.

Legend: S sequences, T frames, D width.
"""

import torch
from torch import Tensor, nn

from kinetok.tokenizers.divot.block import EPS, Block, quick_gelu


class TemporalEncoder(nn.Module):
    """(S, T, `features`) -> (S, T, `out`) through blocks of `width`.

    Starts with every block as the identity and without positions, as the published one does. The published one also starts its last
    projection at zero, which hides the video from all that comes behind until that has changed; ours starts as any linear layer.
    """

    def __init__(self, frames: int, features: int, width: int, depth: int, heads: int, out: int) -> None:
        super().__init__()
        self.from_features = nn.Linear(features, width)
        self.position_TD = nn.Parameter(torch.zeros(frames, width))
        self.blocks = nn.Sequential(*(Block(width, heads, quick_gelu) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.to_out = nn.Linear(width, out)
        self._start()

    def forward(self, features_STD: Tensor) -> Tensor:
        x_STD = self.from_features(features_STD) + self.position_TD
        out_STD: Tensor = self.to_out(self.norm(self.blocks(x_STD)))
        return out_STD

    def _start(self) -> None:
        nn.init.eye_(self.from_features.weight)
        nn.init.zeros_(self.from_features.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            for last in (block.to_out, block.narrow):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
