"""The sampler where the official one fails, and against closed forms."""

import pytest
import torch

from kinetok.tokenizers.divot import schedule
from kinetok.tokenizers.divot.ddim import SamplerConfig, ddim_sample, make_grid, timesteps


@pytest.mark.parametrize("half", [False, True])
def test_no_number_of_trailing_steps_gives_nan(half: bool) -> None:
    for steps in range(1, 101):
        grid = make_grid(SamplerConfig(steps=steps, spacing="trailing", half=half))
        assert len(grid.t_S) == steps and grid.t_S[-1] == 999 and (grid.t_S.diff() > 0).all()
        assert grid.sigma_S.isfinite().all() and (1 - grid.before_S - grid.sigma_S**2 > -1e-6).all()
    x = ddim_sample(lambda x, t: x, (4, 2, 3, 3), SamplerConfig(steps=7, spacing="trailing", half=half), [0], torch.device("cpu"))
    assert x.isfinite().all()


def test_uniform_steps_that_run_past_the_schedule_are_refused() -> None:
    for steps in (3, 9, 27, 36, 37, 101, 333, 501, 1000):
        with pytest.raises(ValueError, match="run past t = 999"):
            timesteps(steps, "uniform")
    assert len(timesteps(30, "uniform")) == 31
    with pytest.raises(ValueError, match="1000 steps, 1001"):
        timesteps(1001, "trailing")


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_point_is_found_whatever_the_noise(eta: float) -> None:
    """The exact v for one clean latent leads there, but for the noise of step 0 that is left."""
    wanted = torch.full((4, 2, 3, 3), 0.7)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = schedule.signal_and_noise(t)
        return schedule.velocity(wanted, (x - a * wanted) / s, t)

    for spacing in ("uniform", "trailing"):
        config = SamplerConfig.model_validate({"steps": 20, "eta": eta, "spacing": spacing})
        found = ddim_sample(velocity, (4, 2, 3, 3), config, [1, 2], torch.device("cpu"))
        torch.testing.assert_close(found, wanted.expand(2, -1, -1, -1, -1), atol=0.15, rtol=0)


def test_steps_of_a_standard_normal_are_rotations() -> None:
    """Latents from N(0, 1) have v = 0 everywhere: every step without noise shrinks x by the cosine of the angle it turns."""
    shape, config = (4, 2, 3, 3), SamplerConfig(steps=50, eta=0)
    x = ddim_sample(lambda x, t: torch.zeros_like(x), shape, config, [5], torch.device("cpu"))
    grid = make_grid(config)
    shrinking = (grid.alpha_S.sqrt().acos() - grid.before_S.sqrt().acos()).cos().prod()
    assert 0.9 < shrinking < 1
    start = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(x[0], start * shrinking.float())


def test_v_is_a_rotation_of_noise_and_latent() -> None:
    x, noise = torch.randn(2, 6, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 300, 700, 998, 999])
    noisy, v = schedule.noisy(x, noise, t), schedule.velocity(x, noise, t)
    torch.testing.assert_close(schedule.clean(noisy, v, t), x)
    torch.testing.assert_close(schedule.noise(noisy, v, t), noise)
    torch.testing.assert_close(noisy[-1], noise[-1])
