"""Generation from untrained models: it computes what one whole pass computes, it repeats itself, and it keeps to the form asked for."""

from collections.abc import Callable

import pytest
import torch
from tests.llm.divot.conftest import TOKENS, WIDTH, tiny
from torch import Tensor

from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.generation import Decoding, Draws, Stream, complete, draw_clips, draw_ids, make_clips, nth_seed, tell
from kinetok.llm.divot.heads import DiffusionConfig, GMMConfig, HeadConfig
from kinetok.llm.divot.mask import QUERY
from kinetok.llm.divot.model import DivotLM, nth, pick
from kinetok.llm.divot.sequences import ask, ask_caption, ask_clip, ask_story, follow, narrate

Clips = Callable[[int], Tensor]
SHORT = Decoding(max_tokens=6)
MECHANISMS = ["bidirectional", "causal", "autoregressive"]


@pytest.fixture(scope="module", params=MECHANISMS)
def model(request: pytest.FixtureRequest) -> DivotLM:
    return tiny(mechanism=request.param).eval()


@torch.no_grad()
def test_a_clip_is_what_one_whole_pass_makes(model: DivotLM) -> None:
    """Drawn with variance 0 or read back: the condition of every token is that of the training pass."""
    prompt = ask_clip(model.vocabulary, "ab", instructed=True)
    drawn_BND = make_clips(model, [prompt], [3])
    batch = collate([follow(model.vocabulary, "ab", drawn_BND, limit=200)], [0])
    hidden_BLW = model.hidden(model.embed(batch), model._mask(batch))
    at_BN = nth(batch["codes_BL"] == QUERY, TOKENS) - int(model.autoregressive)
    condition_BNP = model.to_head(pick(hidden_BLW, at_BN))
    if not model.autoregressive:
        torch.testing.assert_close(drawn_BND, model.head.sample(condition_BNP, [3], 0.1))
    else:
        each = [model.head.sample(condition_BNP[:, n : n + 1], [nth_seed(3, n)], 0.1) for n in range(TOKENS)]
        torch.testing.assert_close(drawn_BND, torch.cat(each, dim=1))


def test_answers_depend_on_their_own_seed_and_prompt_alone(model: DivotLM, clips: Clips) -> None:
    prompts = [ask(model.vocabulary, clips(2), "what is that?"), ask_caption(model.vocabulary, clips(1))]
    together = complete(model, prompts, [1, 2], SHORT)
    assert together == [complete(model, [prompt], [seed], SHORT)[0] for prompt, seed in zip(prompts, (1, 2), strict=True)]
    assert together != complete(model, prompts, [3, 4], SHORT)
    requests = [ask_clip(model.vocabulary, caption, instructed=False) for caption in ("ab", "a longer one")]
    made_BND = make_clips(model, requests, [1, 2])
    assert made_BND.shape == (2, TOKENS, WIDTH)
    torch.testing.assert_close(made_BND[1:], make_clips(model, requests[1:], [2]))
    assert not torch.allclose(made_BND, make_clips(model, requests, [3, 4]))


@torch.no_grad()
def test_several_draws_are_those_of_as_many_calls(model: DivotLM) -> None:
    prompts = [ask_clip(model.vocabulary, caption, instructed=False) for caption in ("a red disc", "a ring")]
    together = draw_clips(model, prompts, [[1, 2], [3, 4], [1, 2]])
    for drawn, seeds in zip(together, ([1, 2], [3, 4], [1, 2]), strict=True):
        assert torch.equal(drawn, make_clips(model, prompts, seeds))
    assert not torch.equal(together[0], together[1])


@torch.no_grad()
def test_greedy_ids_are_those_of_whole_passes(model: DivotLM, clips: Clips) -> None:
    prompt, banned = ask(model.vocabulary, clips(1), "what?"), model.vocabulary.visual
    (said,) = Stream(model, [prompt]).say(Draws([0]), Decoding(temperature=0, max_tokens=5), banned=banned, stop=-1)
    batch, ids = collate([prompt], [0], multiple=1), []
    for _ in range(5):
        logits_V = model.logits(model.hidden(model.embed(batch), None))[0, -1]
        logits_V[banned] = -torch.inf
        ids.append(int(logits_V.argmax()))
        batch["ids_BL"] = torch.cat([batch["ids_BL"], torch.tensor([ids[-1:]])], dim=1)
        batch["codes_BL"] = torch.cat([batch["codes_BL"], torch.ones(1, 1, dtype=torch.int64)], dim=1)
    assert said == ids


def test_a_story_has_as_many_clips_as_asked_for_and_repeats_itself(model: DivotLM) -> None:
    story = tell(model, "a story", clips=3, seed=4, decoding=SHORT)
    assert [part.token_ND.shape for part in story] == [(TOKENS, WIDTH)] * 3
    again = tell(model, "a story", clips=3, seed=4, decoding=SHORT)
    assert [part.text for part in again] == [part.text for part in story]
    assert all(torch.equal(mine.token_ND, theirs.token_ND) for mine, theirs in zip(again, story, strict=True))
    other = tell(model, "a story", clips=3, seed=5, decoding=SHORT)
    assert not torch.allclose(other[0].token_ND, story[0].token_ND)


@torch.no_grad()
def test_a_story_goes_on_from_the_clips_it_made_where_they_are_shown(clips: Clips) -> None:
    """Of queries alone nothing that was drawn is known; a clip that is read back changes what follows, as a sample of training has it."""
    model = tiny().eval()
    after = []
    for reread in (False, True):
        for seed in (1, 2):
            stream = Stream(model, [ask_story(model.vocabulary, "go")])
            drawn_BND = stream.make_clip([seed], "video", 1.0)
            stream.close_clip("video")
            if reread:
                stream.show_clip(drawn_BND, "video")
            after.append(stream.last_BW)
    assert torch.equal(after[0], after[1]) and not torch.allclose(after[2], after[3], atol=1e-4)
    whole = collate([narrate(model.vocabulary, "go", [("", drawn_BND)], limit=200, reread=True)], [0], multiple=1)
    hidden_BLW = model.hidden(model.embed(whole), model._mask(whole))
    torch.testing.assert_close(hidden_BLW[:, -2], after[3], atol=1e-5, rtol=1e-5)
    told = [tell(model, "go", clips=2, seed=4, decoding=SHORT, reread=reread) for reread in (False, True)]
    assert torch.equal(told[0][0].token_ND, told[1][0].token_ND) and not torch.equal(told[0][1].token_ND, told[1][1].token_ND)


@torch.no_grad()
def test_a_prompt_that_has_ended_leaves_the_others_alone(clips: Clips) -> None:
    """The stop id is one that only the first of two prompts would say, as its third; the second goes on as if alone."""
    model = tiny().eval()
    prompts, six = [ask_caption(model.vocabulary, clips(count)) for count in (1, 2)], Decoding(max_tokens=6, temperature=1, top_p=1)
    free = [Stream(model, [prompt]).say(Draws([seed]), six, banned=[], stop=-1)[0] for seed, prompt in enumerate(prompts)]
    assert free[0].index(free[0][2]) == 2 and free[0][2] not in free[1]
    assert Stream(model, prompts).say(Draws([0, 1]), six, banned=[], stop=free[0][2]) == [free[0][:2], free[1]]


@pytest.mark.parametrize("head", [GMMConfig(), DiffusionConfig(target="v", width=8, depth=1, steps=2)], ids=lambda head: head.kind)
def test_half_precision_and_any_seed_will_do(clips: Clips, head: HeadConfig) -> None:
    model = tiny(head=head, mechanism="autoregressive").eval().bfloat16()
    assert make_clips(model, [ask_clip(model.vocabulary, "ab", instructed=True)], [2**63 - 1]).dtype == torch.float32
    assert complete(model, [ask(model.vocabulary, clips(1), "?")], [2**63 - 1], SHORT)
    assert len(tell(model, "go", clips=2, seed=2**63 - 1, decoding=SHORT)) == 2


def test_nucleus_sampling() -> None:
    logits_BV = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(1000, 4)
    uniform_B = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    drawn = torch.bincount(draw_ids(logits_BV, uniform_B, Decoding(temperature=1, top_p=1)), minlength=4) / 1000
    torch.testing.assert_close(drawn, torch.tensor([0.1, 0.4, 0.2, 0.3]), atol=0.04, rtol=0)
    assert set(draw_ids(logits_BV, uniform_B, Decoding(temperature=1, top_p=0.6)).tolist()) == {1, 3}
    assert set(draw_ids(logits_BV, uniform_B, Decoding(temperature=1, top_p=0.1)).tolist()) == {1}
    assert set(draw_ids(logits_BV, uniform_B, Decoding(temperature=0)).tolist()) == {1}
    assert set(draw_ids(logits_BV, uniform_B, Decoding(temperature=0.01, top_p=1)).tolist()) == {1}
    assert draw_ids(logits_BV[:1], torch.tensor([1 - 1e-8]), Decoding(temperature=1, top_p=1)).item() == 0
