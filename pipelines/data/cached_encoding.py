"""Clips to tokens from cached features of a frozen model, without decoding or running it again: shards like those of `encoding.py`.

A shard is one of the features' own, which are those of the clip index, and is committed by the actor that made it. A clip that the
features have in quarantine is quarantined here for the same reason. What features a tokenizer takes is its own to say
(`Tokenizer.feature_spec`). Not covered: which shards are due (`stages/encode.py`), the files (`token_shards.py`).
"""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from kinetok.infra import meters
from kinetok.infra.artifact import Artifact
from kinetok.infra.compiling import compile_parts
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.encoding import Committed
from kinetok.pipelines.data.ray_tasks import Item, each_on_actors
from kinetok.pipelines.data.reasons import Reason
from kinetok.pipelines.data.token_shards import (
    DTYPES,
    TOKENS,
    BadSample,
    Sample,
    Stored,
    TokenShards,
    quarantine_name,
    stored,
    write_shard,
)
from kinetok.tokenizers.base import Tokenizer
from kinetok.tokenizers.causal.tiling import tiled


@dataclass(frozen=True)
class CachedEncoding:
    """What to compute: picklable, handed to every worker."""

    open_model: Callable[[], Tokenizer]
    features: Artifact
    dtype: Stored
    """Type the numbers are stored in."""
    frames: int
    """Of a clip."""
    resources: Resources
    out: Folder


def encode_cached(due: list[int], encoding: CachedEncoding, stop: threading.Event) -> Iterator[Committed]:
    """Encode the shards numbered `due` and commit each; yields them as they are committed."""
    items = [{"shard": shard} for shard in due]
    stage = meters.stage_of(encoding.out)
    for done in each_on_actors(stage, partial(_Worker, encoding), items, resources=encoding.resources, stop=stop):
        yield Committed(done["shard"], json.loads(done["lines"]), done["clips"], 0.0, done["seconds"])


class _Worker:
    """An actor's tokenizer, and the features that it reads."""

    def __init__(self, encoding: CachedEncoding) -> None:
        torch.set_num_threads(max(1, int(encoding.resources.cpus)))
        self.device = torch.device("cuda" if encoding.resources.gpus else "cpu")
        self.encoding, self.features = encoding, TokenShards.open(encoding.features)
        self.model = encoding.open_model().to(self.device).eval()
        if encoding.resources.compile:
            compile_parts([self.model])

    def __call__(self, item: Item) -> Item:
        began, shard, size = time.perf_counter(), item["shard"], self.encoding.resources.batch_size
        rows = np.flatnonzero(self.features.rows["shard"].to_numpy() == shard).tolist()
        made = [found for at in range(0, len(rows), size) for found in self._encode(rows[at : at + size])]
        lost = self._quarantined(shard)
        bad = lost + [found for found in made if isinstance(found, BadSample)]
        lines = write_shard(self.encoding.out, shard, (found for found in made if isinstance(found, Sample)), bad)
        seconds = time.perf_counter() - began
        meters.did(meters.stage_of(self.encoding.out), "model", samples=len(rows), seconds=seconds)
        return {"shard": shard, "lines": json.dumps(lines), "clips": len(rows) + len(lost), "seconds": seconds}

    @torch.inference_mode()
    def _encode(self, rows: list[int]) -> list[Sample | BadSample]:
        """One micro-batch."""
        encoding, read = self.encoding, [self.features.read(row) for row in rows]
        batch = {name: torch.stack([tensors[name] for tensors in read]).to(self.device).float() for name in read[0]}
        arithmetic = DTYPES[encoding.resources.dtype]
        with torch.autocast(self.device.type, arithmetic, enabled=arithmetic is not torch.float32), tiled(encoding.resources.tile):
            made = stored(self.model.encode_features(batch, encoding.frames).values, DTYPES[encoding.dtype])
        return [self._sample(row, values) for row, values in zip(rows, made, strict=True)]

    def _sample(self, row: int, values: torch.Tensor) -> Sample | BadSample:
        about = self.features.about(row)
        if not values.isfinite().all():
            return BadSample(str(about["id"]), str(Reason.MODEL_FAILED), f"the model's {TOKENS} are not finite", None)
        return Sample(int(self.features.rows["place"][row].as_py()), save({TOKENS: values.clone()}), about)

    def _quarantined(self, shard: int) -> list[BadSample]:
        """The clips of the shard that have no features."""
        name, folder = quarantine_name(shard), self.features.folder
        if not folder.exists(name):
            return []
        listed = pq.read_table(io.BytesIO(folder.read_bytes(name))).select(BadSample._fields).to_pylist()
        return [BadSample(**row) for row in listed]
