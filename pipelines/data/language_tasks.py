"""What a language model of clips is trained to do, and the samples of each task: sequences out of token shards, captions and instructions.

A sample is addressed by its number in the task's own endless order (`order.py` over videos, conversations or stories), and what is random
about it comes from its seed. Samples are sorted by length inside windows, so that a batch of neighbours has little padding. Windows and
groups end with the epoch, so that no group holds a sample twice: what is left over of an epoch, less than a group, is left out of it,
another part in each. Not covered: which task a batch is of (`language_feed.py`), the sequences themselves (`kinetok.llm.divot.sequences`).
"""

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StrictInt
from torch import Tensor

from kinetok.infra.artifact import Artifact
from kinetok.infra.config import Config
from kinetok.infra.errors import ConfigError
from kinetok.llm.divot.collate import bucketed
from kinetok.llm.divot.sequences import REQUESTS, Packed, answer, depict, describe, follow, narrate
from kinetok.llm.divot.vocabulary import Vocabulary
from kinetok.pipelines.data.instructions import QUESTIONS, STORIES, Questions, Story, read_lines
from kinetok.pipelines.data.order import Order, sample_seed
from kinetok.pipelines.data.token_shards import SHARDS_HELD
from kinetok.pipelines.data.token_videos import TokenVideos

DESCRIBE = "Describe what happens."
"""What an instruction-tuned model is asked for a caption by."""
TELL = "Tell a story that begins like this: {caption}"
"""The request of stories that are put together from clips."""
WINDOW_GROUPS = 16
"""Groups of samples that are sorted by length together."""
ORDERS_HELD = 4
ROOM = 32
"""Positions that must be left for text beside the most clips that a sample can have."""

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
    """Most questions of one sample, which is a line of the file; None asks all. A conversation keeps its order: of more questions, so many
    in a row are taken, from another one on each time. As published, an end is learned after the last answer alone: a small model that
    always saw several does not stop after the first."""


class Storytelling(Task):
    """Texts and clips in turn are learned: the stories of `instructions`, or where it has none, such as are put together of `clips` clips
    of the source."""

    kind: Literal["storytelling"] = "storytelling"
    clips: Count = 3
    of: Literal["videos", "windows"] = "videos"
    """What is put together where nobody wrote the stories: a clip each of videos that follow each other, or `windows` of one video in a
    row, of videos that have so many."""
    reread: bool = False
    """Each clip is shown again after it was made, and the story goes on from what it shows. As published it does not: queries are the same
    whatever is drawn of them, so that the rest of a story knows the texts before it, and of the clips nothing else."""


AnyTask: TypeAlias = Annotated[Captioning | Generation | Answering | Storytelling, Field(discriminator="kind")]
OneTask = TypeVar("OneTask", bound=Task)


def task_names(tasks: Sequence[AnyTask]) -> tuple[str, ...]:
    """What figures of each are called: its kind, and where that occurs several times its place too."""
    kinds = Counter(task.kind for task in tasks)
    return tuple(task.kind if kinds[task.kind] == 1 else f"{task.kind}{number}" for number, task in enumerate(tasks))


class Samples(ABC, Generic[OneTask]):
    """The samples of one task in endless seeded order."""

    def __init__(self, task: OneTask, videos: TokenVideos, vocabulary: Vocabulary, *, seed: int, group: int, once: bool = False) -> None:
        """`group` neighbours have about one length, and are of one epoch where an epoch has so many. `once`: nothing of it is left out."""
        self.task, self.videos, self.vocabulary = task, videos, vocabulary
        self.seed, self.group = seed, group
        self.units = self.find_units()
        self.order = Order(tuple(map(len, self.units)), seed=seed, window=SHARDS_HELD)
        self.epoch = len(self) if once or len(self) < group else len(self) // group * group
        self._sorted: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        """Samples there are."""
        return len(self.order) // self.stride

    def __call__(self, number: int, seed: int) -> Packed:
        """Sample `number` of the order; `seed` decides what is drawn for it."""
        epoch, place = divmod(number, self.epoch)
        window, at = divmod(place, WINDOW_GROUPS * self.group)
        place = window * WINDOW_GROUPS * self.group + int(self._by_length(epoch, window)[at])
        return self.pack(self._first(epoch, place), np.random.default_rng(seed))

    @property
    def stride(self) -> int:
        """Units of the order that one sample is made of."""
        return 1

    def find_units(self) -> Sequence[NDArray[np.int64]]:
        """What the order runs over, in groups that lie together: the videos."""
        return self.videos.by_shard(np.arange(len(self.videos)))

    @abstractmethod
    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        """The sequence of the sample whose first unit stands at place `number` of the order."""

    @abstractmethod
    def length(self, number: int) -> int:
        """About how long it is; only comparisons count."""

    def unit(self, number: int) -> int:
        """What stands at place `number` of the order."""
        group, index = self.order.one(number)
        return int(self.units[group][index])

    def clip_length(self, unit: int, most: int) -> int:
        """Positions of a video's clips."""
        return min(most, len(self.videos.rows(unit))) * (self.videos.clip_tokens + 2)

    def _first(self, epoch: int, place: int) -> int:
        """Where in the order the first unit of sample `place` of an epoch stands."""
        return epoch * len(self.order) + place * self.stride

    def _by_length(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The places of one window of an epoch, from its first on, in the order they are taken in."""
        first = self._first(epoch, window * WINDOW_GROUPS * self.group)
        if first not in self._sorted:
            size = min(WINDOW_GROUPS * self.group, self.epoch - window * WINDOW_GROUPS * self.group)
            lengths = np.array([self.length(first + place * self.stride) for place in range(size)])
            self._sorted[first] = bucketed(lengths, batch=self.group, window=WINDOW_GROUPS, seed=sample_seed(self.seed, first))
            if len(self._sorted) > ORDERS_HELD:
                self._sorted.popitem(last=False)
        return self._sorted[first]


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
    """Of `Answering`: conversations about videos, one a line, in the order of the videos."""

    def __init__(
        self, task: Answering, videos: TokenVideos, vocabulary: Vocabulary, instructions: Artifact, *, seed: int, group: int, once: bool
    ) -> None:
        place = {name: video for video, name in enumerate(videos.names)}
        lines = (line for line in read_lines(instructions, QUESTIONS, Questions) if line.video in place)
        self.asked = sorted(((place[line.video], line.questions) for line in lines), key=lambda about: about[0])
        super().__init__(task, videos, vocabulary, seed=seed, group=group, once=once)

    def find_units(self) -> Sequence[NDArray[np.int64]]:
        return self.videos.by_shard(np.array([video for video, _ in self.asked], np.int64))

    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        video, asked = self.asked[self.unit(number)]
        clips_CND = self.videos.clips(video, self.task.clips, float(rng.random()))
        most = min(self.task.turns or len(asked), len(asked))
        first = int(rng.integers(len(asked) - most + 1))
        turns = [(turn.question, turn.answer) for turn in asked[first : first + most]]
        return answer(self.vocabulary, clips_CND, turns, limit=self.task.limit, media=self.videos.media)

    def length(self, number: int) -> int:
        video, asked = self.asked[self.unit(number)]
        text = sum(len(turn.question) + len(turn.answer) for turn in asked)
        return self.clip_length(video, self.task.clips) + text * min(self.task.turns or len(asked), len(asked)) // len(asked)


class StorySamples(Samples[Storytelling]):
    """Of `Storytelling`, where somebody wrote the stories: those whose clips are all of this split."""

    def __init__(
        self, task: Storytelling, videos: TokenVideos, vocabulary: Vocabulary, instructions: Artifact, *, seed: int, group: int, once: bool
    ) -> None:
        stories = read_lines(instructions, STORIES, Story)
        self.rows = videos.find({name for story in stories for name in story.clips})
        self.stories = [story for story in stories if self.rows.keys() >= set(story.clips)]
        super().__init__(task, videos, vocabulary, seed=seed, group=group, once=once)

    def find_units(self) -> Sequence[NDArray[np.int64]]:
        return [np.arange(len(self.stories))]

    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        story = self.stories[self.unit(number)]
        clips = [self.videos.clips_of(self.rows[name], 1, float(rng.random())) for name in story.clips]
        parts = list(zip(story.texts, clips, strict=True))
        return narrate(self.vocabulary, story.request, parts, limit=self.task.limit, reread=self.task.reread)

    def length(self, number: int) -> int:
        story = self.stories[self.unit(number)]
        return len(story.clips) * (self.videos.clip_tokens + 4) + sum(map(len, story.texts))


class ComposedSamples(Samples[Storytelling]):
    """Of `Storytelling`, where nobody did: the captions of videos in a row are the texts, the first of them the request."""

    @property
    def stride(self) -> int:
        return self.task.clips

    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        parts: list[tuple[str, Tensor]] = []
        for unit in self._videos(number):
            parts.append((self.videos.caption(unit), self.videos.clips(unit, 1, float(rng.random()))))
        return narrate(self.vocabulary, TELL.format(caption=parts[0][0]), parts, limit=self.task.limit, reread=self.task.reread)

    def length(self, number: int) -> int:
        return sum(len(self.videos.caption(unit)) for unit in self._videos(number))

    def _videos(self, number: int) -> list[int]:
        return [self.unit(number + place) for place in range(self.task.clips)]


class WindowSamples(Samples[Storytelling]):
    """Of `Storytelling` of windows: clips in a row of one video, from a drawn one on, each with its caption where that is another one than
    before."""

    def find_units(self) -> Sequence[NDArray[np.int64]]:
        self.clip_counts = self.videos.clip_counts
        long = np.flatnonzero(self.clip_counts >= self.task.clips)
        return [long[group] for group in self.videos.by_shard(long)]

    def pack(self, number: int, rng: np.random.Generator) -> Packed:
        video, each = self.unit(number), self.videos.sample_clips
        rows, first = self.videos.rows(video), int(rng.integers(self.clip_counts[video] - self.task.clips + 1))
        parts: list[tuple[str, Tensor]] = []
        told = ""
        for place in range(first, first + self.task.clips):
            row, window = int(rows[place // each]), place % each
            caption = self.videos.caption_of(row)
            parts.append(("" if caption == told else caption, self.videos.windows(row)[[window]]))
            told = caption
        request = TELL.format(caption=self.videos.caption_of(int(rows[first // each])))
        return narrate(self.vocabulary, request, parts, limit=self.task.limit, reread=self.task.reread)

    def length(self, number: int) -> int:
        return len(self.videos.caption(self.unit(number)))


AnySamples: TypeAlias = Samples[Captioning] | Samples[Generation] | Samples[Answering] | Samples[Storytelling]


def open_samples(
    task: AnyTask, videos: TokenVideos, vocabulary: Vocabulary, instructions: Artifact | None, *, seed: int, group: int, once: bool
) -> AnySamples:
    """The samples of `task`; of `Answering`, `instructions` must be there. ConfigError where its clips leave no room for text."""
    require_room(task, videos)
    if isinstance(task, Captioning):
        return CaptionSamples(task, videos, vocabulary, seed=seed, group=group, once=once)
    if isinstance(task, Generation):
        return GenerationSamples(task, videos, vocabulary, seed=seed, group=group, once=once)
    if isinstance(task, Answering):
        assert instructions is not None, "the stage refuses answering without instructions"
        return AnswerSamples(task, videos, vocabulary, instructions, seed=seed, group=group, once=once)
    if instructions is not None and instructions.record.metrics.get("stories"):
        return StorySamples(task, videos, vocabulary, instructions, seed=seed, group=group, once=once)
    composed = WindowSamples if task.of == "windows" else ComposedSamples
    return composed(task, videos, vocabulary, seed=seed, group=group, once=once)


def require_room(task: AnyTask, videos: TokenVideos) -> None:
    """Raise ConfigError where the most clips of a sample leave less than `ROOM` of `task.limit` for text: it would end the training there.

    A story has at least its first clip; the others are left out where there is no room.
    """
    clips = min(task.clips, int(videos.clip_counts.max(initial=0))) if isinstance(task, Captioning | Answering) else 1
    shown = 2 if isinstance(task, Storytelling) and task.reread else 1
    needed = shown * (clips * (videos.clip_tokens + 2) + 2) + ROOM
    if len(videos) and task.limit < needed:
        raise ConfigError(
            f"{task.kind}: {clips} clips of {videos.clip_tokens} tokens, with their tags and {ROOM} positions of text, take {needed}, and "
            f"limit is {task.limit}: raise it, or lower clips"
        )
