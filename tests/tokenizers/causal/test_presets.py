"""Full size, without its memory: shapes and parameter counts on the meta device."""

import pytest
import torch
from torch import nn

from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownTokenizer
from kinetok.tokenizers.causal.presets import FULL_4X, FULL_GROWN, SMALL_4X, SMALL_GROWN


def millions(model: nn.Module) -> float:
    return sum(weight.numel() for weight in model.parameters()) / 1e6


def test_full_size_ladder_has_its_geometry_and_size() -> None:
    with torch.device("meta"):
        base = CausalTokenizer(FULL_4X)
        grown = GrownTokenizer(FULL_GROWN, base)
        top = GrownTokenizer(FULL_GROWN, grown)
        video = torch.empty(1, 3, 17, 256, 256)
        shapes = [tuple(model.encode(video).values.shape) for model in (base, grown, top)]
        assert top.decode(top.encode(video)).shape == video.shape
    assert shapes == [(1, 16, 5, 32, 32), (1, 16, 3, 32, 32), (1, 16, 2, 32, 32)]
    assert millions(base) == pytest.approx(229.3, abs=0.1)
    assert millions(grown) == millions(top) == pytest.approx(78.5, abs=0.1)


def test_small_ladder_has_the_full_ones_compression() -> None:
    base = CausalTokenizer(SMALL_4X)
    grown = GrownTokenizer(SMALL_GROWN, base)
    assert (base.temporal, base.spatial, base.config.z) == (FULL_4X.temporal, FULL_4X.spatial, FULL_4X.z)
    assert (grown.temporal, grown.spatial) == (8, 8)
    assert millions(base) < 2
