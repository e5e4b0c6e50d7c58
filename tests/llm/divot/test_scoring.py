"""Scores by hand, and against what the model computes of one option alone."""

import torch
from tests.llm.divot.conftest import tiny

from kinetok.llm.divot.scoring import choose, cost, same_answer


def test_exact_match_looks_past_form() -> None:
    assert same_answer(" The red circle. ", "a Red circle")
    assert not same_answer("red circle left", "red circle")
    assert not same_answer("another", "other")


def test_the_cost_of_an_answer_is_what_the_model_says_of_its_ids() -> None:
    """By hand: the whole text in one row, its logits one position before each id of the answer, no batch and no labels."""
    model, clips_CND = tiny(mechanism="causal").eval(), torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(2))
    vocabulary = model.vocabulary
    frames = [vocabulary.begin_frame, *vocabulary.frames[:8], vocabulary.end_frame]
    before = [vocabulary.bos, *vocabulary.encode("[INST] "), vocabulary.begin_video, *frames, vocabulary.end_video]
    before += vocabulary.encode("which? [/INST]\n")
    said = [*vocabulary.encode("red"), vocabulary.eos]
    with torch.no_grad():
        embeds_LW = model.llm.get_input_embeddings()(torch.tensor([*before, *said]))
        first = before.index(vocabulary.frames[0])
        embeds_LW[first : first + 8] = model.from_tokens(clips_CND[0])
        logits_LV = model.llm(inputs_embeds=embeds_LW[None]).logits[0].log_softmax(-1)
    by_hand = -sum(float(logits_LV[len(before) + place - 1, number]) for place, number in enumerate(said))
    found = cost(model, clips_CND, "which?", ["longer than it", "red"], limit=200)
    assert found.ids_O.tolist() == [15, 4]
    torch.testing.assert_close(float(found.nats_O[1]), by_hand, rtol=1e-5, atol=1e-5)


def test_a_choice_is_the_least_surprising_option() -> None:
    model, clips_CND = tiny().eval(), torch.randn(1, 8, 6)
    options = ["left", "right", "up and down"]
    together = cost(model, clips_CND, "where to?", options, limit=200).per_id
    alone = torch.cat([cost(model, clips_CND, "where to?", [option], limit=200).per_id for option in options])
    torch.testing.assert_close(together, alone)
    assert choose(model, clips_CND, "where to?", options, limit=200) == int(alone.argmin())
