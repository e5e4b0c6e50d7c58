"""The feed of language models: the same samples whatever the workers, groups of one task and one length, contracts kept."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipelines.data.token_artifacts import SPEC, TOKENS, WIDTH, caption, clip_tokens, make_instructions, make_tokens

from kinetok.infra.errors import ConfigError, ContractError, DataError
from kinetok.llm.divot.vocabulary import Vocabulary
from kinetok.pipelines.data.instructions import QUESTIONS, Story, questions_of
from kinetok.pipelines.data.language_feed import LanguageFeed
from kinetok.pipelines.data.language_tasks import WINDOW_GROUPS, Answering, Captioning, Generation, Storytelling
from kinetok.pipelines.data.token_videos import TokenVideos, divided_stories, unknown_lines

CAPTIONING, GENERATION = Captioning(), Generation(weight=3.0)


def feed(*tokens: Any, **changes: Any) -> LanguageFeed:
    fields: dict[str, Any] = {
        "instructions": None,
        "tasks": (CAPTIONING, GENERATION),
        "split": "train",
        "open_vocabulary": Vocabulary.of_bytes,
        "clip_tokens": TOKENS,
        "group": 4,
        "seed": 0,
    }
    return LanguageFeed(tokens, **fields | changes)


def text(made: LanguageFeed, position: int) -> str:
    return made.open_vocabulary().decode(made.sample(position).ids_L)


def test_every_worker_count_sees_the_same_samples(tmp_path: Path) -> None:
    made = feed(make_tokens(tmp_path, 24))
    expected = [made.sample(position) for position in range(8, 24)]
    for world in (1, 2, 4):
        ranks = [made.batches(start=8, batch=4 // world, rank=rank, world=world) for rank in range(world)]
        seeds, ids = [], []
        for _ in range(4):
            for batch in map(next, ranks):
                seeds += batch["seed_B"].tolist()
                ids += [row[codes != 0].tolist() for row, codes in zip(batch["ids_BL"], batch["codes_BL"], strict=True)]
        assert ids == [sample.ids_L for sample in expected]
        assert len(set(seeds)) == 16


def test_a_micro_batch_is_of_one_task_and_shares_follow_weights(tmp_path: Path) -> None:
    made = feed(make_tokens(tmp_path, 24))
    stream = made.batches(start=0, batch=2, rank=0, world=1)
    kinds = [tuple(sorted({"read_BND", "written_BND"} & next(stream).keys())) for _ in range(400)]
    assert kinds[::2] == kinds[1::2]
    assert Counter(kinds) == {("read_BND",): 100, ("written_BND",): 300}


def test_groups_have_about_one_length_and_an_epoch_has_every_video_once(tmp_path: Path) -> None:
    """An epoch is exactly one window of groups here."""
    videos = 4 * WINDOW_GROUPS
    made = feed(make_tokens(tmp_path, videos), tasks=(CAPTIONING,))
    lengths = np.array([len(made.sample(position)) for position in range(videos)]).reshape(-1, 4)
    assert sorted({text(made, position) for position in range(videos)}) == sorted(map(caption, range(videos)))
    assert np.ptp(lengths, axis=1).mean() < 4 < np.ptp(lengths)
    assert (np.diff(lengths.mean(1)) < 0).any(), "groups are shuffled, not sorted"
    shuffled = feed(make_tokens(tmp_path / "again", videos), tasks=(CAPTIONING,), seed=1)
    assert [text(shuffled, position) for position in range(8)] != [text(made, position) for position in range(8)]


@pytest.mark.parametrize("tasks", [(CAPTIONING,), (CAPTIONING, GENERATION), (Storytelling(clips=2), CAPTIONING)])
def test_no_group_holds_a_video_twice_and_what_an_epoch_leaves_out_comes_in_another(tmp_path: Path, tasks: tuple[Any, ...]) -> None:
    """27 videos in groups of 4: windows and groups end with the epoch."""
    made, vocabulary = feed(make_tokens(tmp_path, 27), tasks=tasks), Vocabulary.of_bytes()
    seen: dict[int, list[list[str]]] = {}
    for group in range(60):
        (task,) = {int(number) for number in made.load([group * 4 + place for place in range(4)])["task_B"]}
        texts = [vocabulary.decode(made.sample(group * 4 + place).ids_L) for place in range(4)]
        named = [name for text in texts for name in sorted(set(re.findall(r"video \d+ ", text)))]
        assert len(set(named)) == len(named) >= 4
        seen.setdefault(task, []).append(named)
    captions = seen[len(tasks) - 1 if len(tasks) == 2 and isinstance(tasks[0], Storytelling) else 0]
    epochs = [{name for group in captions[first : first + 6] for name in group} for first in range(0, len(captions) // 6 * 6, 6)]
    assert all(len(epoch) == 24 for epoch in epochs) and len(set.union(*epochs)) > 24


def test_validation_is_every_sample_of_every_task_once(tmp_path: Path) -> None:
    """Of 11 videos 9 are held out, which are no whole groups; the first positions have something of each task."""
    val = tuple(range(1, 10))
    tokens, instructions = make_tokens(tmp_path / "t", 11, val=val), make_instructions(tmp_path / "i", [1, 4, 10])
    tasks = (CAPTIONING, Generation(weight=0.1), Answering())
    made = feed(tokens, instructions=instructions, tasks=tasks, split="val")
    assert len(made) == 9 + 9 + 2
    batches = [made.load([position]) for position in range(len(made))]
    found = Counter((int(batch["task_B"]), re.search(r"video \d+|\n\d+", text(made, at)).group()) for at, batch in enumerate(batches))  # type: ignore[union-attr]
    assert found == {(task, f"video {video}"): 1 for task in (0, 1) for video in val} | {(2, f"\n{video}"): 1 for video in (1, 4)}
    first = [int(batch["task_B"]) for batch in batches[:10]]
    assert first == [0] * 4 + [1] * 4 + [2] * 2
    again = list(zip(range(5), made.batches(start=0, batch=4, rank=0, world=1), strict=False))
    assert torch.cat([batch["task_B"] for _, batch in again]).tolist() == [int(batch["task_B"]) for batch in batches]


def test_a_val_split_that_has_nothing_for_the_tasks_is_empty(tmp_path: Path) -> None:
    tokens, instructions = make_tokens(tmp_path / "t", 8, val=(1,)), make_instructions(tmp_path / "i", [2, 3])
    made = feed(tokens, instructions=instructions, tasks=(Answering(),), split="val")
    assert len(made) == 0 and made.lacking == ("answering",)
    assert len(feed(make_tokens(tmp_path / "u", 8), split="val")) == 0


def test_a_question_that_is_too_long_ends_no_training(tmp_path: Path) -> None:
    """It is cut; clips that leave no room for any are refused before the training begins."""
    made = make_instructions(tmp_path / "i", [0])
    made.folder.write_text(QUESTIONS, made.folder.read_text(QUESTIONS).replace("Which?", "Which?" * 99))
    tokens = make_tokens(tmp_path / "t", 2, clips=3)
    asked = feed(tokens, instructions=made, tasks=(Answering(limit=60),), group=1)
    assert [len(asked.sample(position)) for position in range(4)] == [60] * 4 and text(asked, 0).endswith("[/INST]\n0")
    with pytest.raises(ConfigError, match=r"answering: 3 clips of 4 tokens, .* take 52, and limit is 51: raise it, or lower clips"):
        len(feed(tokens, instructions=made, tasks=(Answering(limit=51),)))
    assert len(feed(tokens, instructions=made, tasks=(Answering(limit=51, clips=2),))) == 1


def test_a_conversation_keeps_its_order(tmp_path: Path) -> None:
    """`turns` takes so many in a row, from another one on each time."""
    made = make_instructions(tmp_path / "i", [0])
    asked = "".join(f'{{"question": "{letter}?", "answer": "{letter}"}},' for letter in "abcd").rstrip(",")
    made.folder.write_text(QUESTIONS, f'{{"video": "v/0000", "questions": [{asked}]}}')
    tokens = make_tokens(tmp_path / "t", 2)
    for turns, expected in ((None, {"abcd"}), (2, {"ab", "bc", "cd"}), (9, {"abcd"})):
        some = feed(tokens, instructions=made, tasks=(Answering(turns=turns),), group=1)
        assert {"".join(re.findall(r"(\w)\? ", text(some, position))) for position in range(30)} == expected


def test_clips_of_a_video_stand_together_in_order_of_time(tmp_path: Path) -> None:
    made = feed(make_tokens(tmp_path, 4, clips=3), tasks=(Captioning(clips=3),), group=2)
    for position in range(4):
        video = int(text(made, position).split()[1])
        expected = torch.stack([clip_tokens(video, clip) for clip in range(3)])
        torch.testing.assert_close(made.sample(position).read_CND, expected)


def test_more_clips_than_are_wanted_are_chosen_evenly(tmp_path: Path) -> None:
    made = feed(make_tokens(tmp_path, 4, clips=10), tasks=(Captioning(clips=2),), group=2)
    drawn = {tuple((made.sample(position).read_CND[:, 0, 0] // 10 % 10).int().tolist()) for position in range(40)}
    assert all(early < 5 <= late for early, late in drawn) and len(drawn) > 2


def test_windows_of_one_sample_are_clips(tmp_path: Path) -> None:
    made = feed(make_tokens(tmp_path, 4, windows=3), tasks=(CAPTIONING, GENERATION), group=2)
    samples = [made.sample(position) for position in range(100)]
    assert {len(sample.read_CND) for sample in samples} == {0, 3} and {len(sample.written_CND) for sample in samples} == {0, 1}


def test_pictures_are_clips_of_one_frame(tmp_path: Path) -> None:
    assert SPEC.recipe is not None
    still = SPEC.model_copy(update={"recipe": SPEC.recipe.model_copy(update={"frames": 1})})
    videos, pictures = make_tokens(tmp_path / "a", 4), make_tokens(tmp_path / "b", 4, spec=still)
    made = feed(videos, pictures, tasks=(CAPTIONING, Captioning(source=1)), group=2)
    vocabulary = Vocabulary.of_bytes()
    opened = Counter(made.sample(2 * group).ids_L[1] for group in range(100))
    assert opened == {vocabulary.begin_video: 50, vocabulary.begin_image: 50}


def test_answers_are_learned_of_the_videos_that_are_asked_about(tmp_path: Path) -> None:
    tokens, instructions = make_tokens(tmp_path / "t", 8, val=(1, 2)), make_instructions(tmp_path / "i", [0, 2, 4, 99])
    made = feed(tokens, instructions=instructions, tasks=(Answering(turns=1),), group=1)
    seen = {text(made, position) for position in range(60)}
    assert seen == {f"[INST] {q} [/INST]\n{a}" for video in (0, 4) for q, a in (("Which?", str(video)), ("Odd?", "no"))}
    both = feed(tokens, instructions=instructions, tasks=(Answering(),), group=1, split="val")
    assert {text(both, position).count("[INST]") for position in range(9)} == {2} and len(both) == 1


def test_several_lines_about_one_video_are_as_many_conversations(tmp_path: Path) -> None:
    made = make_instructions(tmp_path / "i", [2, 3])
    first, second = made.folder.read_text(QUESTIONS).splitlines()
    other = second.replace('"v/0003"', '"v/0002"')
    made.folder.write_text(QUESTIONS, "\n".join([first, other]))
    assert {video: [asked.answer for asked in found] for video, found in questions_of(made).items()} == {"v/0002": ["2", "no", "3", "yes"]}
    both = feed(make_tokens(tmp_path / "t", 4), instructions=made, tasks=(Answering(),), group=1)
    assert len(both) == 2
    assert {tuple(text(both, position).split("\n")[1::2]) for position in range(4)} == {("2", "no"), ("3", "yes")}


def test_stories_may_name_clips(tmp_path: Path) -> None:
    """Of one video in a row, as the published ones; those of both splits are in neither."""
    tokens = make_tokens(tmp_path / "t", 4, clips=3, val=(1,))
    row = Story(request="Tell.", clips=("v/0002/0", "v/0002/1000", "v/0002/2000"), texts=("A.", "B.", "C."))
    divided = Story(request="Both.", clips=("v/0002", "v/0001/0"), texts=("D.", "E."))
    held_out = Story(request="Val.", clips=("v/0001/2000",), texts=("F.",))
    gone = Story(request="Gone.", clips=("v/0001", "v/0002/9000"), texts=("G.", "H."))
    stories = [row, divided, held_out, gone]
    written = make_instructions(tmp_path / "i", [0], stories)
    written.record.metrics["stories"] = 4.0
    for split, clips in (("train", [clip_tokens(2, clip) for clip in range(3)]), ("val", [clip_tokens(1, 2)])):
        made = feed(tokens, instructions=written, tasks=(Storytelling(),), group=1, split=split)
        assert len(made) == 1
        torch.testing.assert_close(made.sample(0).written_CND, torch.stack(clips))
    rows = TokenVideos.open(tokens, "train", clip_tokens=TOKENS).shards.rows
    assert divided_stories(stories, rows["id"], rows["split"]) == 1
    assert unknown_lines([], stories, rows["id"], asker="i", holder="t")["unknown_stories"] == 1


@pytest.mark.parametrize(("clips", "windows"), [(5, 1), (1, 5)])
def test_stories_are_put_together_of_windows_of_one_video(tmp_path: Path, clips: int, windows: int) -> None:
    """In a row, from a drawn one on, whether they are samples of their own or parts of one; a caption is said once."""
    made = feed(make_tokens(tmp_path, 3, clips=clips, windows=windows), tasks=(Storytelling(clips=3, of="windows"),), group=1)
    assert len(made) == 3 and not len(feed(make_tokens(tmp_path / "short", 3, clips=2), tasks=(Storytelling(of="windows"),), split="val"))
    firsts = set()
    for position in range(30):
        sample = made.sample(position)
        assert text(made, position).count("video") == 2 and sample.written_CND.shape == (3, TOKENS, WIDTH)
        if clips > 1:
            at = (sample.written_CND[:, 0, 0] % 100 // 10).int().tolist()
            assert at == list(range(at[0], at[0] + 3))
            firsts.add(at[0])
    assert clips == 1 or firsts == {0, 1, 2}


def test_a_story_that_rereads_shows_what_it_made(tmp_path: Path) -> None:
    sample = feed(make_tokens(tmp_path, 4), tasks=(Storytelling(clips=2, reread=True),), group=1).sample(0)
    assert torch.equal(sample.read_CND, sample.written_CND) and len(sample.read_CND) == 2


def test_stories_are_those_somebody_wrote_or_captions_in_a_row(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "t", 9)
    story = Story(request="Tell me.", clips=("v/0003", "v/0001"), texts=("First.", "Then."))
    gone = Story(request="Not here.", clips=("v/0077",), texts=("Never.",))
    written = make_instructions(tmp_path / "i", [0], [story, gone])
    written.record.metrics["stories"] = 2.0
    made = feed(tokens, instructions=written, tasks=(Storytelling(),), group=1)
    assert len(made) == 1 and text(made, 5).split("\n") == ["[INST] Tell me. [/INST]", "First.Then."]
    torch.testing.assert_close(made.sample(0).written_CND, torch.stack([clip_tokens(3, 0), clip_tokens(1, 0)]))
    composed = feed(tokens, tasks=(Storytelling(clips=3),), group=1)
    told = [text(composed, position) for position in range(3 * WINDOW_GROUPS)]
    texts = Counter(part for line in told for part in line.split("/INST]")[1].strip().replace("video", "|video").split("|")[1:])
    assert len(composed) == 3 and texts == {caption(video): WINDOW_GROUPS for video in range(9)}
    assert all(line.startswith("[INST] Tell a story that begins like this: video") for line in told)


def test_the_val_split_leaves_out_tasks_without_samples_and_train_refuses_them(tmp_path: Path) -> None:
    tokens, instructions = make_tokens(tmp_path / "t", 8, val=(1,)), make_instructions(tmp_path / "i", [1])
    tasks = (CAPTIONING, Answering())
    assert len(feed(tokens, instructions=instructions, tasks=(*tasks, Storytelling()), split="val")) == 2
    with pytest.raises(DataError, match="the train split has nothing for answering"):
        len(feed(tokens, instructions=instructions, tasks=tasks))


def test_contracts(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "a", 4)
    other = make_tokens(tmp_path / "b", 4, spec=SPEC.model_copy(update={"weights": "b" * 64}))
    with pytest.raises(ContractError, match=r"weights: bbb.*encode all clips with one"):
        len(feed(tokens, other))
    with pytest.raises(ContractError, match="encode holds tokens, continuous, as a grid"):
        len(feed(make_tokens(tmp_path / "c", 4, spec=SPEC.model_copy(update={"layout": "grid"}))))
    with pytest.raises(ContractError, match="no whole clips of 3: set clip_tokens"):
        feed(tokens, clip_tokens=3).sample(0)
