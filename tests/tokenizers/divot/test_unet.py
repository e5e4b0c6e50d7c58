"""The U-Net where golden files do not look: its start, its context, what it refuses."""

import pytest
import torch
from pydantic import ValidationError
from tests.tokenizers.divot.tiny import UNET

from kinetok.tokenizers.divot.unet import UNetConfig, VideoUNet, split_context


def shaken(config: UNetConfig) -> VideoUNet:
    torch.manual_seed(0)
    model = VideoUNet(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return model


def test_it_starts_as_zero() -> None:
    x = torch.randn(1, 4, 3, 4, 4)
    assert not VideoUNet(UNET)(x, torch.tensor([5]), torch.randn(1, 4, 16)).any()


@torch.no_grad()
def test_without_a_split_the_context_is_a_set() -> None:
    x, t, context = torch.randn(2, 4, 3, 4, 4), torch.tensor([5, 900]), torch.randn(2, 9, 16)
    whole = shaken(UNET)
    torch.testing.assert_close(whole(x, t, context.flip(1)), whole(x, t, context))
    parted = shaken(UNET.model_copy(update={"split": 4}))
    assert not torch.allclose(parted(x, t, context.flip(1)), parted(x, t, context), atol=1e-3)
    inside = torch.cat([context[:, :4].flip(1), context[:, 4:].flip(1)], dim=1)
    torch.testing.assert_close(parted(x, t, inside), parted(x, t, context))


@torch.no_grad()
def test_step_stride_and_other_frames_matter_and_other_clips_do_not() -> None:
    x, t, context = torch.randn(2, 4, 3, 4, 4), torch.tensor([5, 900]), torch.randn(2, 9, 16)
    model = shaken(UNET)
    v = model(x, t, context)
    torch.testing.assert_close(model(x[1:], t[1:], context[1:]), v[1:])
    torch.testing.assert_close(model(x, t, context, torch.tensor([3, 3])), v)
    assert not torch.allclose(model(x, t, context, torch.tensor([6, 6])), v, atol=1e-4)
    assert not torch.allclose(model(x, t + 50, context), v, atol=1e-4)
    changed = x.clone()
    changed[:, :, 2] = 0
    assert not torch.allclose(model(changed, t, context)[:, :, 0], v[:, :, 0], atol=1e-4)


def test_context_parts() -> None:
    context = torch.arange(2 * 109).view(2, 109, 1)
    assert split_context(context, None, 2) == (context, None)
    assert split_context(context[:, :64], 77, 2)[1] is None
    first, second = split_context(context, 77, 3)
    assert second is not None and first.shape == (2, 77, 1) and second.shape == (2, 32, 1)
    _, each = split_context(context, 77, 2)
    assert each is not None and each.shape == (4, 16, 1) and each[1, 0] == 77 + 16


def test_what_cannot_be_built_or_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 2, got 3 x 4: take clips of 4 x 4 latent cells"):
        VideoUNet(UNET)(torch.zeros(1, 4, 3, 3, 4), torch.zeros(1, dtype=torch.long), torch.zeros(1, 4, 16))
    for wrong, message in (({"mult": (2, 4)}, "finest level"), ({"groups": 5}, "no multiple"), ({"attention": (2,)}, "levels are 0 to 1")):
        with pytest.raises(ValidationError, match=message):
            UNetConfig.model_validate(UNET.model_dump() | wrong)
