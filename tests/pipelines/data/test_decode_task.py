"""Units of `encode`: how an output shard is cut for the decoders, and what these load. What the plan computes: `stages/test_encode.py`."""

import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pytest

from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.decode_task import Unit, cut_units


def index_of(windows: Iterable[int], shard_clips: int) -> ClipIndex:
    """Videos of so many windows each."""
    offsets = np.repeat(*np.array(list(enumerate(windows))).T)
    return ClipIndex(pa.table({"url": ["a.tar"] * len(offsets), "offset": offsets}), 8.0, 17, 64, 64, shard_clips)


@pytest.mark.parametrize("seed", range(5))
def test_units_cover_a_shard_in_order_and_stay_within_their_size(seed: int) -> None:
    random = np.random.default_rng(seed)
    index = index_of(random.integers(1, 30, 40), shard_clips=64)
    for shard, rows in enumerate(index.shards):
        units = cut_units(index, shard, 20)
        assert [unit.shard for unit in units] == [shard] * len(units)
        covered = [unit.first + clip for unit in units for clip in range(unit.clips)]
        assert covered == rows.tolist()
        assert all(unit.place == unit.first - rows[0] and 1 <= unit.clips <= 20 for unit in units)


def test_cuts_fall_between_videos_and_leave_even_units() -> None:
    index = index_of([3] * 22, shard_clips=66)
    units = cut_units(index, 0, 60)
    assert units == [Unit(0, 0, 0, 33), Unit(0, 33, 33, 33)]


def test_a_video_of_more_windows_than_a_unit_is_cut() -> None:
    index = index_of([50], shard_clips=64)
    assert [unit.clips for unit in cut_units(index, 0, 20)] == [20, 20, 10]


def test_every_shard_starts_at_its_own_first_row() -> None:
    index = index_of([1] * 10, shard_clips=4)
    assert [cut_units(index, shard, 4) for shard in range(3)] == [[Unit(0, 0, 0, 4)], [Unit(1, 0, 4, 4)], [Unit(2, 0, 8, 2)]]


def test_a_decoder_never_loads_torch() -> None:
    code = "import sys, kinetok.pipelines.data.decode_task; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
