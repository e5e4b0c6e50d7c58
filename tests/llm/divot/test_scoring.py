"""Scores by hand, and against what the model computes of one option alone."""

import torch
from tests.llm.divot.conftest import tiny

from kinetok.llm.divot.scoring import choose, same_answer, surprise


def test_exact_match_looks_past_form() -> None:
    assert same_answer(" The red circle. ", "a Red circle")
    assert not same_answer("red circle left", "red circle")
    assert not same_answer("another", "other")


def test_a_choice_is_the_least_surprising_option() -> None:
    model, clips_CND = tiny().eval(), torch.randn(1, 8, 6)
    options = ["left", "right", "up and down"]
    together = surprise(model, clips_CND, "where to?", options, limit=200)
    alone = torch.cat([surprise(model, clips_CND, "where to?", [option], limit=200) for option in options])
    torch.testing.assert_close(together, alone)
    assert choose(model, clips_CND, "where to?", options, limit=200) == int(alone.argmin())
