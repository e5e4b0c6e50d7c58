"""The mixture against the official numbers and against torch.distributions."""

import pytest
import torch
from tests import golden_files
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from kinetok.llm.gmm import GaussianMixture, parameter_count

FLOOR = 1e-5


def _mixture(*leading: int, components: int = 3, width: int = 4, seed: int = 0) -> GaussianMixture:
    parameters = 2 * torch.randn(*leading, parameter_count(components, width), generator=torch.Generator().manual_seed(seed))
    return GaussianMixture.of(parameters, components, FLOOR)


def _reference(mixture: GaussianMixture) -> MixtureSameFamily:
    return MixtureSameFamily(
        Categorical(logits=mixture.logit_K), Independent(Normal(mixture.mean_KD, mixture.variance_KD.sqrt()), reinterpreted_batch_ndims=1)
    )


@pytest.mark.parametrize(("name", "components"), [("k4_d8", 4), ("k16_d256", 16)])
def test_official_numbers(name: str, components: int) -> None:
    golden = golden_files.read("08_gmm")
    inputs, outputs = golden.under(f"in.{name}"), golden.under(f"out.{name}")
    parameters = inputs["params"].requires_grad_()
    mixture = GaussianMixture.of(parameters, components, FLOOR)
    log_prob = mixture.log_prob(inputs["targets"])
    loss = -log_prob.mean() / inputs["targets"].shape[-1]
    (gradient,) = torch.autograd.grad(loss, parameters)
    golden.check(log_prob, f"{name}.log_prob")
    golden.check(loss[None], f"{name}.loss")
    golden.check(gradient, f"{name}.grad_params")
    golden.check(mixture.mean(), f"{name}.predict")
    golden.check(mixture.mean(), f"{name}.predict_via_params")
    golden.check((0.1 * mixture.variance_KD).sum((-2, -1)), f"{name}.variances_scale_0.1_sum")
    golden.check(mixture.draw(outputs["sample_component"], outputs["sample_standard_normal"], 0.1), f"{name}.sample")
    if "means" in outputs:
        golden.check(mixture.mean_KD, f"{name}.means")
        golden.check(mixture.variance_KD, f"{name}.variances")
        golden.check(mixture.logit_K, f"{name}.logits")
    else:
        golden.check(mixture.variance_KD[:, :, :2], f"{name}.variances_first")


def test_log_prob_is_that_of_torch_distributions() -> None:
    mixture, x = _mixture(5, 2), torch.randn(5, 2, 4)
    torch.testing.assert_close(mixture.log_prob(x), _reference(mixture).log_prob(x))


def test_far_targets_stay_finite() -> None:
    """Each component's density underflows; their logarithms do not."""
    assert _mixture(1).log_prob(torch.full((1, 4), 1e4)).isfinite().all()


def test_bfloat16_parameters_are_read_in_float32() -> None:
    mixture = GaussianMixture.of(torch.randn(2, 27).bfloat16(), 3, FLOOR)
    assert mixture.log_prob(torch.randn(2, 4).bfloat16()).dtype == torch.float32


def _moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    return x_ND.mean(0), x_ND.var(0)


def test_samples_have_the_moments_of_the_mixture() -> None:
    one = _mixture(1, 1)
    many = GaussianMixture(*(part.expand(1, 200_000, *part.shape[2:]) for part in (one.mean_KD, one.variance_KD, one.logit_K)))
    mean, variance = _moments(many.sample([0], 1.0)[0])
    reference = _reference(one)
    torch.testing.assert_close(mean, reference.mean[0, 0], atol=0.03, rtol=0)
    torch.testing.assert_close(variance, reference.variance[0, 0], atol=0.03, rtol=0.02)
    torch.testing.assert_close(many.sample([0], 0.0)[0].mean(0), mean, atol=0.03, rtol=0)


def test_a_sample_depends_on_its_own_seed_alone() -> None:
    mixture = _mixture(3, 6)
    drawn = mixture.sample([7, 8, 9], 0.1)
    alone = GaussianMixture(mixture.mean_KD[1:2], mixture.variance_KD[1:2], mixture.logit_K[1:2]).sample([8], 0.1)
    assert torch.equal(drawn[1:2], alone)
    assert not torch.equal(mixture.sample([7, 1, 9], 0.1)[1], drawn[1])
