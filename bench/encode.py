"""`encode` end to end, against the slower of its two halves alone: the decode loop on one core, the model on another."""

import threading
import time
from pathlib import Path

import numpy as np
from clips import repeated, steady_rate
from decode import bare_rate
from line import Line

from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.encoding import Encoder, Encoding, encode_shards

CLIPS = 800


def model_rate(index: ClipIndex, encoding: Encoding) -> float:
    """The model actor's own work on clips that are in memory already: forward pass and safetensors bytes."""
    encoder, size = Encoder(encoding), encoding.resources.batch_size
    pixels_BTHWC = np.stack([index.read_clip(row) for row in range(size)])
    encoder.encode(pixels_BTHWC)
    began, passes = time.perf_counter(), 25
    for _ in range(passes):
        encoder.encode(pixels_BTHWC)
    return passes * size / (time.perf_counter() - began)


def lines(index: ClipIndex, encoding: Encoding, work: Path) -> list[Line]:
    many = repeated(index, CLIPS)
    decode, model = bare_rate(repeated(index, CLIPS // 4)), model_rate(index, encoding)
    shards = encode_shards(many, range(len(many.shards)), encoding, Folder(str(work / "tokens")), threading.Event())
    rate = steady_rate((shard.clips for shard in shards), warm=1)
    slower = "decoding" if decode < model else "the model"
    return [Line(f"encode end to end (floor: {slower} alone)", rate, "clips/s", min(decode, model), ">= 0.90")]
