"""`TokenEncoder`: features of a frozen vision transformer to tokens, all that is trained of Divot's tokenizer (arXiv 2412.04432, 3.1).

    features of 5 frames -> temporal encoder -> 5x5 pooling -> space-time encoder -> Perceiver -> 64 tokens of 256 numbers

The paper tried a posterior of mean and variance in place of plain features and found that no language model learnt to predict its
samples, so tokens are deterministic. Features are standardised first (`standardise`), which the published tokenizer does without:
what clips differ by is small beside what all have in common, and a short training then never comes to use it.

Not covered: the vision transformer (`vit.py`), choosing frames (`frames.py`).

Legend: B clips, T frames, N patches of a frame, D width, h w patches along an edge, M tokens.
"""

from math import isqrt
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.tokenizers.base import Config, Count
from kinetok.tokenizers.divot.block import EPS
from kinetok.tokenizers.divot.perceiver import PerceiverConfig
from kinetok.tokenizers.divot.spacetime import SpaceTimeEncoder, token_head
from kinetok.tokenizers.divot.temporal import TemporalEncoder


class EncoderConfig(Config):
    """Numbers of the tokenizer behind the vision transformer; the defaults are the published ones."""

    frames: Count = 5
    """Frames of a window that the tokenizer sees."""
    temporal_width: Count = 768
    temporal_depth: Count = 6
    temporal_heads: Count = 12
    pool: Count = 5
    """Patches along an edge after pooling."""
    width: Count = 1024
    depth: Count = 4
    """Space-time blocks."""
    heads: Count = 8
    perceiver: PerceiverConfig | None = PerceiverConfig(queries=64)
    """None for one token for each pooled patch, bound to its place."""
    token_width: Count = 256
    # True is not dumped: it would give every model and training another key.
    standardise: Annotated[bool, Field(exclude_if=lambda value: value)] = True
    """Whether a new training standardises the features by those of its first clips; the published tokenizer reads them as they are."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, width, heads in (("heads", self.width, self.heads), ("temporal_heads", self.temporal_width, self.temporal_heads)):
            if width % heads:
                raise ValueError(f"{name}: {heads} do not divide the width {width}")
        return self

    @property
    def tokens(self) -> int:
        """Tokens of one window."""
        return self.frames * self.pool**2 if self.perceiver is None else self.perceiver.queries


class TokenEncoder(nn.Module):
    """(B, T, N, `features`) without class tokens -> tokens (B, M, D), each of mean 0 and variance 1 but for the learned scale."""

    worth_compiling: ClassVar[bool] = True

    mean_ND: Tensor
    std_D: Tensor

    def __init__(self, config: EncoderConfig, features: int, patches: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean_ND", torch.zeros(patches, features))
        self.register_buffer("std_D", torch.ones(features))
        width = config.width
        self.temporal = TemporalEncoder(
            config.frames, features, config.temporal_width, config.temporal_depth, config.temporal_heads, out=width
        )
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.space_time = SpaceTimeEncoder(config.frames, config.pool**2, width, config.depth, config.heads)
        self.head = token_head(config.perceiver, width, config.token_width)

    def forward(self, vit_BTND: Tensor) -> Tensor:
        """Tokens; ValueError unless the features are of `config.frames` frames of all patches."""
        tokens_BMD: Tensor = self.head(self.space_time(self.norm(self.pooled(vit_BTND))))
        return tokens_BMD

    def pooled(self, vit_BTND: Tensor) -> Tensor:
        """Temporal features averaged over the windows of a `pool` x `pool` grid, (B, T * pool^2, D)."""
        clips, frames, patches, _ = vit_BTND.shape
        edge = isqrt(patches)
        if frames != self.config.frames or patches != len(self.mean_ND):
            raise ValueError(
                f"expected features of {self.config.frames} frames of {len(self.mean_ND)} patches, got {frames} frames of {patches}; "
                "leave the class token out"
            )
        standard_BTND = (vit_BTND - self.mean_ND) / self.std_D
        moved_BNTD = torch.unflatten(self.temporal(standard_BTND.transpose(1, 2).flatten(0, 1)), 0, (clips, patches))
        grid_FDhw = torch.unflatten(moved_BNTD.permute(0, 2, 3, 1).flatten(0, 1), 2, (edge, edge))
        pooled_FDN = F.adaptive_avg_pool2d(grid_FDhw, self.config.pool).flatten(2)
        return torch.unflatten(pooled_FDN, 0, (clips, frames)).transpose(2, 3).flatten(1, 2)

    @torch.no_grad()
    def fit_statistics(self, vit_BTND: Tensor) -> Self:
        """Standardise features from now on, by the mean of each patch and the deviation of each channel among these clips' features.

        To be called once, before the joint training; a hundred clips of the training set will do.
        """
        centred_BTND = vit_BTND.float() - vit_BTND.float().mean((0, 1))
        std_D = centred_BTND.square().mean((0, 1, 2)).sqrt()
        self.mean_ND.copy_(vit_BTND.float().mean((0, 1)))
        self.std_D.copy_(torch.where(std_D > 0, std_D, 1.0))
        return self
