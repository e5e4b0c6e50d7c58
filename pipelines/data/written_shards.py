"""Token shards that a language model writes, one clip for each caption, in the format of those that `encode` makes of pixels.

A shard is a group of the clip index, or of prompts in a row, and is committed by the actor that wrote it. A clip's tokens depend on its
caption and its own seeds, which are those of its place among all, so a run again writes the same shard. Not covered: which shards are due
(`stages/write.py`), the files (`token_shards.py`).

Legend: B captions, K draws of a clip, N tokens of a clip, D token width.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from kinetok.infra import meters
from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import DataError
from kinetok.infra.fingerprint import Plain
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.llm.divot.generation import draw_clips
from kinetok.llm.divot.sequences import ask_clip
from kinetok.llm.divot.vocabulary import Media
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.order import sample_seed
from kinetok.pipelines.data.ray_tasks import Item, each_on_actors
from kinetok.pipelines.data.token_shards import DRAWS, DTYPES, TOKENS, Line, Sample, stored, write_shard
from kinetok.tokenizers.base import TokenSpec

PROMPT_SHARD = 64
"""Prompts of one shard."""
_ABOUT = ("id", "video", "start", "end", "caption", "split")


@dataclass(frozen=True)
class Captions:
    """What to write clips for: the captions of all clips of an index, or prompts; picklable."""

    clips: Artifact | None
    prompts: tuple[str, ...]
    seconds: float
    """How long a clip is."""

    def __len__(self) -> int:
        return len(self.index) if self.index is not None else len(self.prompts)

    @property
    def shards(self) -> int:
        """How many shards they are."""
        return len(self.index.shards) if self.index is not None else -(-len(self.prompts) // PROMPT_SHARD)

    def shard(self, number: int) -> tuple[int, list[dict[str, Plain]]]:
        """Place of the first caption of a shard among all, and what is written of each: id, video, start, end, caption, split."""
        if self.index is not None:
            rows = self.index.shards[number]
            return int(rows[0]), self.index.rows.select(_ABOUT).take(rows).to_pylist()
        first = number * PROMPT_SHARD
        return first, [self._prompt(place) for place in range(first, min(first + PROMPT_SHARD, len(self.prompts)))]

    def _prompt(self, place: int) -> dict[str, Plain]:
        video = f"prompts/{place:06d}"
        ends: dict[str, Plain] = {"start": 0.0, "end": self.seconds}
        return {"id": f"{video}/0", "video": video, "caption": self.prompts[place], "split": "val", **ends}

    @cached_property
    def index(self) -> ClipIndex | None:
        """The clips, None where there are prompts."""
        return None if self.clips is None else ClipIndex.open(self.clips)

    def __reduce__(self) -> tuple[type["Captions"], tuple[object, ...]]:
        """Pickle the description only: each process opens its own index."""
        return type(self), (self.clips, self.prompts, self.seconds)


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn."""

    seed: int
    draws: int
    """Of each clip."""
    variance_scale: float | None

    def seeds(self, place: int) -> list[int]:
        """Of every draw of the clip at `place` among all; the first is the same however many follow."""
        first = sample_seed(self.seed, place)
        return [first, *(sample_seed(first, draw) for draw in range(1, self.draws))]


@dataclass(frozen=True)
class Writing:
    """What to compute: picklable, handed to every worker."""

    model: Artifact
    media: Media
    """What a clip is."""
    instructed: bool
    """Whether the model wants to be asked."""
    captions: Captions
    drawing: Drawing
    dtype: Literal["fp32", "bf16", "fp16"]
    """Type the tokens are stored in."""
    resources: Resources
    out: Folder


def seconds_of(tokens: TokenSpec) -> float:
    """How long a clip is."""
    assert tokens.recipe is not None, "`encode` stamps it"
    return tokens.recipe.frames / tokens.recipe.fps


def write_clips(due: list[int], writing: Writing, stop: threading.Event) -> Iterator[tuple[int, list[Line]]]:
    """Write and commit the shards numbered `due`; yields number and manifest lines as they are committed."""
    items = [{"shard": shard} for shard in due]
    stage = meters.stage_of(writing.out)
    for done in each_on_actors(stage, partial(_Worker, writing), items, resources=writing.resources, stop=stop):
        yield done["shard"], json.loads(done["lines"])


class _Worker:
    """An actor's language model."""

    def __init__(self, writing: Writing) -> None:
        from kinetok.pipelines.models import open_language

        torch.set_num_threads(max(1, int(writing.resources.cpus)))
        self.device = torch.device("cuda" if writing.resources.gpus else "cpu")
        self.writing, self.model = writing, open_language(writing.model).to(self.device)

    def __call__(self, item: Item) -> Item:
        first, clips = self.writing.captions.shard(item["shard"])
        size = self.writing.resources.batch_size
        token_KND = [token_KND for at in range(0, len(clips), size) for token_KND in self._write(first + at, clips[at : at + size])]
        samples = (Sample(place, self._payload(*each), clip) for place, (each, clip) in enumerate(zip(token_KND, clips, strict=True)))
        lines = write_shard(self.writing.out, item["shard"], samples, [])
        return {"shard": item["shard"], "lines": json.dumps(lines)}

    def _payload(self, token_ND: Tensor, *others: Tensor) -> bytes:
        """A sample of the first draw, and of the others where there are any."""
        drawn = {TOKENS: token_ND, DRAWS: torch.stack(others)} if others else {TOKENS: token_ND}
        return save({name: stored(tokens, DTYPES[self.writing.dtype]) for name, tokens in drawn.items()})

    def _write(self, first: int, clips: list[dict[str, Plain]]) -> Tensor:
        """(B, K, N, D) of captions in a row, the first of them at place `first` among all."""
        writing, media = self.writing, self.writing.media
        prompts = [
            ask_clip(self.model.vocabulary, str(clip["caption"] or ""), instructed=writing.instructed, media=media) for clip in clips
        ]
        seeds_BK = [writing.drawing.seeds(first + place) for place in range(len(clips))]
        scale = writing.drawing.variance_scale
        arithmetic = DTYPES[writing.resources.dtype]
        with torch.autocast(self.device.type, arithmetic, enabled=arithmetic is not torch.float32):
            token_KBND = draw_clips(self.model, prompts, list(zip(*seeds_BK, strict=True)), media=media, variance_scale=scale)
        token_BKND = token_KBND.transpose(0, 1)
        if not token_BKND.isfinite().all():
            bad = clips[int(np.flatnonzero(~token_BKND.isfinite().flatten(1).all(1).cpu())[0])]
            raise DataError(f"the tokens for {bad['caption']!r} are not finite: the language model {writing.model.name} is not sound")
        return token_BKND
