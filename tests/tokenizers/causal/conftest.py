"""A tiny base rung (4x8x8) and two rungs grown upon it, in float64 so that identities can be asked for to the last digits."""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import pytest
import torch
from torch import Tensor, nn

from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer

MakeVideo: TypeAlias = Callable[..., Tensor]
Model = TypeVar("Model", bound=nn.Module)


@pytest.fixture
def make_video() -> MakeVideo:
    """Noise in [-1, 1], (clips, 3, frames, 16, 16), float64."""

    def video(frames: int, clips: int = 1) -> Tensor:
        return torch.rand((clips, 3, frames, 16, 16), generator=torch.Generator().manual_seed(0)).double() * 2 - 1

    return video


@pytest.fixture
def base() -> CausalTokenizer:
    torch.manual_seed(0)
    config = CausalConfig(channels=8, mult=(1, 2, 2), strides=((2, 2), (2, 2)), blocks=1, z=4, patch=2, groups=4)
    return CausalTokenizer(config).double().eval()


@pytest.fixture
def adaptive(base: CausalTokenizer) -> CausalTokenizer:
    """A base rung whose decoder has AdaGN."""
    torch.manual_seed(0)
    return CausalTokenizer(base.config.model_copy(update={"start": "random", "adagn": True})).double().eval()


@pytest.fixture
def grown(base: CausalTokenizer) -> GrownTokenizer:
    """8x, untrained: at its step 0."""
    torch.manual_seed(1)
    return GrownTokenizer(GrownConfig(blocks=1, groups=4), base).double().eval()


@pytest.fixture
def shaken(grown: GrownTokenizer) -> GrownTokenizer:
    """8x, as if trained: no weight of its own is zero or an identity any more."""
    return shake(grown)


@pytest.fixture
def twice_grown(shaken: GrownTokenizer) -> GrownTokenizer:
    """16x, untrained, on a trained 8x."""
    torch.manual_seed(2)
    return GrownTokenizer(GrownConfig(blocks=1, groups=4), shaken).double().eval()


@torch.no_grad()
def shake(model: Model) -> Model:
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator).to(weight))
    return model
