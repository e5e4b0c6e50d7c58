"""The flow against the one data distribution whose velocity is known: a Gaussian."""

import pytest
import torch
from tests.llm.conftest import Inputs
from torch import Tensor

from kinetok.llm.dit import VideoDiT
from kinetok.llm.flow import draw, euler_sample, flow_loss, guided, logit_normal

MEAN, STD = 1.5, 0.5
SHAPE = (2, 2, 4, 4)
CPU = torch.device("cpu")


def gaussian(noisy_BZthw: Tensor, time_B: Tensor, text_BLE: Tensor, text_mask_BL: Tensor) -> Tensor:
    """E[noise - x | x_t] for x ~ N(MEAN, STD^2) and noise ~ N(0, 1)."""
    t = time_B[:, None, None, None, None]
    variance = ((1 - t) * STD) ** 2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (noisy_BZthw - (1 - t) * MEAN)


def text(samples: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(samples, 1, 1), torch.ones(samples, 1, dtype=torch.bool)


def test_sampling_from_the_known_velocity_gives_the_distribution() -> None:
    samples = euler_sample(gaussian, SHAPE, *text(64), steps=200, guidance=1.0, seeds=range(64))
    assert samples.shape == (64, *SHAPE)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert samples.std().item() == pytest.approx(STD, abs=0.02)


def test_more_steps_come_closer_to_the_exact_path() -> None:
    """The flow of a Gaussian takes noise n to MEAN + STD * n."""
    noise = euler_sample(lambda x, *_: torch.zeros_like(x), SHAPE, *text(4), steps=1, guidance=1.0, seeds=range(4))
    far, near = (
        (euler_sample(gaussian, SHAPE, *text(4), steps=steps, guidance=1.0, seeds=range(4)) - (MEAN + STD * noise)).abs().max()
        for steps in (10, 160)
    )
    assert near < far / 8, "Euler's error is of first order"


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_loss_at_the_optimum_is_what_cannot_be_known(time: float) -> None:
    """Var[noise - x | x_t] = STD^2 / Var[x_t]."""
    generator = torch.Generator().manual_seed(0)
    x, noise = MEAN + STD * torch.randn(256, *SHAPE, generator=generator), torch.randn(256, *SHAPE, generator=generator)
    loss = flow_loss(gaussian, x, noise, torch.full((256,), time), *text(256))
    assert loss.shape == (256,)
    optimum = STD**2 / (((1 - time) * STD) ** 2 + time**2)
    assert loss.mean().item() == pytest.approx(optimum, rel=0.03)
    worse = flow_loss(lambda *given: gaussian(*given) + 0.3, x, noise, torch.full((256,), time), *text(256))
    assert worse.mean().item() == pytest.approx(optimum + 0.09, rel=0.03)


def test_a_sample_is_its_seeds_whatever_the_batch() -> None:
    alone = euler_sample(gaussian, SHAPE, *text(1), steps=4, guidance=1.0, seeds=[7])
    company = euler_sample(gaussian, SHAPE, *text(3), steps=4, guidance=1.0, seeds=[1, 7, 2])
    torch.testing.assert_close(company[1:2], alone)
    assert not torch.allclose(company[0], alone[0])
    with pytest.raises(ValueError, match="2 seeds for 1 texts"):
        euler_sample(gaussian, SHAPE, *text(1), steps=4, guidance=1.0, seeds=[7, 8])


def test_draws_are_their_seeds_whatever_the_batch() -> None:
    one, three = draw([9], SHAPE, CPU), draw([3, 9, 4], SHAPE, CPU)
    for name in ("normal_B", "uniform_B", "noise_BZthw"):
        assert torch.equal(getattr(one, name)[0], getattr(three, name)[1])


def test_guidance(model: VideoDiT, inputs: Inputs) -> None:
    nothing = torch.zeros_like(inputs.mask)
    with_text, without = model(*inputs.all), model(inputs.noisy, inputs.time, inputs.text, nothing)
    assert torch.equal(guided(model, *inputs.all, guidance=1.0), with_text)
    torch.testing.assert_close(guided(model, *inputs.all, guidance=0.0), without)
    torch.testing.assert_close(guided(model, *inputs.all, guidance=3.0), without + 3 * (with_text - without))


def test_times_are_logit_normal() -> None:
    time = logit_normal(torch.randn(20_000, generator=torch.Generator().manual_seed(0)), 0.5, 2.0)
    assert time.min() > 0 and time.max() < 1
    logit = torch.logit(time.double())
    assert (logit.mean().item(), logit.std().item()) == pytest.approx((0.5, 2.0), abs=0.05)
