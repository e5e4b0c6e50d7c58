"""The token budget: counts by the 17-frame rule, a measured step, and the two ratios explained."""

import pytest
import torch
from torch import Tensor, nn

from kinetok.llm import budget as module
from kinetok.llm.budget import RATES, budget, explanation, longest_video, measure, video_latents
from kinetok.llm.presets import dit


def test_the_budget_of_the_papers_setting() -> None:
    rows = budget("small", frames=68, height=192, width=320, measured=False)
    assert [(row.latents, row.tokens, row.longest) for row in rows] == [(20, 19_200, 68), (12, 11_520, 111), (8, 7_680, 170)]
    assert rows[0].flops.training > rows[1].flops.training > rows[2].flops.training
    assert "2.5 times fewer tokens" in explanation(rows) and "170 at 16x" in explanation(rows) and "5 times" in explanation(rows)


@pytest.mark.parametrize("rate", RATES)
def test_the_longest_video_is_the_longest(rate: int) -> None:
    for latents in range(1, 40):
        frames = longest_video(latents, rate)
        assert video_latents(frames, rate) <= latents < video_latents(frames + 1, rate)


def test_pixels_that_are_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        budget("small", frames=17, height=100, width=64, measured=False)
    with pytest.raises(ValueError, match="no multiple of 2"):
        budget("5b", frames=17, height=72, width=64, measured=False)


def test_a_measured_step_grows_with_its_tokens() -> None:
    config = dit("small", z=4, chunk=2)
    small, large = measure(config, (2, 4, 4)), measure(config, (8, 8, 8))
    assert small.seconds > 0 and large.memory > small.memory and small.device == large.device


def test_a_step_is_timed_at_its_own_shape_once_it_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by what each step is said to take: the first of a shape is slow, and one of the others was disturbed."""
    clock, costs, shapes = [0.0], iter([60.0, 2.0, 30.0, 1.0]), []

    def step(player: nn.Module, batch: dict[str, Tensor]) -> int:
        shapes.append(tuple(batch["latent_BZthw"].shape[2:]))
        clock[0] += next(costs)
        return 7

    monkeypatch.setattr(module, "_step", step)
    monkeypatch.setattr(module, "_now", lambda device: clock[0])
    assert measure(dit("small", z=4, chunk=2), (4, 4, 4)).seconds == 2.0
    assert shapes == [(4, 4, 4)] * 4


def test_a_measurement_begins_with_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is stood in for: a large video before a small one leaves the small one its own peak."""
    peak = [0]

    def step(player: nn.Module, batch: dict[str, Tensor]) -> int:
        peak[0] = max(peak[0], batch["latent_BZthw"].numel())
        return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(module, "_now", lambda device: 0.0)
    monkeypatch.setattr(module, "_step", step)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr(module, "_batch", lambda config, latent, device: {"latent_BZthw": torch.empty(1, config.z, *latent)})
    config = dit("small", z=4, chunk=2)
    large, small = measure(config, (8, 8, 8)).memory, measure(config, (2, 4, 4)).memory
    assert large - small == 4 * 8 * 8 * 8 - 4 * 2 * 4 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_small_video_takes_less_than_the_large_one_before_it() -> None:
    config = dit("small", z=4, chunk=2)
    large, small = measure(config, (16, 32, 32)), measure(config, (2, 8, 8))
    assert small.memory < large.memory
