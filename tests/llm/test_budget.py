"""The token budget: counts by the 17-frame rule, a measured step, and the two ratios explained."""

import pytest

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
