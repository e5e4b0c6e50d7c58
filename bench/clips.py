"""What the data lines run on: a clip index of drawn scenes, or of the videos in $KINETOK_DATA; repeated to any length; a small model."""

import io
import os
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console

from kinetok.infra.artifact import Store
from kinetok.infra.job import Job
from kinetok.infra.run import run
from kinetok.infra.stage import Ref, Resources
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.encoding import Encoding
from kinetok.pipelines.models import open_model
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.ingest import Ingest
from kinetok.pipelines.stages.scenes import Scenes
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer

EDGE = 128
SHARD_CLIPS = 64


def make_index(work: Path) -> ClipIndex:
    """Index the bench's videos in a store below `work`."""
    own = os.environ.get("KINETOK_DATA")
    videos = (
        {"videos": Ingest(source=f"{own}/clips")}
        if own
        else {"videos": Ingest(made_by=Ref("scenes")), "scenes": Scenes(count=64, size=EDGE)}
    )
    clips = Clips(videos=Ref("videos"), fps=8, frames=17, height=EDGE, width=EDGE, shard_clips=SHARD_CLIPS, max_bad_fraction=1.0)
    job = Job(
        name="bench",
        store=str(work / "store"),
        tracking=None,
        resources={name: Resources() for name in (*videos, "clips")},
        stages={**videos, "clips": clips},
    )
    store = Store(Folder(job.store))
    done = run(job, store, console=Console(file=io.StringIO()))
    found = store.read(Folder(done.stages["clips"].folder))
    assert found is not None, "\n".join(str(stage.error) for stage in done.stages.values())
    return ClipIndex.open(found)


def repeated(index: ClipIndex, clips: int) -> ClipIndex:
    """The same windows over and over, under new ids, `clips` of them."""
    rows = index.rows.take(np.arange(clips) % len(index))
    ids = pa.array([f"{name}-{number}" for number, name in enumerate(rows["id"].to_pylist())])
    rows = rows.set_column(rows.schema.get_field_index("id"), "id", ids)
    return ClipIndex(rows, index.fps, index.frames, index.height, index.width, index.shard_clips)


def make_encoding(index: ClipIndex, work: Path) -> Encoding:
    """The main job's base tokenizer, untrained, on one core, beside one decode task."""
    torch.manual_seed(0)
    config = CausalConfig(channels=16, mult=(1, 2, 4), strides=((2, 1), (2, 2)), patch=4, blocks=1, groups=8)
    CausalTokenizer(config).save_pretrained(work / "model")
    resources = Resources(workers=1, cpus=1, decoders=1, batch_size=4)
    return Encoding(partial(open_model, Folder(str(work / "model"))), "tokens", "bf16", index.recipe, resources)


def steady_rate(counts: Iterable[int], *, warm: int) -> float:
    """Samples per second of a stream of counts, once `warm` samples have arrived: start-up is not part of it."""
    stream = iter(counts)
    while warm > 0:
        warm -= next(stream)
    began, done = time.perf_counter(), 0
    for count in stream:
        done += count
    return done / (time.perf_counter() - began)
