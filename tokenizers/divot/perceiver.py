"""`Perceiver`: a fixed number of tokens that read a set of any size (arXiv 2204.14198, as arXiv 2412.04432 uses it twice).

The tokenizer ends in one (125 space-time tokens -> 64), the de-tokenizer begins with one (64 -> 125). The order of what is read does
not matter, and the tokens that come out stand for no place.

Legend: B clips, N tokens read, M latents, D width.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kinetok.tokenizers.base import Config, Count
from kinetok.tokenizers.divot.attention import attend

MLP_RATIO = 4


class PerceiverConfig(Config):
    """Numbers of a Perceiver; the widths around it follow from where it stands."""

    queries: Count
    """Tokens that come out."""
    depth: Annotated[int, Field(ge=1)] = 6
    heads: Count = 16
    head_width: Count = 64


class Reading(nn.Module):
    """Attention of the latents to what is read and to themselves."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_read = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, read_BND: Tensor, latents_BMD: Tensor) -> Tensor:
        read_BND, latents_BMD = self.norm_read(read_BND), self.norm_latents(latents_BMD)
        k_BND, v_BND = self.to_kv(torch.cat([read_BND, latents_BMD], dim=1)).chunk(2, dim=-1)
        out_BMD: Tensor = self.to_out(attend(self.to_q(latents_BMD), k_BND, v_BND, self.heads))
        return out_BMD


class PerceiverBlock(nn.Module):
    """Reading, then an MLP without biases; both residual."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.reading = Reading(width, heads, head_width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, MLP_RATIO * width, bias=False), nn.GELU(), nn.Linear(MLP_RATIO * width, width, bias=False)
        )

    def forward(self, read_BND: Tensor, latents_BMD: Tensor) -> Tensor:
        latents_BMD = latents_BMD + self.reading(read_BND, latents_BMD)
        return torch.add(latents_BMD, self.mlp(latents_BMD))


class Perceiver(nn.Module):
    """(B, N, `read`) -> (B, `config.queries`, `out`), layer-normalised at the end; `width` inside."""

    def __init__(self, config: PerceiverConfig, read: int, width: int, out: int) -> None:
        super().__init__()
        self.latents_1MD = nn.Parameter(torch.randn(1, config.queries, width) / width**0.5)
        self.from_read = nn.Linear(read, width)
        self.blocks = nn.ModuleList(PerceiverBlock(width, config.heads, config.head_width) for _ in range(config.depth))
        self.to_out = nn.Linear(width, out)
        self.norm = nn.LayerNorm(out)

    def forward(self, read_BND: Tensor) -> Tensor:
        read_BND = self.from_read(read_BND)
        latents_BMD: Tensor = self.latents_1MD.expand(len(read_BND), -1, -1)
        for block in self.blocks:
            latents_BMD = block(read_BND, latents_BMD)
        out_BMD: Tensor = self.norm(self.to_out(latents_BMD))
        return out_BMD
