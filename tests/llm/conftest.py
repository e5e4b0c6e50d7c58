"""A small transformer whose every part has an effect, and what goes into it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kinetok.llm.dit import DiTConfig, VideoDiT
from kinetok.tokenizers.base import Batch

CONFIG = DiTConfig(z=4, width=32, depth=2, heads=2, text_width=6, chunk=2)


def shake(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter numbers: zeros at the start would hide what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


@dataclass(frozen=True)
class Inputs:
    """What `VideoDiT.forward` takes, for three samples."""

    noisy: Tensor
    time: Tensor
    text: Tensor
    mask: Tensor

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.noisy, self.time, self.text, self.mask


@pytest.fixture
def model() -> VideoDiT:
    torch.manual_seed(0)
    made = VideoDiT(CONFIG)
    shake(made)
    return made.eval()


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(3, 4, 4, 2, 4, generator=generator), torch.randn(3, 5, 6, generator=generator)
    return Inputs(noisy, torch.tensor([0.1, 0.5, 0.9]), text, torch.arange(5) < torch.tensor([[2], [5], [0]]))


@pytest.fixture
def batch(inputs: Inputs) -> Batch:
    return {"latent_BZthw": inputs.noisy, "text_BLE": inputs.text, "text_mask_BL": inputs.mask, "seed_B": torch.tensor([5, 6, 7])}
