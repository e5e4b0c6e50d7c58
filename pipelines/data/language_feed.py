"""`LanguageFeed`: what feeds a language model's training, from token shards and text; no pixel is read.

Positions stand in groups of `group` samples of one task and about one length; a micro-batch lies inside a group. Which task a group is
of, and which samples of it, follow from its number alone, so a run on another number of workers, or one that resumes, sees the same
batches. `LanguageSpec` is the contract that a trained model carries. Not covered: the tasks and their samples (`language_tasks.py`),
sequences and batches (`kinetok.llm.divot`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from kinetok.infra.artifact import Artifact
from kinetok.infra.config import Config
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.training import Batch
from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.mixture import Mixture
from kinetok.llm.divot.sequences import Packed
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

    @property
    def recipe(self) -> DecodeRecipe:
        """The pixels behind the tokens."""
        assert self.tokens.recipe is not None, "`encode` stamps it"
        return self.tokens.recipe

    @property
    def media(self) -> Media:
        """What its clips are."""
        return media_of(self.tokens)

    @property
    def seconds(self) -> float:
        """Of one clip."""
        return self.recipe.frames / self.recipe.fps


@dataclass(frozen=True)
class LanguageFeed(PositionFeed):
    """The samples of one split in endless seeded order: a feed of `kinetok.llm.divot.collate`'s batches.

    Raises ContractError where the sources are of different tokenizers, DataError where a task has nothing to learn from. Tasks without
    samples in the `val` split are left out of it.
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
    def spec(self) -> TokenSpec:
        """Of the first source's tokens."""
        return self._opened.spec

    def load(self, positions: list[int]) -> Batch:
        """The samples at these global positions."""
        return collate([self.sample(position) for position in positions], [sample_seed(self.seed, position) for position in positions])

    def sample(self, position: int) -> Packed:
        """The sequence at a global position."""
        group, place = divmod(position, self.group)
        task, before = self._opened.mixture.draw(group)
        return self._opened.samples[int(task)](before * self.group + place, sample_seed(self.seed, position))

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
        self.spec = videos[0].shards.spec
        for artifact, source in zip(feed.tokens, videos, strict=True):
            require_same_tokenizer(artifact.name, source.shards.spec, self.spec)
        vocabulary = feed.open_vocabulary()
        made = [
            open_samples(task, videos[task.source], vocabulary, feed.instructions, seed=sample_seed(feed.seed, number), group=feed.group)
            for number, task in enumerate(feed.tasks)
        ]
        empty = [task.kind for task, samples in zip(feed.tasks, made, strict=True) if not len(samples)]
        if empty and (feed.split == "train" or len(empty) == len(made)):
            raise DataError(
                f"{feed.tokens[0].name}: the {feed.split} split has nothing for {', '.join(empty)}; look at clips and questions"
            )
        self.samples = [samples for samples in made if len(samples)]
        self.mixture = Mixture({str(number): samples.task.weight for number, samples in enumerate(self.samples)}, seed=feed.seed)


def require_same_tokenizer(name: str, found: TokenSpec, expected: TokenSpec) -> None:
    """Refuse tokens of another tokenizer than `expected`'s (contract 3)."""
    difference = found.difference(expected.model_copy(update={field: getattr(found, field) for field in OWN}))
    if difference is not None:
        raise ContractError(f"{name} holds tokens of another tokenizer than the rest: {difference}; encode all clips with one")
