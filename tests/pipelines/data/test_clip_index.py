"""The index keeps order, groups kept rows into shards, reads pixels by range, and stays quick at a million rows."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from tests.pipelines.data.videos import encode, moving

from kinetok.infra.artifact import Artifact, Record
from kinetok.infra.errors import DataError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import SCHEMA, ClipIndex, Row, part_bytes, part_name, read_parts
from kinetok.pipelines.data.decode import decode_clip
from kinetok.pipelines.data.reasons import BadVideo
from kinetok.tokenizers.base import DecodeRecipe

GEOMETRY = {"fps": 8.0, "frames": 5, "height": 16, "width": 24, "shard_clips": 3}


def _artifact(folder: Path) -> Artifact:
    (folder / "clips.json").write_text(json.dumps(GEOMETRY))
    record = Record(kind="clips", name="clips", key="0" * 16, version=1, config={}, digest="", started="", seconds=0)
    return Artifact(Folder(str(folder)), record)


def _part(folder: Path, shard: int, rows: list[Row]) -> None:
    Folder(str(folder)).write_bytes(part_name(shard), part_bytes(rows))


def test_kept_rows_in_source_order_and_shards(tmp_path: Path) -> None:
    for shard in (2, 0, 1):
        decisions = ("kept", "filtered", "kept", "quarantined", "kept") if shard else ("kept",)
        _part(tmp_path, shard, [{"id": f"{shard}-{i}", "shard": shard, "decision": name} for i, name in enumerate(decisions)])
    index = ClipIndex.open(_artifact(tmp_path))
    assert index.rows["id"].to_pylist() == ["0-0", "1-0", "1-2", "1-4", "2-0", "2-2", "2-4"]
    assert [shard.tolist() for shard in index.shards] == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(index) == 7
    assert index.recipe == DecodeRecipe(fps=8, frames=5, height=16, width=24)
    assert "decision" not in index.rows.column_names


def test_part_bytes_are_reproducible_and_typed(tmp_path: Path) -> None:
    rows: list[Row] = [{"id": "a", "start": 0.125, "motion": 1.5, "decision": "kept"}]
    assert part_bytes(rows) == part_bytes(rows)
    _part(tmp_path, 0, rows)
    assert pyarrow.parquet.read_schema(tmp_path / part_name(0)).equals(SCHEMA)
    assert read_parts(Folder(str(tmp_path))).num_rows == 1


def test_no_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no clip index"):
        ClipIndex.open(_artifact(tmp_path))


def test_clips_are_read_by_range(tmp_path: Path) -> None:
    videos = [encode(moving(12, seed=seed), rate=8) for seed in range(2)]
    (tmp_path / "source.bin").write_bytes(b"head" + videos[0] + videos[1])
    rows: list[Row] = [
        {"id": f"{i}", "url": str(tmp_path / "source.bin"), "offset": offset, "bytes": len(data), "start": start, "decision": "kept"}
        for i, (offset, data, start) in enumerate([(4, videos[0], 0.0), (4 + len(videos[0]), videos[1], 0.5)])
    ]
    _part(tmp_path, 0, rows)
    index = ClipIndex.open(_artifact(tmp_path))
    for row, (data, start) in enumerate([(videos[0], 0.0), (videos[1], 0.5)]):
        assert np.array_equal(index.read_clip(row), decode_clip(data, start=start, fps=8, frames=5, height=16, width=24))
    (tmp_path / "source.bin").write_bytes(b"changed")
    with pytest.raises(BadVideo):
        index.read_clip(0)
    (tmp_path / "source.bin").unlink()
    with pytest.raises(DataError, match=r"source\.bin is gone"):
        index.read_clip(0)


def test_a_million_rows_open_as_columns(tmp_path: Path) -> None:
    count = 250_000
    for shard in range(4):
        table = {name: [None] * count for name in SCHEMA.names}
        table |= {"id": [f"video-{shard}-{i}/0" for i in range(count)], "decision": ["kept"] * count}
        (tmp_path / "index").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(table, schema=SCHEMA), tmp_path / part_name(shard))
    index = ClipIndex.open(_artifact(tmp_path))
    assert len(index) == 4 * count and len(index.shards) == -(-4 * count // 3)
    assert index.rows["id"][count].as_py() == "video-1-0/0"
