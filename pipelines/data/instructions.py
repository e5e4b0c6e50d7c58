"""What a language model is asked of clips, and what is true of them: lines of `questions.jsonl`, `stories.jsonl` and `facts.jsonl`.

Lines come from a file of the user's, in the forms that data sets of instructions have (`parse`), or from the facts of drawn scenes, where
every answer is exact (`of_scenes`). A line names its video as token shards do (`pipelines/data/token_videos.py`). Not covered: which lines
a model learns from (`language_feed.py`), and how it is scored (`stages/understand.py`).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Literal, TypeAlias, TypeVar

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


def of_scenes(drawn: SceneSet, *, shard_videos: int) -> Iterator[tuple[Questions, Facts]]:
    """Questions and facts of every scene that `write_scenes` packs into tars of `shard_videos`."""
    for number in range(drawn.count):
        shapes = drawn.scene(number, frames=1).shapes
        video = f"scenes-{number // shard_videos:06d}/{number:06d}"
        facts = Facts(video=video, shapes=tuple(map(fact_of, shapes)))
        yield Questions(video=video, questions=tuple(_asked(shapes))), facts


def _asked(shapes: Sequence[Shape]) -> Iterator[Question]:
    """What can be asked without doubt which shape is meant: colours differ, kinds of shape may not."""
    kinds = [shape.shape for shape in shapes]
    if behind := shapes[0].background:
        yield Question(question="What colour is the background?", answer=behind, options=OPTIONS["background"], about="background")
    for shape in shapes:
        answers = fact_of(shape).answers
        called = "shape" if len(shapes) == 1 else f"{shape.colour} shape"
        texts: dict[Factor, str] = {"shape": f"What is the {called}?", "motion": f"Which way does the {called} move?"}
        if kinds.count(shape.shape) == 1:
            texts["colour"] = f"What colour is the {'shape' if len(shapes) == 1 else shape.shape}?"
        for factor, text in texts.items():
            yield Question(question=text, answer=answers[factor], options=OPTIONS[factor], about=factor)


def parse(text: str, where: str) -> tuple[list[Questions], list[Story]]:
    """The lines of a user's file: each a `Story`, a `Questions`, or a data set's own form.

    Known are {video or image, question or questions, answer or answers}, and {video or image, data: [question, answer, ...]}. Raises
    DataError with the number of the first line that is none of them.
    """
    questions: list[Questions] = []
    stories: list[Story] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            given = json.loads(line)
            if "request" in given:
                stories.append(_same_length(Story.model_validate(given)))
            else:
                questions.append(Questions.model_validate(_plain(given)))
        except (ValidationError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{where}, line {number}: {error}; a line is {{video, questions, answers}} or {{request, clips, texts}}"
            ) from error
    if not questions and not stories:
        raise DataError(f"{where} holds no lines")
    return questions, stories


def _plain(given: dict[str, object]) -> dict[str, object]:
    """A data set's line as fields of `Questions`."""
    video = given.get("video", given.get("image"))
    if isinstance(data := given.get("data"), list):
        asked, said = data[::2], data[1::2]
    else:
        asked, said = (_listed(given.get(name, given.get(f"{name}s"))) for name in ("question", "answer"))
    if asked and isinstance(asked[0], dict):
        return {"video": video, "questions": asked}
    if len(asked) != len(said):
        raise ValueError(f"{len(asked)} questions have {len(said)} answers")
    return {"video": video, "questions": [{"question": text, "answer": reply} for text, reply in zip(asked, said, strict=True)]}


def _listed(value: object) -> list[object]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _same_length(story: Story) -> Story:
    if len(story.texts) != len(story.clips):
        raise ValueError(f"{len(story.clips)} clips have {len(story.texts)} texts")
    return story
