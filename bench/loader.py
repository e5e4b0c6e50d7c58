"""Samples per second from token shards by our reader in training order, against plain webdataset streaming the same tars."""

import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import webdataset
from line import Line
from safetensors.torch import load

from kinetok.infra.artifact import Artifact, Record
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.order import sample_order
from kinetok.pipelines.data.token_shards import SHARDS_HELD, TokenShards
from kinetok.tokenizers.base import TokenSpec

ROUNDS = 5


def rate(samples: Iterable[object]) -> float:
    began = time.perf_counter()
    return sum(1 for _ in samples) / (time.perf_counter() - began)


def lines(work: Path) -> list[Line]:
    """Reads what the encode line wrote; both readers end with tensors, both with a warm page cache, the best of a few rounds."""
    folder = Folder(str(work / "tokens"))
    spec = TokenSpec(tokenizer="causal", weights="", layout="grid", channels=4, temporal=4, spatial=8)
    folder.write_text("spec.json", spec.model_dump_json())
    record = Record(kind="encode", name="bench", key="0" * 16, version=1, config={}, digest="", started="", seconds=0)
    shards = TokenShards.open(Artifact(folder, record))
    sizes = np.unique(shards.rows["shard"].to_numpy(), return_counts=True)[1]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    urls = [str(path) for path in sorted(Path(folder.url, "shards").glob("*.tar"))]
    ours = plain = 0.0
    for epoch in range(ROUNDS):
        order = sample_order(tuple(sizes.tolist()), seed=0, epoch=epoch, window=SHARDS_HELD)
        ours = max(ours, rate(shards.read(int(starts[shard] + index)) for shard, index in order))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            stream = webdataset.WebDataset(urls, shardshuffle=False)
            plain = max(plain, rate(load(item["safetensors"]) for item in stream))
    return [Line("token shards read in shuffled order", ours, "samples/s", plain, ">= 1.00")]
