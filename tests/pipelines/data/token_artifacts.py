"""Artifacts of made-up tokens, without the stages that would encode them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from tests.pipelines.conftest import finish
from torch import Tensor

from kinetok.infra.artifact import Artifact, Counts
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.instructions import QUESTIONS, STORIES, Question, Questions, Story
from kinetok.pipelines.data.token_shards import SPEC_FILE, Sample, write_shard
from kinetok.tokenizers.base import DecodeRecipe, TokenSpec

TOKENS, WIDTH = 4, 8
SPEC = TokenSpec(
    tokenizer="divot",
    weights="a" * 64,
    layout="sequence",
    channels=WIDTH,
    temporal=5,
    spatial=16,
    recipe=DecodeRecipe(fps=8, frames=5, height=16, width=16),
)


def clip_tokens(video: int, clip: int, windows: int = 1) -> Tensor:
    """Numbers that tell which clip they are of."""
    return 100.0 * video + 10 * clip + torch.arange(windows * TOKENS)[:, None].expand(-1, WIDTH) % TOKENS


def make_tokens(
    folder: Path, videos: int, *, clips: int = 1, val: Sequence[int] = (), windows: int = 1, shard_clips: int = 4, spec: TokenSpec = SPEC
) -> Artifact:
    """An `encode` artifact: video number v is called v/000v, its caption grows with v."""
    out = Folder(str(folder))
    out.write_text(SPEC_FILE, spec.model_dump_json())
    rows = [(video, clip) for video in range(videos) for clip in range(clips)]
    for shard, first in enumerate(range(0, len(rows), shard_clips)):
        samples = [
            Sample(
                place,
                save({"tokens": clip_tokens(video, clip, windows).contiguous()}),
                {
                    "id": f"v/{video:04d}/{clip * 1000}",
                    "video": f"v/{video:04d}",
                    "start": float(clip),
                    "end": clip + 1.0,
                    "caption": caption(video),
                    "split": "val" if video in val else "train",
                },
            )
            for place, (video, clip) in enumerate(rows[first : first + shard_clips])
        ]
        write_shard(out, shard, samples, [])
    return finish(out, "encode", Counts(input=len(rows), written=len(rows)))


def caption(video: int) -> str:
    return f"video {video} {'x' * (1 + 7 * video % 40)}"


def make_instructions(folder: Path, videos: Sequence[int], stories: Sequence[Story] = ()) -> Artifact:
    """An `instructions` artifact: two questions about each of `videos`."""
    out = Folder(str(folder))
    lines = [
        Questions(
            video=f"v/{video:04d}",
            questions=(
                Question(question="Which?", answer=str(video), options=tuple(map(str, videos)), about="which"),
                Question(question="Odd?", answer="yes" if video % 2 else "no", options=("yes", "no"), about="odd"),
            ),
        )
        for video in videos
    ]
    out.write_text(QUESTIONS, "".join(f"{line.model_dump_json()}\n" for line in lines))
    out.write_text(STORIES, "".join(f"{story.model_dump_json()}\n" for story in stories))
    return finish(out, "instructions", Counts())
