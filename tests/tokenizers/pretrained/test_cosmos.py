"""Cosmos: a posterior without variance, and statistics of the first latent steps only."""

import pytest
import torch
from tests.tokenizers.pretrained.conftest import Adapt, MakeModel


def test_statistics_are_those_of_each_step(make_model: MakeModel, adapt: Adapt) -> None:
    adapter = adapt(make_model("cosmos-4", latents_mean=list(range(8)), latents_std=[2.0] * 8))
    expected = -torch.arange(8.0).view(1, 4, 2, 1, 1) / 2
    torch.testing.assert_close(adapter.normalise(torch.zeros(1, 4, 2, 1, 1)), expected)
    torch.testing.assert_close(adapter.normalise(torch.zeros(1, 4, 1, 1, 1)), expected[:, :, :1])


def test_more_steps_than_statistics_are_refused(make_model: MakeModel, adapt: Adapt) -> None:
    adapter = adapt(make_model("cosmos-4", latents_mean=[0.0] * 8, latents_std=[1.0] * 8))
    with pytest.raises(ValueError, match="statistics for its first 2 latent steps, not for 3"):
        adapter.normalise(torch.zeros(1, 4, 3, 1, 1))


def test_its_posterior_is_a_point(make_model: MakeModel, adapt: Adapt) -> None:
    posterior = adapt(make_model("cosmos-8")).heads.posterior(torch.randn(1, 8, 2, 2, 2))
    torch.testing.assert_close(posterior.sample(torch.ones_like(posterior.mean_BZthw)), posterior.mean_BZthw, rtol=0, atol=1e-6)
