"""`Block`: the pre-norm transformer block that the temporal and the space-time encoder share (arXiv 2412.04432, A.1).

Its layer norms have eps 1e-6; those of the networks around it do not all, which moves outputs where activations are small.

Legend: B sequences, N tokens, D width.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kinetok.tokenizers.divot.attention import attend

EPS = 1e-6
MLP_RATIO = 4

Activation: TypeAlias = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Self-attention of all tokens to all tokens, then an MLP; both residual."""

    def __init__(self, width: int, heads: int, activation: Activation) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.norm_attention = nn.LayerNorm(width, eps=EPS)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=EPS)
        self.widen = nn.Linear(width, MLP_RATIO * width)
        self.narrow = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        q_BND, k_BND, v_BND = self.to_qkv(self.norm_attention(x_BND)).chunk(3, dim=-1)
        x_BND = x_BND + self.to_out(attend(q_BND, k_BND, v_BND, self.heads))
        return torch.add(x_BND, self.narrow(self.activation(self.widen(self.norm_mlp(x_BND)))))
