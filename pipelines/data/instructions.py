"""What a language model is asked of clips, and what is true of them: lines of `questions.jsonl`, `stories.jsonl` and `facts.jsonl`.

Lines come from a file of the user's, in the forms that data sets of instructions have (`parse`), or from the facts of drawn scenes, where
every answer is exact (`of_scenes`). A line names its video as token shards do (`pipelines/data/token_videos.py`). Not covered: which lines
a model learns from (`language_feed.py`), how it is scored (`stages/understand.py`), and lines {video or image, caption}: captions come with
the clips (`csv` of `ingest`, or the txt or json of a tar's sample), where captioning and generation both learn from them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import Field, ValidationError

from kinetok.infra.artifact import Artifact
from kinetok.infra.config import Config
from kinetok.infra.errors import DataError
from kinetok.pipelines.data.scenes import COLOURS, MOTIONS, SHAPES, SceneSet, Shape

QUESTIONS, STORIES, FACTS = "questions.jsonl", "stories.jsonl", "facts.jsonl"

Text: TypeAlias = Annotated[str, Field(min_length=1)]
Factor: TypeAlias = Literal["background", "colour", "shape", "motion"]
DIRECTIONS = dict(zip(MOTIONS, ("to the right", "to the left", "down", "up", "in circles", "in bounces"), strict=True))
"""What answers say of each way to move."""
OPTIONS: dict[Factor, tuple[str, ...]] = {
    "background": tuple(name for name, _ in COLOURS),
    "colour": tuple(name for name, _ in COLOURS),
    "shape": SHAPES,
    "motion": tuple(DIRECTIONS.values()),
}


class Question(Config):
    """A question about a video with its answer."""

    question: Text
    answer: Text
    options: tuple[Text, ...] = ()
    """What may be answered; empty where the answer is free."""
    about: str = ""
    """Kind of question, where it is known: figures are told by kind."""


class Questions(Config):
    """One line of `questions.jsonl`."""

    video: Text
    questions: Annotated[tuple[Question, ...], Field(min_length=1)]


class Story(Config):
    """One line of `stories.jsonl`: a request, and a text for each clip."""

    request: Text
    clips: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Names of videos, of each of which one clip is taken."""
    texts: tuple[Text, ...]


class Fact(Config):
    """What is true of one shape of a drawn scene."""

    colour: str
    shape: str
    motion: str
    turning: bool
    background: str = ""
    """The colour behind it, where that is one."""

    @property
    def answers(self) -> dict[Factor, str]:
        """As questions are answered."""
        behind: dict[Factor, str] = {"background": self.background} if self.background else {}
        return {**behind, "colour": self.colour, "shape": self.shape, "motion": DIRECTIONS[self.motion]}


class Facts(Config):
    """One line of `facts.jsonl`."""

    video: Text
    shapes: tuple[Fact, ...]


Line = TypeVar("Line", Questions, Story, Facts)


def fact_of(shape: Shape) -> Fact:
    """A shape's facts as lines hold them."""
    return Fact(**asdict(shape))


def read_lines(artifact: Artifact, name: str, kind: type[Line]) -> list[Line]:
    """The lines of one file of an `instructions` artifact."""
    return [kind.model_validate_json(line) for line in artifact.folder.read_text(name).splitlines()]


def questions_of(artifact: Artifact) -> dict[str, tuple[Question, ...]]:
    """The questions about every video of an `instructions` artifact, of all its lines, in their order."""
    found: dict[str, tuple[Question, ...]] = {}
    for line in read_lines(artifact, QUESTIONS, Questions):
        found[line.video] = (*found.get(line.video, ()), *line.questions)
    return found


def of_scenes(drawn: SceneSet, *, shard_videos: int) -> Iterator[tuple[Questions, Facts]]:
    """Questions and facts of every scene that `write_scenes` packs into tars of `shard_videos`."""
    for number in range(drawn.count):
        shapes = drawn.scene(number, frames=1).shapes
        video = f"scenes-{number // shard_videos:06d}/{number:06d}"
        facts = Facts(video=video, shapes=tuple(map(fact_of, shapes)))
        yield Questions(video=video, questions=tuple(_asked(shapes, drawn.motions))), facts


def _asked(shapes: Sequence[Shape], motions: Sequence[str]) -> Iterator[Question]:
    """What can be asked without doubt which shape is meant: colours differ, kinds of shape may not."""
    kinds = [shape.shape for shape in shapes]
    options: dict[Factor, tuple[str, ...]] = {**OPTIONS, "motion": tuple(DIRECTIONS[motion] for motion in motions)}
    if behind := shapes[0].background:
        yield Question(question="What colour is the background?", answer=behind, options=OPTIONS["background"], about="background")
    for shape in shapes:
        answers = fact_of(shape).answers
        called = "shape" if len(shapes) == 1 else f"{shape.colour} shape"
        texts: dict[Factor, str] = {"shape": f"What is the {called}?", "motion": f"Which way does the {called} move?"}
        if kinds.count(shape.shape) == 1:
            texts["colour"] = f"What colour is the {'shape' if len(shapes) == 1 else shape.shape}?"
        for factor, text in texts.items():
            yield Question(question=text, answer=answers[factor], options=options[factor], about=factor)


def parse(text: str, where: str) -> tuple[list[Questions], list[Story]]:
    """The lines of a user's file: each a `Story`, a `Questions`, or a data set's own form.

    Known are {video or image, question or questions, answer or answers}, and {video or image, data: [question, answer, ...]}, either with
    `options` (a list for each question; of one question it may stand by itself) and `about` (one for all, or a list). Raises DataError
    with the number of the first line that is none of them, or whose answer is not among its options.
    """
    questions: list[Questions] = []
    stories: list[Story] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            given = json.loads(line)
            if "request" in given:
                stories.append(_same_length(Story.model_validate(given)))
            else:
                questions.append(_answerable(Questions.model_validate(_plain(given))))
        except (ValidationError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{where}, line {number}: {error}; a line is {{video, questions, answers}}, with options where there are any, or "
                "{request, clips, texts}"
            ) from error
    if not questions and not stories:
        raise DataError(f"{where} holds no lines")
    return questions, stories


def _plain(given: dict[str, Any]) -> dict[str, object]:
    """A data set's line as fields of `Questions`."""
    video = given.get("video", given.get("image"))
    if isinstance(data := given.get("data"), list):
        asked, said = data[::2], data[1::2]
    else:
        asked, said = (_listed(given.get(name, given.get(f"{name}s"))) for name in ("question", "answer"))
    if not asked and "caption" in given:
        raise ValueError("a caption is neither question nor story: captions come with the clips, by csv or in the txt or json of a sample")
    if not (asked and isinstance(asked[0], dict)):
        if len(asked) != len(said):
            raise ValueError(f"{len(asked)} questions have {len(said)} answers")
        asked = [{"question": text, "answer": reply} for text, reply in zip(asked, said, strict=True)]
    each = zip(asked, _options(given, len(asked)), _about(given, len(asked)), strict=True)
    # What a question says of itself goes before what its line says.
    return {"video": video, "questions": [{"options": options, "about": about, **question} for question, options, about in each]}


def _options(given: dict[str, Any], count: int) -> list[object]:
    """What may be answered to each of a line's questions."""
    options = _listed(given.get("options"))
    each = options if any(isinstance(item, list) for item in options) else [options] * (1 if options else count)
    if len(each) != count:
        raise ValueError(f"{count} questions have {len(each)} lists of options: give one for each question, [] where its answer is free")
    return each


def _about(given: dict[str, Any], count: int) -> list[object]:
    """The kind of each of a line's questions."""
    about = given.get("about", "")
    each = about if isinstance(about, list) else [about] * count
    if len(each) != count:
        raise ValueError(f"{count} questions are about {len(each)} things: name one for each, or one for all")
    return each


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _same_length(story: Story) -> Story:
    if len(story.texts) != len(story.clips):
        raise ValueError(f"{len(story.clips)} clips have {len(story.texts)} texts")
    return story


def _answerable(line: Questions) -> Questions:
    for asked in line.questions:
        if len(set(asked.options)) < len(asked.options):
            raise ValueError(f"the options of {asked.question!r} name one twice: leave the second out, or chance is another than it seems")
        if asked.options and asked.answer not in asked.options:
            raise ValueError(
                f"the answer {asked.answer!r} to {asked.question!r} is none of its options {', '.join(map(repr, asked.options))}: write "
                "it as one of them, word for word"
            )
    return line
