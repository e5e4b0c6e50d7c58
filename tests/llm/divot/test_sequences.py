"""Sequences and labels, spelled out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kinetok.llm.divot.mask import QUERY, READ, TEXT
from kinetok.llm.divot.sequences import (
    IGNORED,
    REQUESTS,
    Packed,
    answer,
    ask,
    ask_caption,
    ask_clip,
    ask_story,
    depict,
    describe,
    follow,
    narrate,
    template,
)
from kinetok.llm.divot.vocabulary import Vocabulary

Clips = Callable[[int], Tensor]


def _spelled(vocabulary: Vocabulary, packed: Packed, *, learned: bool = False) -> str:
    """The sequence, or what is learned of it, with `r` and `w` for tokens that are read and written."""
    words = []
    for number, code, label in zip(packed.ids_L, packed.codes_L, packed.labels_L, strict=True):
        assert label in (number, IGNORED)
        if learned and label == IGNORED:
            continue
        words.append({READ: "r", QUERY: "w", TEXT: vocabulary.tokenizer.decode([number])}[code])
    return "".join(words)


def test_pre_training(vocabulary: Vocabulary, clips: Clips) -> None:
    shown = describe(vocabulary, clips(2), "ab", limit=100)
    block = f"<frame>{'r' * 8}</frame>"
    assert _spelled(vocabulary, shown) == f"<s><vid>{block}{block}</vid>ab</s>"
    assert _spelled(vocabulary, shown, learned=True) == "ab</s>"
    made = depict(vocabulary, "ab", clips(1), limit=100, media="image")
    assert _spelled(vocabulary, made) == f"<s>ab<img><frame>{'w' * 8}</frame></img></s>"
    assert _spelled(vocabulary, made, learned=True) == "</s>"
    assert made.read_CND.shape[0] == 0 and made.written_CND.shape == (1, 8, 6)


def test_the_template_is_the_prompt_in_letters(vocabulary: Vocabulary, clips: Clips) -> None:
    for media in ("video", "image"):
        asked = _spelled(vocabulary, ask(vocabulary, clips(1), "where to?", media=media))
        assert template(vocabulary, media=media).replace("{question}", "where to?").replace("{tokens}", "r" * 8) == asked
    assert template(vocabulary, instructed=False) == "<s><vid><frame>{tokens}</frame></vid>"


def test_lengths_of_the_reference(vocabulary: Vocabulary) -> None:
    """20 clips of 64 tokens are 1322 ids with their tags."""
    assert len(describe(vocabulary, torch.zeros(20, 64, 256), "", limit=1400)) == 1322 + 2


def test_instruction_tuning(vocabulary: Vocabulary, clips: Clips) -> None:
    talk = answer(vocabulary, clips(1), [("q?", "yes"), ("r?", "no")], limit=200)
    assert _spelled(vocabulary, talk) == f"<s>[INST] <vid><frame>{'r' * 8}</frame></vid>q? [/INST]\nyes\n[INST] r? [/INST]\nno</s>"
    assert _spelled(vocabulary, talk, learned=True) == "yesno</s>"
    made = follow(vocabulary, "ab", clips(1), limit=200)
    assert _spelled(vocabulary, made) == f"<s>[INST] Generate a video of ab [/INST]\n<vid><frame>{'w' * 8}</frame></vid></s>"
    assert _spelled(vocabulary, made, learned=True) == "<vid></vid></s>"
    assert all("{caption}" in phrase for phrases in REQUESTS.values() for phrase in phrases)
    others = {_spelled(vocabulary, follow(vocabulary, "ab", clips(1), limit=200, phrase=phrase)) for phrase in range(6)}
    assert len(others) == 6


def test_stories_interleave(vocabulary: Vocabulary, clips: Clips) -> None:
    first, second = clips(1), clips(1)
    story = narrate(vocabulary, "go", [("a", first), ("b", second)], limit=200)
    clip = f"<vid><frame>{'w' * 8}</frame></vid>"
    assert _spelled(vocabulary, story) == f"<s>[INST] go [/INST]\na{clip}b{clip}</s>"
    assert _spelled(vocabulary, story, learned=True) == "a<vid></vid>b<vid></vid></s>"
    assert torch.equal(story.written_CND, torch.cat([first, second]))


@pytest.mark.parametrize("limit", [20, 30, 60, 90])
def test_what_has_no_room_is_cut_and_the_rest_stays_whole(vocabulary: Vocabulary, clips: Clips, limit: int) -> None:
    clip, long = clips(1), "x" * 100
    for packed in (describe(vocabulary, clip, long, limit=limit), depict(vocabulary, long, clip, limit=limit)):
        assert len(packed) == limit and packed.ids_L[-1] == vocabulary.eos
    assert packed.labels_L[-1] == vocabulary.eos
    if limit >= 60:
        assert len(follow(vocabulary, long, clip, limit=limit)) == limit
        turns = [("q", "a"), ("q", long)]
        assert _spelled(vocabulary, answer(vocabulary, clip, turns, limit=limit), learned=True) == "a</s>"
        assert len(narrate(vocabulary, long, [("a", clip), (long, clip)], limit=limit).written_CND) == 1


def test_no_end_is_learned_after_what_was_cut(vocabulary: Vocabulary, clips: Clips) -> None:
    """Of captions, answers, the texts of a story and its parts; whole ones do end."""
    clip, long = clips(1), "x" * 100
    assert _spelled(vocabulary, describe(vocabulary, clip, long, limit=60), learned=True) == "x" * 46
    assert _spelled(vocabulary, answer(vocabulary, clip, [("q", long)], limit=80), learned=True) == "x" * 49
    assert _spelled(vocabulary, narrate(vocabulary, "go", [(long, clip)], limit=60), learned=True).strip("x") == "</vid></s>"
    left_out = narrate(vocabulary, "go", [("a", clip), (long, clip)], limit=90)
    assert _spelled(vocabulary, left_out, learned=True) == "a<vid></vid>"


def test_of_a_clip_without_a_caption_nothing_is_learned(vocabulary: Vocabulary, clips: Clips) -> None:
    """Else a model would learn to say nothing of a video."""
    for packed in (describe(vocabulary, clips(1), "", limit=60), answer(vocabulary, clips(1), [("q", "")], limit=80)):
        assert packed.ids_L[-1] == vocabulary.eos and set(packed.labels_L) == {IGNORED}


@pytest.mark.parametrize("reply", ["yes", "y" * 100])
def test_a_question_that_is_too_long_is_cut_and_its_marks_are_not(vocabulary: Vocabulary, clips: Clips, reply: str) -> None:
    talk = answer(vocabulary, clips(1), [("q" * 300, reply)], limit=100)
    begins, _, said = _spelled(vocabulary, talk).partition(" [/INST]\n")
    assert len(talk) == 100 and begins.startswith(f"<s>[INST] <vid><frame>{'r' * 8}</frame></vid>qqq")
    assert (said == "yes</s>" and talk.labels_L[-1] == vocabulary.eos) if reply == "yes" else said == f"{'y' * 40}</s>"
    assert talk.labels_L[-1] == (vocabulary.eos if reply == "yes" else IGNORED)


def test_a_story_shows_its_clips_again_where_it_is_to_know_them(vocabulary: Vocabulary, clips: Clips) -> None:
    first, second = clips(1), clips(1)
    story = narrate(vocabulary, "go", [("a", first), ("b", second)], limit=200, reread=True)
    made, shown = (f"<vid><frame>{letter * 8}</frame></vid>" for letter in "wr")
    assert _spelled(vocabulary, story) == f"<s>[INST] go [/INST]\na{made}{shown}b{made}{shown}</s>"
    assert _spelled(vocabulary, story, learned=True) == "a<vid></vid>b<vid></vid></s>"
    assert torch.equal(story.read_CND, story.written_CND)
    assert len(narrate(vocabulary, "go", [("a", first), ("b", second)], limit=69, reread=True).written_CND) == 1


def test_no_room_at_all_is_an_error(vocabulary: Vocabulary, clips: Clips) -> None:
    with pytest.raises(ValueError, match="limit of 14"):
        describe(vocabulary, clips(1), "ab", limit=14)
    with pytest.raises(ValueError, match="limit of 14"):
        depict(vocabulary, "ab", clips(1), limit=14)
    with pytest.raises(ValueError, match="256 tokens"):
        describe(vocabulary, torch.zeros(1, 257, 6), "ab", limit=1000)


def test_prompts_are_beginnings_of_what_is_learned(vocabulary: Vocabulary, clips: Clips) -> None:
    clip = clips(1)
    pairs = [
        (ask_caption(vocabulary, clip), describe(vocabulary, clip, "ab", limit=100)),
        (ask(vocabulary, clip, "q?"), answer(vocabulary, clip, [("q?", "yes")], limit=100)),
        (ask(vocabulary, clip, "q?", instructed=False), describe(vocabulary, clip, "ab", limit=100)),
        (ask_clip(vocabulary, "ab", instructed=False), depict(vocabulary, "ab", clip, limit=100)),
        (ask_clip(vocabulary, "ab", instructed=True), follow(vocabulary, "ab", clip, limit=100)),
        (ask_story(vocabulary, "go"), narrate(vocabulary, "go", [("a", clip)], limit=100)),
    ]
    for prompt, whole in pairs:
        assert whole.ids_L[: len(prompt)] == prompt.ids_L and whole.codes_L[: len(prompt)] == prompt.codes_L
