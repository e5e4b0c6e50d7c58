"""A Divot of a few thousand weights, on the tiniest base rung: 5 frames of 16 x 16 pixels, 4 tokens of 8 numbers."""

import pytest
import torch

from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.divot.ddim import SamplerConfig
from kinetok.tokenizers.divot.detokenizer import DetokenizerConfig
from kinetok.tokenizers.divot.encoder import EncoderConfig
from kinetok.tokenizers.divot.perceiver import PerceiverConfig
from kinetok.tokenizers.divot.tokenizer import DivotConfig, DivotTokenizer
from kinetok.tokenizers.divot.unet import UNetConfig
from kinetok.tokenizers.divot.vit import VitConfig

PERCEIVER = PerceiverConfig(queries=4, depth=1, heads=2, head_width=8)
UNET = UNetConfig(channels=16, mult=(1, 2), blocks=1, attention=(1,), head_width=8, groups=4, context=16, split=None, dropout=0.0)


@pytest.fixture
def config() -> DivotConfig:
    return DivotConfig(
        frames=5,
        edge=16,
        vit=VitConfig(edge=16, patch=4, width=16, depth=1, heads=2),
        encoder=EncoderConfig(
            frames=3,
            temporal_width=16,
            temporal_depth=1,
            temporal_heads=2,
            pool=2,
            width=16,
            depth=1,
            heads=2,
            perceiver=PERCEIVER,
            token_width=8,
        ),
        detokenizer=DetokenizerConfig(perceiver=PERCEIVER, unet=UNET),
        sampler=SamplerConfig(steps=2, spacing="trailing", guidance=2.0),
    )


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
