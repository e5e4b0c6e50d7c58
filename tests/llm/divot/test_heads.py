"""Heads: what they draw where the right prediction is known, and what they have in common."""

import pytest
import torch
from torch import Tensor, nn

from kinetok.llm.divot.heads import DiffusionConfig, DiffusionHead, GMMConfig, HeadConfig, MSEConfig, build_head

HEADS: list[HeadConfig] = [
    GMMConfig(components=3),
    MSEConfig(),
    DiffusionConfig(target="eps", width=16, depth=2, steps=4),
    DiffusionConfig(target="v", width=16, depth=2, steps=4),
]


@pytest.mark.parametrize("config", HEADS, ids=lambda config: getattr(config, "target", config.kind))
def test_loss_and_samples_belong_to_the_sample(config: HeadConfig) -> None:
    torch.manual_seed(0)
    head = build_head(config, 5)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.2)
    condition_BNP, token_BND = torch.randn(2, 3, head.inputs, requires_grad=True), torch.randn(2, 3, 5)
    loss_BN = head.loss(condition_BNP.bfloat16().float(), token_BND, [1, 2])
    assert loss_BN.shape == (2, 3) and loss_BN.dtype == torch.float32
    assert torch.autograd.grad(loss_BN.sum(), condition_BNP)[0].any()
    torch.testing.assert_close(head.loss(condition_BNP[1:], token_BND[1:], [2]), head.loss(condition_BNP, token_BND, [1, 2])[1:])
    drawn_BND = head.sample(condition_BNP, [1, 2], 1.0)
    assert drawn_BND.shape == (2, 3, 5) and drawn_BND.dtype == torch.float32
    torch.testing.assert_close(head.sample(condition_BNP[1:], [2], 1.0), drawn_BND[1:])
    if config.kind != "mse":
        assert not torch.allclose(head.sample(condition_BNP, [3, 2], 1.0)[0], drawn_BND[0])


class _Gaussian(nn.Module):
    """The best prediction for tokens that are N(mean, std^2) whatever they are conditioned on."""

    def __init__(self, target: str, mean: float, std: float) -> None:
        super().__init__()
        self.target, self.mean, self.std = target, mean, std

    def forward(self, x_BND: Tensor, time_BN: Tensor, condition_BNW: Tensor) -> Tensor:
        angle = 0.5 * torch.pi * time_BN[..., None]
        cos, sin = angle.cos(), angle.sin()
        variance = (cos * self.std) ** 2 + sin**2
        token_BND = self.mean + cos * self.std**2 / variance * (x_BND - cos * self.mean)
        eps_BND = sin / variance * (x_BND - cos * self.mean)
        return eps_BND if self.target == "eps" else cos * eps_BND - sin * token_BND


@pytest.mark.parametrize("target", ["eps", "v"])
def test_a_perfect_denoiser_samples_its_distribution(target: str) -> None:
    head = DiffusionHead(DiffusionConfig.model_validate({"target": target, "width": 4, "depth": 1, "steps": 50}), 1)
    head.net = _Gaussian(target, mean=2.0, std=0.5)  # type: ignore[assignment]
    drawn_BND = head.sample(torch.zeros(1, 20_000, 4), [0], 1.0)
    assert (drawn_BND.mean().item(), drawn_BND.std().item()) == pytest.approx((2.0, 0.5), abs=0.03)
    assert head.sample(torch.zeros(1, 20_000, 4), [0], 0.1).std() < 0.45


@pytest.mark.parametrize("target", ["eps", "v"])
def test_loss_is_least_for_the_right_prediction(target: str) -> None:
    head = DiffusionHead(DiffusionConfig.model_validate({"target": target, "width": 4, "depth": 1}), 1)
    token_BND, condition_BNW = 2 + 0.5 * torch.randn(1, 4000, 1), torch.zeros(1, 4000, 4)
    losses = {}
    for mean in (1.5, 2.0, 2.5):
        head.net = _Gaussian(target, mean=mean, std=0.5)  # type: ignore[assignment]
        losses[mean] = head.loss(condition_BNW, token_BND, [0]).mean().item()
    assert losses[2.0] == min(losses.values())


def test_mixture_loss_is_the_likelihood_per_number() -> None:
    head, token_BND = build_head(GMMConfig(components=1), 4), torch.randn(1, 2, 4)
    condition_BNP = torch.cat(
        [torch.zeros(1, 2, 4), torch.full((1, 2, 4), torch.log(torch.e * torch.ones(1) - 1).item()), torch.zeros(1, 2, 1)], -1
    )
    expected_BN = -torch.distributions.Normal(0.0, 1.0).log_prob(token_BND).mean(-1)
    torch.testing.assert_close(head.loss(condition_BNP, token_BND, [0]), expected_BN)
