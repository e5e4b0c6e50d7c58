"""A Divot of a few thousand weights, on the tiniest base rung: 5 frames of 16 x 16 pixels, 4 tokens of 8 numbers."""

import pytest
import torch
from tests.tokenizers.divot.tiny import tiny_divot

from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.divot.tokenizer import DivotConfig, DivotTokenizer


@pytest.fixture
def config() -> DivotConfig:
    return tiny_divot()


@pytest.fixture
def rung() -> CausalTokenizer:
    torch.manual_seed(0)
    return CausalTokenizer(CausalConfig(channels=8, mult=(1, 2), strides=((2, 2),), blocks=1, z=4, patch=2, groups=4)).eval()


@pytest.fixture
def model(config: DivotConfig, rung: CausalTokenizer) -> DivotTokenizer:
    torch.manual_seed(1)
    return DivotTokenizer.build(config, rung).eval()


@pytest.fixture
def video() -> torch.Tensor:
    """Noise in [-1, 1], (2, 3, 5, 16, 16)."""
    return torch.rand((2, 3, 5, 16, 16), generator=torch.Generator().manual_seed(2)) * 2 - 1
