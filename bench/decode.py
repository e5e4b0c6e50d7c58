"""Clips decoded per second and core: through Ray Data, against a bare loop over the same clips in this process."""

from itertools import groupby

from clips import repeated, steady_rate
from line import Line

from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.decode import decode_clips
from kinetok.pipelines.data.encoding import Encoding, cut_units, decoded
from kinetok.pipelines.data.sources import read_range

CLIPS = 800


def bare_rate(index: ClipIndex) -> float:
    """One core, PyAV alone: read each video's bytes, decode all of its windows."""

    def counts():  # type: ignore[no-untyped-def]
        rows = index.rows.to_pylist()
        for (url, offset, size), windows in groupby(rows, key=lambda row: (row["url"], row["offset"], row["bytes"])):
            starts = [row["start"] for row in windows]
            yield sum(1 for _ in decode_clips(read_range(url, offset, size), starts=starts, **index.recipe.model_dump()))

    return steady_rate(counts())


def ray_rate(index: ClipIndex, encoding: Encoding) -> float:
    """One decode task at a time, through Ray Data's operators and object store."""
    units = [unit for shard, rows in enumerate(index.shards) for unit in cut_units(shard, rows, encoding.unit_clips)]
    bundles = decoded(index, units, encoding, reserved=1).iter_internal_ref_bundles()
    return steady_rate(bundle.num_rows() for bundle in bundles)


def lines(index: ClipIndex, encoding: Encoding) -> list[Line]:
    many = repeated(index, CLIPS)
    floor = bare_rate(repeated(index, CLIPS // 4))
    return [Line("clips decoded per core through Ray Data", ray_rate(many, encoding), "clips/s", floor, ">= 0.90")]
