"""`Shower`: tokens to pixels through whatever tokenizer they are of, for stages and commands that show videos.

A diffusion decoder draws noise, from the seeds given and by the sampler given; any other ignores both. Not covered: files.

Legend: B videos, C T H W colours, frames, rows, columns, N tokens, D width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kinetok.infra.compiling import compile_parts
from kinetok.infra.stage import Resources
from kinetok.pipelines.data.token_shards import DTYPES
from kinetok.tokenizers.base import DecodeRecipe, Tokenizer, Tokens, TokenSpec, standing
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

if TYPE_CHECKING:
    from kinetok.tokenizers.divot.ddim import SamplerConfig


class Shower:
    """A tokenizer's decoder on its device."""

    def __init__(self, tokenizer: Tokenizer, spec: TokenSpec, resources: Resources, sampler: "SamplerConfig | None" = None) -> None:
        assert spec.recipe is not None, "`encode` stamps it"
        self.recipe: DecodeRecipe = spec.recipe
        self.device = torch.device("cuda" if resources.gpus else "cpu")
        self.tokenizer, self.sampler = tokenizer.to(self.device), sampler
        if resources.compile:
            compile_parts(standing(self.tokenizer))
        arithmetic = DTYPES[resources.dtype]
        self.precision = torch.autocast(self.device.type, arithmetic, enabled=arithmetic is not torch.float32)

    @torch.no_grad()
    def __call__(self, tokens: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
        """Videos (B, 3, T, H, W) in [-1, 1] on the CPU, of tokens as shards hold them."""
        made = Tokens(torch.stack([values.float() for values in tokens]).to(self.device), frames=self.recipe.frames)
        with self.precision:
            if isinstance(self.tokenizer, DivotTokenizer):
                return self.tokenizer.decode(made, seeds, self.sampler).float().cpu()
            return self.tokenizer.decode(made).float().cpu()

    @property
    def steps(self) -> int:
        """Sampling steps; 0 where nothing is sampled."""
        return self._sampler.steps if self._sampler else 0

    @property
    def guidance(self) -> float:
        """Strength of guidance; 1 is none."""
        return self._sampler.guidance if self._sampler else 1.0

    @property
    def _sampler(self) -> "SamplerConfig | None":
        if not isinstance(self.tokenizer, DivotTokenizer):
            return None
        return self.sampler or self.tokenizer.config.sampler
