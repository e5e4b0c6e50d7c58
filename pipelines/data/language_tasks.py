"""What a language model of clips is trained to do, and the samples of each task: sequences out of token shards, captions and instructions.

A sample is addressed by its number in the task's own endless order (`order.py` over videos), and what is random about it comes from its
seed. Samples are sorted by length inside windows, so that a batch of neighbours has little padding. Not covered: which task a batch is of
(`language_feed.py`), the sequences themselves (`kinetok.llm.divot.sequences`).
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StrictInt
from torch import Tensor

from kinetok.infra.artifact import Artifact
from kinetok.infra.config import Config
from kinetok.llm.divot.collate import bucketed
from kinetok.llm.divot.sequences import REQUESTS, Packed, answer, depict, describe, follow, narrate
from kinetok.llm.divot.vocabulary import Vocabulary
from kinetok.pipelines.data.instructions import STORIES, Story, questions_of, read_lines
from kinetok.pipelines.data.order import Order
from kinetok.pipelines.data.token_shards import SHARDS_HELD
from kinetok.pipelines.data.token_videos import TokenVideos

DESCRIBE = "Describe what happens."
"""What an instruction-tuned model is asked for a caption by."""
TELL = "Tell a story that begins like this: {caption}"
"""The request of stories that are put together from clips."""
WINDOW_GROUPS = 16
"""Groups of samples that are sorted by length together."""
ORDERS_HELD = 4

Count = Annotated[StrictInt, Field(ge=1)]


class Task(Config):
    """What the tasks share."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the batches, against the other tasks' weights."""
    source: Annotated[StrictInt, Field(ge=0)] = 0
    """Whose clips: a place in `tokens`."""
    limit: Annotated[StrictInt, Field(ge=16)] = 2048
    """Positions of the longest sequence; text is cut to it."""


class Captioning(Task):
    """Clips are read, their caption is learned; `instructed` as the answer to a request."""

    kind: Literal["captioning"] = "captioning"
    clips: Count = 20
    """Most clips of a video that are read together, evenly chosen."""
    instructed: bool = False


class Generation(Task):
    """A caption is read, a clip is learned; `instructed` as the answer to a request, in one of several wordings."""

    kind: Literal["generation"] = "generation"
    instructed: bool = False


class Answering(Task):
    """Clips and questions are read, answers are learned; the questions come from `instructions`."""

    kind: Literal["answering"] = "answering"
    clips: Count = 20
    """Most clips of a video that are read together, evenly chosen."""
    turns: Count | None = None
    """Most questions of one sample, drawn anew each time; None asks all, in a drawn order. As published, an end is learned after the last
    answer alone: a small model that always saw several does not stop after the first."""


class Storytelling(Task):
    """Texts and clips in turn are learned: the stories of `instructions`, or where it has none, `clips` videos of the source in a row."""

    kind: Literal["storytelling"] = "storytelling"
    clips: Count = 3


AnyTask: TypeAlias = Annotated[Captioning | Generation | Answering | Storytelling, Field(discriminator="kind")]
OneTask = TypeVar("OneTask", bound=Task)


class Samples(ABC, Generic[OneTask]):
    """The samples of one task in endless seeded order."""

    def __init__(self, task: OneTask, videos: TokenVideos, vocabulary: Vocabulary, *, seed: int, group: int) -> None:
        """`group` neighbours of the order have about one length."""
        self.task, self.videos, self.vocabulary = task, videos, vocabulary
        self.seed, self.group = seed, group
        self.units = self.find_units()
        self.order = Order(tuple(map(len, self.units)), seed=seed, window=SHARDS_HELD)
        self._sorted: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.order)

    def __call__(self, number: int, seed: int) -> Packed:
        """Sample `number` of the order; `seed` decides what is drawn for it."""
        window, place = divmod(number, WINDOW_GROUPS * self.group)
        place = int(self._by_length(window)[place])
        return self.pack(window * WINDOW_GROUPS * self.group + place, np.random.default_rng(seed))

    def find_units(self) -> Sequence[NDArray[np.int64]]:
        """What the order runs over, in groups that lie together: the videos."""
        return self.videos.by_shard(np.arange(len(self.videos)))

    @abstractmethod
    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        """The sequence of sample `number` before samples are sorted."""

    @abstractmethod
    def length(self, number: int) -> int:
        """About how long it is; only comparisons count."""

    def unit(self, number: int) -> int:
        """What stands at place `number` of the order."""
        group, index = self.order.at(np.array([number]))[0]
        return int(self.units[group][index])

    def clip_length(self, unit: int, most: int) -> int:
        """Positions of a video's clips."""
        return min(most, len(self.videos.rows(unit))) * (self.videos.clip_tokens + 2)

    def _by_length(self, window: int) -> NDArray[np.int64]:
        """The places of one window in the order they are taken in."""
        if window not in self._sorted:
            size = WINDOW_GROUPS * self.group
            lengths = np.array([self.length(number) for number in range(window * size, (window + 1) * size)])
            self._sorted[window] = bucketed(lengths, batch=self.group, window=WINDOW_GROUPS, seed=(self.seed + window) % 2**63)
            if len(self._sorted) > ORDERS_HELD:
                self._sorted.popitem(last=False)
        return self._sorted[window]


class CaptionSamples(Samples[Captioning]):
    """Of `Captioning`."""

    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        unit, limit, media = self.unit(number), self.task.limit, self.videos.media
        clips_CND, caption = self.videos.clips(unit, self.task.clips, float(rng.random())), self.videos.caption(unit)
        if self.task.instructed:
            return answer(self.vocabulary, clips_CND, [(DESCRIBE, caption)], limit=limit, media=media)
        return describe(self.vocabulary, clips_CND, caption, limit=limit, media=media)

    def length(self, number: int) -> int:
        unit = self.unit(number)
        return self.clip_length(unit, self.task.clips) + len(self.videos.caption(unit))


class GenerationSamples(Samples[Generation]):
    """Of `Generation`: one clip of the video."""

    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        unit, limit, media = self.unit(number), self.task.limit, self.videos.media
        clip_1ND, caption = self.videos.clips(unit, 1, float(rng.random())), self.videos.caption(unit)
        if self.task.instructed:
            phrase = int(rng.integers(len(REQUESTS[media])))
            return follow(self.vocabulary, caption, clip_1ND, limit=limit, phrase=phrase, media=media)
        return depict(self.vocabulary, caption, clip_1ND, limit=limit, media=media)

    def length(self, number: int) -> int:
        return len(self.videos.caption(self.unit(number)))


class AnswerSamples(Samples[Answering]):
    """Of `Answering`: the videos that questions are asked about."""

    def __init__(
        self, task: Answering, videos: TokenVideos, vocabulary: Vocabulary, instructions: Artifact, *, seed: int, group: int
    ) -> None:
        self.questions = questions_of(instructions)
        super().__init__(task, videos, vocabulary, seed=seed, group=group)

    def find_units(self) -> Sequence[NDArray[np.int64]]:
        return self.videos.by_shard(np.flatnonzero([name in self.questions for name in self.videos.names]))

    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        unit = self.unit(number)
        asked = self.questions[self.videos.names[unit]]
        clips_CND = self.videos.clips(unit, self.task.clips, float(rng.random()))
        chosen = (asked[place] for place in rng.permutation(len(asked))[: self.task.turns])
        turns = [(turn.question, turn.answer) for turn in chosen]
        return answer(self.vocabulary, clips_CND, turns, limit=self.task.limit, media=self.videos.media)

    def length(self, number: int) -> int:
        unit = self.unit(number)
        asked = self.questions[self.videos.names[unit]]
        text = sum(len(turn.question) + len(turn.answer) for turn in asked)
        return self.clip_length(unit, self.task.clips) + text * min(self.task.turns or len(asked), len(asked)) // len(asked)


class StorySamples(Samples[Storytelling]):
    """Of `Storytelling`, where somebody wrote the stories."""

    def __init__(
        self, task: Storytelling, videos: TokenVideos, vocabulary: Vocabulary, instructions: Artifact, *, seed: int, group: int
    ) -> None:
        self.place = {name: unit for unit, name in enumerate(videos.names)}
        here = self.place.keys()
        self.stories = [story for story in read_lines(instructions, STORIES, Story) if here >= set(story.clips)]
        super().__init__(task, videos, vocabulary, seed=seed, group=group)

    def find_units(self) -> Sequence[NDArray[np.int64]]:
        return [np.arange(len(self.stories))]

    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        story = self.stories[self.unit(number)]
        clips = [self.videos.clips(self.place[name], 1, float(rng.random())) for name in story.clips]
        return narrate(self.vocabulary, story.request, list(zip(story.texts, clips, strict=True)), limit=self.task.limit)

    def length(self, number: int) -> int:
        story = self.stories[self.unit(number)]
        return len(story.clips) * (self.videos.clip_tokens + 4) + sum(map(len, story.texts))


class ComposedSamples(Samples[Storytelling]):
    """Of `Storytelling`, where nobody did: the captions of videos in a row are the texts, the first of them the request."""

    def __len__(self) -> int:
        return len(self.order) // self.task.clips

    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        parts: list[tuple[str, Tensor]] = []
        for unit in self._videos(number):
            parts.append((self.videos.caption(unit), self.videos.clips(unit, 1, float(rng.random()))))
        return narrate(self.vocabulary, TELL.format(caption=parts[0][0]), parts, limit=self.task.limit)

    def length(self, number: int) -> int:
        return sum(len(self.videos.caption(unit)) for unit in self._videos(number))

    def _videos(self, number: int) -> list[int]:
        return [self.unit(number * self.task.clips + place) for place in range(self.task.clips)]


def open_samples(
    task: AnyTask, videos: TokenVideos, vocabulary: Vocabulary, instructions: Artifact | None, *, seed: int, group: int
) -> "Samples[Captioning] | Samples[Generation] | Samples[Answering] | Samples[Storytelling]":
    """The samples of `task`; of `Answering`, `instructions` must be there."""
    if isinstance(task, Captioning):
        return CaptionSamples(task, videos, vocabulary, seed=seed, group=group)
    if isinstance(task, Generation):
        return GenerationSamples(task, videos, vocabulary, seed=seed, group=group)
    if isinstance(task, Answering):
        assert instructions is not None, "the stage refuses answering without instructions"
        return AnswerSamples(task, videos, vocabulary, instructions, seed=seed, group=group)
    if instructions is not None and instructions.record.metrics.get("stories"):
        return StorySamples(task, videos, vocabulary, instructions, seed=seed, group=group)
    return ComposedSamples(task, videos, vocabulary, seed=seed, group=group)
