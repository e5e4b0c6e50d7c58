"""Questions and stories: what drawn scenes say is true and told apart, and every known form of a user's lines is read."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from kinetok.infra.errors import DataError
from kinetok.pipelines.data.instructions import OPTIONS, Question, Questions, Story, of_scenes, parse
from kinetok.pipelines.data.scenes import EMBEDDED, SceneSet
from kinetok.pipelines.data.token_videos import called


def test_scenes_are_asked_what_is_true_of_them() -> None:
    drawn = SceneSet(count=24, seed=3, frames=2, size=32, fps=8)
    for number, (asked, facts) in enumerate(of_scenes(drawn, shard_videos=10)):
        assert asked.video == facts.video == f"scenes-{number // 10:06d}/{number:06d}"
        caption = drawn.scene(number).caption
        for shape in facts.shapes:
            assert f"{shape.colour} {shape.shape} {shape.motion}" in caption
        for question in asked.questions:
            assert question.options == OPTIONS[question.about] and question.answer in question.options  # type: ignore[index]
            meant = [shape for shape in facts.shapes if shape.answers[question.about] == question.answer]  # type: ignore[index]
            named = [shape for shape in facts.shapes if shape.colour in question.question or shape.shape in question.question]
            assert len(facts.shapes) == 1 or len([shape for shape in named if shape in meant]) == 1, question


def test_questions_about_one_shape_do_not_give_it_away() -> None:
    drawn = SceneSet(count=6, seed=0, frames=2, size=32, fps=8, most=1)
    texts = {question.question for asked, _ in of_scenes(drawn, shard_videos=16) for question in asked.questions}
    assert texts == {"What colour is the shape?", "What is the shape?", "Which way does the shape move?"}


def test_a_background_of_one_colour_is_asked_for() -> None:
    drawn = SceneSet(count=6, seed=0, frames=2, size=32, fps=8, most=1, plain=True)
    for number, (asked, _) in enumerate(of_scenes(drawn, shard_videos=16)):
        (question,) = (question for question in asked.questions if question.about == "background")
        assert drawn.scene(number).caption.endswith(f"on plain {question.answer}") and question.answer in question.options


@pytest.mark.parametrize(
    "line",
    [
        {"video": "v", "question": "Q?", "answer": "A"},
        {"image": "v", "questions": ["Q?"], "answers": ["A"]},
        {"video": "v", "data": ["Q?", "A"]},
        {"video": "v", "questions": [{"question": "Q?", "answer": "A"}]},
    ],
)
def test_every_form_of_a_question_is_read(line: dict[str, object]) -> None:
    assert parse(json.dumps(line), "f") == ([Questions(video="v", questions=(Question(question="Q?", answer="A"),))], [])


@pytest.mark.parametrize(
    "line",
    [
        {"question": "Q?", "answer": "a", "options": ["a", "b"], "about": "k"},
        {"questions": ["Q?"], "answers": ["a"], "options": [["a", "b"]], "about": ["k"]},
        {"data": ["Q?", "a"], "options": [["a", "b"]], "about": "k"},
        {"questions": [{"question": "Q?", "answer": "a", "options": ["a", "b"], "about": "k"}]},
        {"questions": [{"question": "Q?", "answer": "a", "about": "k"}], "options": ["a", "b"], "about": "other"},
    ],
)
def test_options_and_kind_are_kept_in_every_form(line: dict[str, object]) -> None:
    expected = Question(question="Q?", answer="a", options=("a", "b"), about="k")
    assert parse(json.dumps({"video": "v", **line}), "f") == ([Questions(video="v", questions=(expected,))], [])


def test_each_of_several_questions_has_its_own_options() -> None:
    line = {"video": "v", "questions": ["Q?", "R?"], "answers": ["a", "free"], "options": [["a", "b"], []], "about": ["k", "l"]}
    ((found,), _) = parse(json.dumps(line), "f")
    assert [(asked.options, asked.about) for asked in found.questions] == [(("a", "b"), "k"), ((), "l")]


def test_lines_may_name_the_files_of_videos() -> None:
    """Their ending goes, but where it tells two videos apart, or where nothing is known by the rest."""
    ids = pa.chunked_array([["a/one/0", "twin.mp4/0", "twin.webm/0", "2.5/0"]])
    names = ["a/one.mp4", "a/one", "one.JPG", "twin.webm", "2.5"]
    lines = [Questions(video=name, questions=(Question(question="Q?", answer="A"),)) for name in names]
    story = Story(request="Tell.", clips=("a/one.mp4", "2.5/0"), texts=("A.", "B."))
    questions, (told,) = called(lines, [story], ids)
    assert [line.video for line in questions] == ["a/one", "a/one", "one.JPG", "twin.webm", "2.5"]
    assert told.clips == ("a/one", "2.5/0")


def test_the_example_file_is_sound() -> None:
    questions, stories = parse((EMBEDDED.parent / "questions.jsonl").read_text(), "questions.jsonl")
    assert len(questions) == 5 and stories[0] == Story(
        request="Tell a short story of two astronauts.",
        clips=("100185", "100186"),
        texts=("A shuttle turns above the earth.", "Later, astronauts work at the lunar module on the moon."),
    )
    videos = {path.stem for path in Path(EMBEDDED.parent, "clips").iterdir()}
    assert {line.video for line in questions} | set(stories[0].clips) <= videos


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "f holds no lines"),
        ("{", "f, line 1: "),
        ('{"video": "v", "question": "Q?", "answer": "A"}\n{"video": "v"}', "f, line 2: "),
        ('{"video": "v", "questions": ["Q?", "R?"], "answers": ["A"]}', "f, line 1: 2 questions have 1 answers"),
        ('{"request": "R", "clips": ["a", "b"], "texts": ["x"]}', "f, line 1: 2 clips have 1 texts"),
        ('{"question": "Q?", "answer": "A"}', "f, line 1: "),
        ('{"image": "v", "caption": "A toy pig."}', "f, line 1: a caption is neither question nor story: captions come with"),
        ("3", "f, line 1: "),
        (
            '{"video": "v", "question": "Q?", "answer": "A", "options": ["a", "b"]}',
            r"f, line 1: the answer 'A' to 'Q\?' is none of its options 'a', 'b': write it as one of them",
        ),
        ('{"video": "v", "question": "Q?", "answer": "a", "options": ["a", "a"]}', r"f, line 1: the options of 'Q\?' name one twice"),
        (
            '{"video": "v", "questions": ["Q?", "R?"], "answers": ["a", "b"], "options": ["a", "b"]}',
            "f, line 1: 2 questions have 1 lists of options: give one for each",
        ),
        ('{"video": "v", "questions": ["Q?", "R?"], "answers": ["a", "b"], "about": ["k"]}', "f, line 1: 2 questions are about 1 things"),
    ],
)
def test_what_is_none_of_them_is_refused_by_its_line(text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        parse(text, "f")
