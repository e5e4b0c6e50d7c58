"""The frozen vision transformer, and resizing at sizes that the golden file does not have."""

from pathlib import Path

import pytest
import torch

from kinetok.tokenizers.divot.vit import CLIP_MEAN, CLIP_STD, FrozenViT, VitConfig, preprocess

TINY = VitConfig(edge=16, patch=8, width=16, depth=1, heads=2)


def test_features_are_those_of_the_last_block_without_the_class_token() -> None:
    vit = FrozenViT.load(TINY)
    frames = torch.rand(3, 3, 16, 16) * 2 - 1
    features = vit(frames)
    assert features.shape == (3, TINY.patches, 16) and not features.requires_grad
    states = vit.model(pixel_values=preprocess(frames, 16), output_hidden_states=True).hidden_states
    torch.testing.assert_close(features, states[-1][:, 1:])


def test_an_untrained_one_is_the_same_every_time_and_stays_as_it_is() -> None:
    vit = FrozenViT.load(TINY)
    state = torch.get_rng_state()
    assert FrozenViT.load(TINY).digest() == vit.digest()
    assert torch.equal(torch.get_rng_state(), state)
    assert not vit.train().model.training and not any(weight.requires_grad for weight in vit.parameters())


def test_saved_ones_are_checked_against_the_numbers(tmp_path: Path) -> None:
    vit = FrozenViT.load(TINY)
    vit.save_pretrained(tmp_path)
    found = TINY.model_copy(update={"path": str(tmp_path)})
    assert FrozenViT.load(found).digest() == vit.digest()
    with pytest.raises(ValueError, match="image_size 16, not 24"):
        FrozenViT.load(found.model_copy(update={"edge": 24}))


def test_resizing_keeps_corners_and_constants() -> None:
    """Corners are aligned, so that they are kept wherever no blur comes before: going up."""
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    small = torch.rand(2, 3, 10, 10) * 2 - 1
    pixels = preprocess(small, 28) * std + mean
    torch.testing.assert_close(pixels[..., ::27, ::27], (small[..., ::9, ::9] + 1) / 2)
    grey = torch.full((1, 3, 100, 60), 0.5)
    torch.testing.assert_close(preprocess(grey, 16) * std + mean, torch.full((1, 3, 16, 16), 0.75))


def test_shrinking_blurs_first() -> None:
    stripes = torch.ones(1, 3, 128, 128)
    stripes[..., ::2] = -1
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    inner = (preprocess(stripes, 16) * std + mean)[..., 2:-2]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), atol=1e-2, rtol=0)
