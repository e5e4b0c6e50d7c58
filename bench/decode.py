"""Clips decoded per second and core: through Ray Data, against a bare loop over the same clips in this process."""

import threading
from itertools import groupby

from clips import repeated, steady_rate
from line import Line

from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.decode import decode_clips
from kinetok.pipelines.data.decode_task import cut_units
from kinetok.pipelines.data.encoding import Encoding, decoded
from kinetok.pipelines.data.sources import read_range
from kinetok.pipelines.data.stream import blocks

CYCLES = 4
"""Times that every clip is decoded and counted: clips differ in what they cost, so both sides see each as often."""


def bare_rate(index: ClipIndex) -> float:
    """One core, PyAV alone: read each video's bytes, decode all of its windows."""

    def counts():  # type: ignore[no-untyped-def]
        rows = index.rows.to_pylist()
        for (url, offset, size), windows in groupby(rows, key=lambda row: (row["url"], row["offset"], row["bytes"])):
            starts = [row["start"] for row in windows]
            yield sum(1 for _ in decode_clips(read_range(url, offset, size), starts=starts, **index.recipe.model_dump()))

    return steady_rate(counts(), warm=0)


def ray_rate(index: ClipIndex, encoding: Encoding) -> float:
    """One decode task at a time, through Ray Data's operators and object store."""
    units = [unit for shard in range(len(index.shards)) for unit in cut_units(index, shard, encoding.unit_clips)]
    done = zip(units, blocks(decoded(index, units, encoding, actors=1), threading.Event()), strict=True)
    return steady_rate((unit.clips for unit, _ in done), warm=len(index) // (CYCLES + 1))


def lines(index: ClipIndex, encoding: Encoding) -> list[Line]:
    """The floor is measured before and after, because machines change their speed within a minute."""
    cycles = repeated(index, CYCLES // 2 * len(index))
    before = bare_rate(cycles)
    ours = ray_rate(repeated(index, (CYCLES + 1) * len(index)), encoding)
    floor = (before + bare_rate(cycles)) / 2
    return [Line("clips decoded per core through Ray Data", ours, "clips/s", floor, ">= 0.90")]
