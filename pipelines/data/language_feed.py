"""`LanguageFeed`: what feeds a language model's training, from token shards and text; no pixel is read.

Positions stand in groups of `group` samples of one task and about one length; a micro-batch lies inside a group. Which task a group is
of, and which samples of it, follow from its number alone, so a run on another number of workers, or one that resumes, sees the same
batches. Validation is the exception: its positions are every sample of every task once, in groups that are as short as they must be.
`LanguageSpec` is the contract that a trained model carries. Not covered: the tasks and their samples (`language_tasks.py`), sequences and
batches (`kinetok.llm.divot`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from kinetok.infra.artifact import Artifact
from kinetok.infra.config import Config
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.training import Batch
from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.mixture import Mixture, Once
from kinetok.llm.divot.sequences import Packed
from kinetok.llm.divot.training import TASK
from kinetok.llm.divot.vocabulary import Media, Vocabulary
from kinetok.pipelines.data.language_tasks import AnyTask, open_samples
from kinetok.pipelines.data.order import sample_seed
from kinetok.pipelines.data.positions import PositionFeed, Split
from kinetok.pipelines.data.token_videos import TokenVideos, media_of
from kinetok.tokenizers.base import DecodeRecipe, TokenSpec

LANGUAGE_FILE = "language.json"
OWN = ("dtype", "recipe", "chunk_frames", "chunk_overlap")
"""Fields of a spec that sources of one model may differ in."""


class LanguageSpec(Config):
    """`language.json`: whose tokens a language model reads and writes, and how it wants to be asked."""

    tokens: TokenSpec
    instructed: bool
    """Whether it was tuned on instructions."""
    other: TokenSpec | None = None
    """Of videos where `tokens` are of pictures, or of pictures where they are of videos: those of the first source of that kind. None where
    it knows none."""
    rereads: bool = False
    """Whether its stories showed it each clip after it was made."""

    def of(self, media: Media | None) -> TokenSpec:
        """The tokens of videos, or of pictures; None takes `tokens`. ContractError where it learned none of that kind."""
        if media is None or media == self.media:
            return self.tokens
        if self.other is None:
            raise ContractError(
                f"the model learned tokens of {self.media}s alone: train it on a source of {media}s too, or ask for {self.media}s"
            )
        return self.other

    @property
    def recipe(self) -> DecodeRecipe:
        """The pixels behind the tokens."""
        assert self.tokens.recipe is not None, "`encode` stamps it"
        return self.tokens.recipe

    def recipe_of(self, media: Media) -> DecodeRecipe:
        """How videos, or pictures, are looked at: as those were that it learned, where it learned any."""
        recipe = self.tokens.recipe if self.other is None else self.of(media).recipe
        assert recipe is not None, "`encode` stamps it"
        return recipe

    @property
    def media(self) -> Media:
        """What its clips are."""
        return media_of(self.tokens)


@dataclass(frozen=True)
class LanguageFeed(PositionFeed):
    """The samples of one split in endless seeded order: a feed of `kinetok.llm.divot.collate`'s batches.

    Raises ContractError where the sources are of different tokenizers, DataError where a task has nothing to learn from, ConfigError where
    its clips leave no room for text. Tasks without samples in the `val` split are left out of it; it may have none at all.
    """

    tokens: tuple[Artifact, ...]
    instructions: Artifact | None
    tasks: tuple[AnyTask, ...]
    split: Split
    open_vocabulary: Callable[[], Vocabulary]
    clip_tokens: int
    group: int
    seed: int
    loaders: int = 0

    @property
    def title(self) -> str:
        """What the samples are of, for errors."""
        return self.tokens[0].name

    def __len__(self) -> int:
        """Samples of all tasks together."""
        return sum(map(len, self._opened.samples))

    @property
    def lacking(self) -> tuple[str, ...]:
        """Kinds of the tasks that have no samples."""
        return tuple(task.kind for task, samples in zip(self.tasks, self._opened.samples, strict=True) if not len(samples))

    @property
    def specs(self) -> tuple[TokenSpec, ...]:
        """Of every source's tokens."""
        return self._opened.specs

    @property
    def spec(self) -> TokenSpec:
        """Of the first source's tokens."""
        return self._opened.specs[0]

    def load(self, positions: list[int]) -> Batch:
        """The samples at these global positions."""
        samples, seeds = [self.sample(position) for position in positions], [sample_seed(self.seed, position) for position in positions]
        return collate(samples, seeds) | {TASK: torch.tensor([self._opened.locate(position)[0] for position in positions])}

    def sample(self, position: int) -> Packed:
        """The sequence at a global position."""
        task, number = self._opened.locate(position)
        return self._opened.samples[task](number, sample_seed(self.seed, position))

    @cached_property
    def _opened(self) -> "_Opened":
        return _Opened(self)

    def __reduce__(self) -> tuple[type["LanguageFeed"], tuple[object, ...]]:
        """Pickle the description only: each process opens its own files."""
        about = (self.tokens, self.instructions, self.tasks, self.split, self.open_vocabulary, self.clip_tokens, self.group)
        return type(self), (*about, self.seed, self.loaders)


class _Opened:
    """The samples behind a feed, in one process."""

    def __init__(self, feed: LanguageFeed) -> None:
        videos = [TokenVideos.open(artifact, feed.split, clip_tokens=feed.clip_tokens) for artifact in feed.tokens]
        self.specs = tuple(source.shards.spec for source in videos)
        for artifact, spec in zip(feed.tokens, self.specs, strict=True):
            require_same_tokenizer(artifact.name, spec, self.specs[0])
        vocabulary, once = feed.open_vocabulary(), feed.split == "val"
        self.samples = [
            open_samples(
                task, videos[task.source], vocabulary, feed.instructions, seed=sample_seed(feed.seed, number), group=feed.group, once=once
            )
            for number, task in enumerate(feed.tasks)
        ]
        empty = [task.kind for task, samples in zip(feed.tasks, self.samples, strict=True) if not len(samples)]
        if empty and not once:
            raise DataError(f"{feed.tokens[0].name}: the train split has nothing for {', '.join(empty)}; look at clips and questions")
        self.once = Once(list(map(len, self.samples)), group=feed.group) if once else None
        self.mixture = Mixture({str(number): task.weight for number, task in enumerate(feed.tasks)}, seed=feed.seed)
        self.group = feed.group

    def locate(self, position: int) -> tuple[int, int]:
        """The task of the sample at a global position, by its place, and the sample's number among the task's own."""
        if self.once is not None:
            return self.once.draw(position)
        group, place = divmod(position, self.group)
        task, before = self.mixture.draw(group)
        return int(task), before * self.group + place


def require_same_tokenizer(name: str, found: TokenSpec, expected: TokenSpec) -> None:
    """Refuse tokens of another tokenizer than `expected`'s (contract 3)."""
    difference = found.difference(expected.model_copy(update={field: getattr(found, field) for field in OWN}))
    if difference is not None:
        raise ContractError(f"{name} holds tokens of another tokenizer than the rest: {difference}; encode all clips with one")
