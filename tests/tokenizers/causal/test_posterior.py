"""The posterior against torch.distributions, and noise that belongs to a sample."""

import torch
from torch.distributions import Normal, kl_divergence

from kinetok.tokenizers.causal.posterior import LatentHeads, Posterior, seeded_noise

CPU = torch.device("cpu")


def test_kl_equals_that_of_torch_distributions() -> None:
    posterior = Posterior(torch.randn(3, 4, 2, 5, 5), torch.randn(3, 4, 2, 5, 5))
    normal = Normal(posterior.mean_BZthw, (0.5 * posterior.log_variance_BZthw).exp())
    expected = kl_divergence(normal, Normal(torch.zeros(1), torch.ones(1))).flatten(1).mean(1)
    torch.testing.assert_close(posterior.kl(), expected)


def test_sampling_moves_by_the_standard_deviation() -> None:
    posterior = Posterior(torch.full((1, 1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1, 1), 4.0).log())
    assert posterior.sample(torch.full((1, 1, 1, 1, 1), -1.0)).item() == 0.0


def test_posterior_is_float32_and_finite_whatever_the_head_says() -> None:
    heads = LatentHeads(4, 2).bfloat16()
    posterior = heads.posterior(torch.full((1, 4, 1, 2, 2), 1e4, dtype=torch.bfloat16))
    assert posterior.mean_BZthw.dtype == torch.float32
    assert torch.isfinite(posterior.sample(torch.ones(1, 2, 1, 2, 2))).all()
    assert torch.isfinite(posterior.kl()).all()


def test_noise_depends_on_the_samples_seed_alone() -> None:
    together = seeded_noise([5, 6, 7], (2, 3), CPU)
    assert torch.equal(together[1], seeded_noise([6], (2, 3), CPU)[0])
    assert torch.equal(together.flip(0), seeded_noise([7, 6, 5], (2, 3), CPU))
    assert not torch.equal(together[0], together[1])


def test_noise_takes_any_int64_seed() -> None:
    assert torch.isfinite(seeded_noise([-(2**63), 2**63 - 1, -1], (4,), CPU)).all()
