"""Full size, without its memory: shapes and parameter counts on the meta device."""

import pytest
import torch
from torch import nn

from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownTokenizer
from kinetok.tokenizers.causal.presets import FULL_4X, FULL_GROWN, SMALL_4X, SMALL_GROWN, direct
from kinetok.tokenizers.causal.rung import Rung


def millions(model: nn.Module) -> float:
    return sum(weight.numel() for weight in model.parameters()) / 1e6


@pytest.fixture(scope="module")
def ladder() -> list[Rung]:
    """4x, 8x and 16x grown, 8x and 16x direct."""
    with torch.device("meta"):
        base = CausalTokenizer(FULL_4X)
        grown = GrownTokenizer(FULL_GROWN, base)
        top = GrownTokenizer(FULL_GROWN, grown)
        return [base, grown, top, *(CausalTokenizer(direct(FULL_4X, times)) for times in (2, 4))]


@pytest.mark.parametrize(("frames", "pixels"), [(17, 256), (17, 512), (340, 256), (340, 512)])
def test_full_size_ladder_has_its_geometry(ladder: list[Rung], frames: int, pixels: int) -> None:
    video = torch.empty(1, 3, frames, pixels, pixels, device="meta")
    for model, temporal in zip(ladder, (4, 8, 16, 8, 16), strict=True):
        tokens = model.encode(video)
        assert tokens.values.shape == (1, 16, 1 + -(-(frames - 1) // temporal), pixels // 8, pixels // 8)
        assert model.decode(tokens).shape == video.shape


def test_eight_latent_channels_change_the_heads_alone() -> None:
    with torch.device("meta"):
        base = CausalTokenizer(FULL_4X.model_copy(update={"z": 8}))
        top = GrownTokenizer(FULL_GROWN, GrownTokenizer(FULL_GROWN, base))
        video = torch.empty(1, 3, 17, 256, 256)
    assert [model.encode(video).values.shape[1:3] for model in (base, top)] == [(8, 5), (8, 2)]
    assert top.decode(top.encode(video)).shape == video.shape
    assert millions(base) == pytest.approx(229.3, abs=0.1) and millions(top) == pytest.approx(78.5, abs=0.1)


def test_adagn_adds_two_maps_to_each_level() -> None:
    with torch.device("meta"):
        base = CausalTokenizer(FULL_4X.model_copy(update={"start": "random", "adagn": True}))
    assert millions(base) == pytest.approx(230.5, abs=0.1)


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ({"norm": "std"}, {"mix": "dual", "cond": "spatial", "norm": "std"}),
        ({"norm": "group"}, {"mix": "concat", "ada": "scale", "norm": "group"}),
        ({"image_path": "frozen2d"}, {"unfreeze_decoder": "last"}),
        ({"image_path": "inflate", "start": "random", "adagn": True}, {"unfreeze_decoder": "all"}),
        ({}, {"key": False, "ada": "none"}),
    ],
    ids=str,
)
def test_every_reading_builds_at_full_size(below: dict[str, object], above: dict[str, object]) -> None:
    config = CausalConfig.model_validate(below)
    with torch.device("meta"):
        base = CausalTokenizer.build(config, CausalTokenizer(config.image) if config.grows else None)
        eight = GrownTokenizer(FULL_GROWN.model_copy(update=above), base)
        top = GrownTokenizer(FULL_GROWN.model_copy(update=above), eight)
        video = torch.empty(1, 3, 17, 256, 256)
    for model, temporal in ((base, 4), (eight, 8), (top, 16)):
        tokens = model.encode(video)
        assert tokens.values.shape[2:] == (1 + 16 // temporal, 32, 32) and model.decode(tokens).shape == video.shape


def test_full_size_ladder_has_its_size(ladder: list[Rung]) -> None:
    assert [millions(model) for model in ladder] == pytest.approx([229.3, 78.5, 78.5, 363.8, 498.3], abs=0.1)


def test_a_direct_model_is_the_base_with_more_temporal_strides() -> None:
    eight, sixteen = direct(SMALL_4X, 2), direct(SMALL_4X, 4)
    assert (eight.temporal, sixteen.temporal, eight.spatial, sixteen.z) == (8, 16, SMALL_4X.spatial, SMALL_4X.z)
    assert CausalTokenizer(sixteen).encode(torch.zeros(1, 3, 17, 16, 16)).values.shape == (1, 16, 2, 2, 2)
    with pytest.raises(ValueError, match="got 3"):
        direct(SMALL_4X, 3)


def test_small_ladder_has_the_full_ones_compression() -> None:
    base = CausalTokenizer(SMALL_4X)
    grown = GrownTokenizer(SMALL_GROWN, base)
    assert (base.temporal, base.spatial, base.config.z) == (FULL_4X.temporal, FULL_4X.spatial, FULL_4X.z)
    assert (grown.temporal, grown.spatial) == (8, 8)
    assert millions(base) < 2
