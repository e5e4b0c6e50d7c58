"""What a decode task does: one unit of clips to pixels, in a process that never loads torch, whose weight every task would carry.

A unit is a run of clips of one output shard, cut between videos where that is possible: the windows of a video in a unit are decoded in
one pass. A video that cannot be decoded becomes a status row. Not covered: the plan that the task is part of (`encoding.py`).

Legend: B clips, T H W C frames, rows, columns, colours.
"""

import json
import time
from functools import partial
from itertools import groupby, pairwise
from math import ceil
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import ray

from kinetok.infra import meters
from kinetok.infra.errors import StoreError
from kinetok.pipelines.data.decode import Pixels, decode_windows
from kinetok.pipelines.data.guard import Guard, begun_before, guard
from kinetok.pipelines.data.reasons import BadVideo
from kinetok.pipelines.data.sources import read_range

if TYPE_CHECKING:
    from kinetok.pipelines.data.clip_index import ClipIndex

LOST = "source lost"
"""Status of a clip whose source cannot be read: no fault of the clip, so the shard is not committed. Ray Data would wrap an exception
beyond recognition; a write task's own comes through."""

ROWS = ("id", "video", "url", "offset", "bytes", "start", "end", "caption", "split")
ABOUT = ("id", "video", "start", "end", "caption", "split")

Status: TypeAlias = dict[str, str | float | None]
"""Why a clip failed: reason, message and position; all None where it is sound."""
_SOUND: Status = {"reason": None, "message": None, "position": None}
STATUS = [
    ("shard", pa.int64()),
    ("place", pa.int32()),
    ("about", pa.string()),
    ("reason", pa.string()),
    ("message", pa.string()),
    ("position", pa.float64()),
    ("decode_seconds", pa.float64()),
]
DECODED = pa.schema(STATUS)


class Sampling(NamedTuple):
    """Which frames of a window, and how large: the numbers of a `DecodeRecipe`."""

    fps: float
    frames: int
    height: int
    width: int


class Unit(NamedTuple):
    """Clips `first` ... `first + clips` of the index, which begin at `place` of output shard `shard`."""

    shard: int
    place: int
    first: int
    clips: int


class Video(NamedTuple):
    """A video in its tar, and where its windows begin."""

    url: str
    offset: int
    bytes: int
    starts: list[float]


def cut_units(index: "ClipIndex", shard: int, unit_clips: int) -> list[Unit]:
    """The units of one output shard: about equally many clips each, at most `unit_clips`, cut between videos where that allows it.

    The windows of one video are decoded in one pass; a cut among them costs a second one.
    """
    first, clips = int(index.shards[shard][0]), len(index.shards[shard])
    even = ceil(clips / ceil(clips / unit_clips))
    sources = index.rows.slice(first, clips).select(["url", "offset"]).to_pylist() if even < clips else []
    starts = [0]
    for place in range(even, clips):
        size = place - starts[-1]
        if size == unit_clips or (size >= even and sources[place] != sources[place - 1]):
            starts.append(place)
    return [Unit(shard, place, first + place, end - place) for place, end in pairwise([*starts, clips])]


def decode_unit(unit: pa.Table, *, rows: "ray.ObjectRef[pa.Table]", sampling: Sampling, seconds: float, stage: str) -> pa.Table:
    """Pixels of one unit; each video is read and decoded once for all of its windows in the unit, within `seconds`."""
    began = time.perf_counter()
    work = Unit(**unit.to_pylist()[0])
    clips = ray.get(rows).slice(work.first, work.clips).to_pylist()
    pixels_BTHWC = np.empty((work.clips, sampling.frames, sampling.height, sampling.width, 3), np.uint8)
    statuses: list[Status] = []
    read = 0
    with guard(seconds, apart=begun_before()) as guarded:
        for (url, offset, size), windows in groupby(clips, key=lambda clip: (clip["url"], clip["offset"], clip["bytes"])):
            wanted = Video(url, offset, size, [clip["start"] for clip in windows])
            read += size
            statuses += _decode_video(wanted, sampling, guarded, pixels_BTHWC[len(statuses) :])
    each = (time.perf_counter() - began) / work.clips
    meters.did(stage, "decode", samples=work.clips, seconds=each * work.clips, size=read)
    listed = [
        {
            **status,
            "shard": work.shard,
            "place": work.place + number,
            "about": json.dumps({name: clip[name] for name in ABOUT}, ensure_ascii=False),
            "decode_seconds": each,
        }
        for number, (clip, status) in enumerate(zip(clips, statuses, strict=True))
    ]
    # One buffer of fixed-size clips, never copied; the pixels of a clip that failed are noise that nobody reads.
    pixels = pa.FixedSizeBinaryArray.from_buffers(pa.binary(pixels_BTHWC[0].nbytes), work.clips, [None, pa.py_buffer(pixels_BTHWC)])
    return pa.Table.from_pylist(listed, schema=DECODED).append_column("pixels", pixels)


def _decode_video(wanted: Video, sampling: Sampling, guarded: Guard, out_BTHWC: Pixels) -> list[Status]:
    """Decode the windows of one video into `out_BTHWC`; the status of each: sound, and from the first that fails on, the reason."""
    try:
        decode = partial(decode_windows, **sampling._asdict())
        found = guarded(decode, read_range(wanted.url, wanted.offset, wanted.bytes), wanted.starts)
    except (BadVideo, OSError, StoreError) as error:
        return [failed(error)] * len(wanted.starts)
    for place, clip_THWC in enumerate(found.clips):
        out_BTHWC[place] = clip_THWC
    bad = [] if found.error is None else [failed(found.error)] * (len(wanted.starts) - len(found.clips))
    return [_SOUND] * len(found.clips) + bad


def failed(error: BadVideo | OSError | StoreError) -> Status:
    if isinstance(error, BadVideo):
        return {"reason": str(error.reason), "message": error.message, "position": error.position}
    return {"reason": LOST, "message": str(error), "position": None}
