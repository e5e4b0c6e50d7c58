"""The three sizes are one model with other numbers."""

import pytest
import torch

from kinetok.tokenizers.divot import presets
from kinetok.tokenizers.divot.detokenizer import Detokenizer
from kinetok.tokenizers.divot.encoder import TokenEncoder
from kinetok.tokenizers.divot.tokenizer import DivotConfig


@pytest.mark.parametrize(
    ("config", "encoder", "perceiver", "unet"),
    [(presets.FULL, 171.6, 76.98, 1438.8), (presets.MIDDLE, 33.24, 13.05, 231.9), (presets.SMALL, 0.951, 0.0739, 2.167)],
)
def test_millions_of_parameters(config: DivotConfig, encoder: float, perceiver: float, unet: float) -> None:
    """Of the published size, those that were counted in the official modules."""
    with torch.device("meta"):
        tokens = TokenEncoder(config.encoder, config.vit.width, config.vit.patches)
        detokenizer = Detokenizer(config.detokenizer, config.encoder.token_width)
    counts = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (tokens, detokenizer.perceiver, detokenizer.unet)]
    assert counts == pytest.approx([encoder, perceiver, unet], rel=0.01)
    assert DivotConfig.model_validate_json(config.model_dump_json()) == config


def test_the_published_size_is_the_default() -> None:
    assert DivotConfig(vit=presets.VIT_H) == presets.FULL
