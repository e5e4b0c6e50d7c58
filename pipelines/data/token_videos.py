"""`TokenVideos`: the videos of one split of an `encode` artifact, each with its clips in order of time, for models that read tokens.

The id of a clip is the name of its video and the time it begins at, so which clips belong together is read from the index alone.
A sample of shards may hold several windows of tokens (a clip longer than the tokenizer's window): each window is one clip to a
language model. Not covered: what is made of the clips (`language_feed.py`).

Legend: U videos, R rows, C clips, N tokens of a clip, D token width.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import ContractError
from kinetok.llm.divot.vocabulary import Media
from kinetok.pipelines.data.instructions import Questions, Story
from kinetok.pipelines.data.positions import Split
from kinetok.pipelines.data.sources import stem
from kinetok.pipelines.data.token_shards import TOKENS, TokenShards
from kinetok.tokenizers.base import TokenSpec

CAPTIONS_HELD = 1 << 15
"""Captions that are kept in memory."""
TOKEN_BYTES = 64 << 20
"""Bytes of tokens that are kept in memory."""
EXAMPLES = 3
"""Names of each side that an error shows."""
EXAMPLES_OF = 1000
"""Clips that they are taken from: a video may have many."""


@dataclass(frozen=True)
class TokenVideos:
    """Videos of one split."""

    shards: TokenShards
    row_R: NDArray[np.int64]
    """Rows of the split in `shards`, the clips of a video one after the other."""
    first_U: NDArray[np.int64]
    """Place in `row_R` of the first clip of each video."""
    clip_tokens: int

    @classmethod
    def open(cls, artifact: Artifact, split: Split, *, clip_tokens: int) -> "TokenVideos":
        """Read the index, no samples. ContractError where the artifact holds no continuous tokens in sequence."""
        shards = TokenShards.open(artifact)
        require_sequence(artifact.name, shards.spec)
        row_R = np.flatnonzero(pc.equal(shards.rows["split"], split).to_numpy(zero_copy_only=False))
        names = video_names(shards.rows["id"].take(pa.array(row_R)))
        starts = np.flatnonzero(names[1:] != names[:-1]) + 1 if len(names) else np.zeros(0, np.int64)
        return cls(shards, row_R, np.concatenate([[0], starts])[: len(row_R)].astype(np.int64), clip_tokens)

    def __len__(self) -> int:
        return len(self.first_U)

    @property
    def media(self) -> Media:
        """What the clips are."""
        return media_of(self.shards.spec)

    @cached_property
    def names(self) -> NDArray[np.object_]:
        """Of every video."""
        return video_names(self.shards.rows["id"].take(pa.array(self.row_R[self.first_U])))

    def rows(self, video: int) -> NDArray[np.int64]:
        """Rows of a video's clips in the shards."""
        end = self.first_U[video + 1] if video + 1 < len(self) else len(self.row_R)
        return self.row_R[self.first_U[video] : end]

    def find(self, names: Collection[str]) -> dict[str, NDArray[np.int64]]:
        """Rows of the clips of each name that is a video's or a clip's id; names that are neither are left out."""
        wanted = set(names)
        found = {name: self.rows(video) for video, name in enumerate(self.names) if name in wanted}
        if others := sorted(wanted - found.keys()):
            ids = self.shards.rows["id"].take(pa.array(self.row_R))
            at = pc.index_in(pa.array(others, pa.string()), value_set=ids).to_pylist()
            found |= {name: self.row_R[[place]] for name, place in zip(others, at, strict=True) if place is not None}
        return found

    def by_shard(self, videos: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Places in `videos`, which are in order, in groups of the shard that their first clip is in; none where there are no videos."""
        shard = self.shards.rows["shard"].to_numpy()[self.row_R[self.first_U[videos]]]
        return [group for group in np.split(np.arange(len(videos)), np.flatnonzero(np.diff(shard)) + 1) if len(group)]

    def caption(self, video: int) -> str:
        """That of a video's first clip, empty where there is none."""
        return self.caption_of(int(self.rows(video)[0]))

    def caption_of(self, row: int) -> str:
        """That of a clip, empty where there is none."""
        return self._caption(row)

    @cached_property
    def sample_clips(self) -> int:
        """Clips of one sample, which has one or several windows; 0 where there is no sample."""
        return len(self.windows(int(self.row_R[0]))) if len(self) else 0

    @property
    def clip_counts(self) -> NDArray[np.int64]:
        """How many clips each video has."""
        return np.diff(self.first_U, append=len(self.row_R)) * self.sample_clips

    def clips(self, video: int, most: int, draw: float) -> Tensor:
        """At most `most` clips (C, N, D): where there are more, one of each of `most` equal parts, at `draw` in [0, 1) of its length."""
        return self.clips_of(self.rows(video), most, draw)

    def clips_of(self, rows: NDArray[np.int64], most: int, draw: float) -> Tensor:
        """`clips` of these rows."""
        if len(rows) > most:
            rows = rows[((np.arange(most) + draw) * len(rows) / most).astype(int)]
        windows_CND = torch.cat([self.windows(int(row)) for row in rows[:most]])
        if len(windows_CND) > most:
            windows_CND = windows_CND[((torch.arange(most) + draw) * len(windows_CND) / most).long()]
        return windows_CND

    def windows(self, row: int) -> Tensor:
        """Every window of one sample, (C, N, D) float32; ContractError where they are no whole clips."""
        return self._windows(row)

    @cached_property
    def _caption(self) -> Callable[[int], str]:
        """`caption_of`, which remembers: samples are sorted by the length of their captions before they are made."""
        return lru_cache(CAPTIONS_HELD)(lambda row: str(self.shards.about(row)["caption"] or ""))

    @cached_property
    def _windows(self) -> Callable[[int], Tensor]:
        """`windows`, which remembers the last of them: small data sets come again in every epoch."""
        return lru_cache(TOKEN_BYTES // max(1, self._sample_bytes))(self._read_windows)

    @property
    def _sample_bytes(self) -> int:
        """About what the windows of one sample take in memory, where numbers are stored in half of that."""
        return 2 * int(self.shards.rows["bytes"][0].as_py()) if len(self.shards) else 0

    def _read_windows(self, row: int) -> Tensor:
        token_ND = self.shards.read(row)[TOKENS].float()
        if len(token_ND) % self.clip_tokens:
            raise ContractError(
                f"{self.shards.folder} has samples of {len(token_ND)} tokens, no whole clips of {self.clip_tokens}: set clip_tokens of "
                "the model to what the tokenizer makes of a window"
            )
        return torch.unflatten(token_ND, 0, (-1, self.clip_tokens))


def media_of(spec: TokenSpec) -> Media:
    """A clip of one frame, which the tokenizer repeats, is a picture."""
    return "image" if spec.recipe is not None and spec.recipe.frames == 1 else "video"


def video_names(ids: pa.ChunkedArray) -> NDArray[np.object_]:
    """The video that each clip of these ids is of: what stands before the last slash."""
    return np.asarray(_videos(ids).to_pylist(), dtype=object)


def held(names: Sequence[str], ids: pa.ChunkedArray, *, asker: str, holder: str, clips: bool = False) -> NDArray[np.bool_]:
    """Which of `names`, (k,), are videos that the clips of these ids are of, or where `clips` says so these ids.

    ContractError where some are named and none is there.
    """
    videos, asked = _videos(ids), pa.array(names, pa.string())
    here: NDArray[np.bool_] = pc.is_in(asked, value_set=videos).to_numpy(zero_copy_only=False)
    if clips and not here.all():
        here = here | pc.is_in(asked, value_set=ids).to_numpy(zero_copy_only=False)
    if len(names) and not here.any():
        theirs = ", ".join(map(repr, pc.unique(videos.slice(0, EXAMPLES_OF)).to_pylist()[:EXAMPLES]))
        raise ContractError(
            f"{asker} names no video that {holder} holds: it names {', '.join(map(repr, names[:EXAMPLES]))}, {holder} {theirs or 'none'}; "
            "call videos as they are called there: a file by its path without the ending, one in a tar as tar/key"
        )
    return here


def called(questions: Sequence[Questions], stories: Sequence[Story], ids: pa.ChunkedArray) -> tuple[list[Questions], list[Story]]:
    """The lines with their videos called as these clips' ids call them: data sets name files, and an id has an ending only where two
    files differ in nothing else. What is called otherwise stays as it is."""
    asked = {line.video for line in questions} | {clip for story in stories for clip in story.clips}
    files = sorted(name for name in asked if stem(name) != name)
    either = pa.array([*files, *map(stem, files)], pa.string())
    known = {name for name, here in zip(either.to_pylist(), pc.is_in(either, value_set=_videos(ids)).to_pylist(), strict=True) if here}
    names = {name: stem(name) for name in files if name not in known and stem(name) in known}
    return (
        [line.model_copy(update={"video": names.get(line.video, line.video)}) for line in questions],
        [story.model_copy(update={"clips": tuple(names.get(clip, clip) for clip in story.clips)}) for story in stories],
    )


def unknown_lines(
    questions: Sequence[Questions], stories: Sequence[Story], ids: pa.ChunkedArray, *, asker: str, holder: str
) -> dict[str, float]:
    """`unknown_questions` and `unknown_stories`: how many are about videos that the clips of these ids are not of.

    ContractError where there are questions, or stories, and none is about these clips.
    """
    asked = held([line.video for line in questions], ids, asker=asker, holder=holder)
    lost = sum(len(line.questions) for line, here in zip(questions, asked, strict=True) if not here)
    named = [name for story in stories for name in story.clips]
    told = dict(zip(named, held(named, ids, asker=asker, holder=holder, clips=True), strict=True))
    return {"unknown_questions": float(lost), "unknown_stories": float(sum(not all(map(told.get, story.clips)) for story in stories))}


def divided_stories(stories: Sequence[Story], ids: pa.ChunkedArray, splits: pa.ChunkedArray) -> int:
    """How many stories are of clips in both splits: learned in one, they would tell of what the other is measured on."""
    names = pa.array(sorted({name for story in stories for name in story.clips}), pa.string())
    at = pc.coalesce(pc.index_in(names, value_set=_videos(ids)), pc.index_in(names, value_set=ids))
    split = dict(zip(names.to_pylist(), splits.take(at).to_pylist(), strict=True))
    told = [{split[name] for name in story.clips} for story in stories]
    return sum(len(found) > 1 and None not in found for found in told)


def _videos(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.replace_substring_regex(ids, r"/[^/]*$", "")


def require_sequence(name: str, spec: TokenSpec) -> None:
    """Refuse what a language model of continuous tokens cannot read."""
    if spec.content != "tokens" or spec.layout != "sequence" or spec.vocabulary is not None:
        kind = "discrete" if spec.vocabulary else "continuous"
        raise ContractError(
            f"{name} holds {spec.content}, {kind}, as a {spec.layout}: a language model reads continuous tokens in sequence"
        )
