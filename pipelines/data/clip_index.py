"""The clip index: one row per window, filtered video or quarantined sample; no pixels. `ClipIndex` is how later stages read clips.

A `clips` artifact holds `index/{shard:06d}.parquet`, one part per source shard (columns: `SCHEMA`), and `clips.json`. Rows stand in
the order of the source: shard, member, start. Kept rows are numbered over all parts; groups of `shard_clips` consecutive kept rows
are the output shards of every `encode` and the shards of the training order. Pixels are decoded from the source by range read.
"""

import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from numpy.typing import NDArray

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import DataError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.sources import read_range

if TYPE_CHECKING:
    from kinetok.pipelines.data.decode import Pixels
    from kinetok.tokenizers.base import DecodeRecipe

SCORES = ("motion", "luma_mean", "luma_std")
"""motion: mean change between sampled frames; luma_mean, luma_std: brightness and its spread inside a frame. In grey levels of 255."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("video", pa.string()),
        ("shard", pa.int32()),
        ("url", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("source_fps", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        *((name, pa.float32()) for name in SCORES),
        ("decision", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("position", pa.float64()),
    ]
)
THREADS = 16
"""Parts read at a time: an object store answers each in tens of milliseconds."""
_VERDICT = ("decision", "reason", "message", "position")
Row = Mapping[str, str | int | float | None]


def part_name(shard: int) -> str:
    """Path of the part of one source shard."""
    return f"index/{shard:06d}.parquet"


def part_bytes(rows: list[Row]) -> bytes:
    """A part as Parquet; columns absent from a row are null."""
    columns = {name: [row.get(name) for row in rows] for name in SCHEMA.names}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns, schema=SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_parts(folder: Folder, *, columns: list[str] | None = None, decision: str | None = None) -> pa.Table:
    """The parts below `folder` as one table in order; only rows of `decision` where given."""
    parts = [name for name in folder.files("index") if name.endswith(".parquet")]
    if not parts:
        raise DataError(f"{folder} holds no clip index: it is not a finished `clips` artifact")
    chosen = None if decision is None else pc.field("decision") == decision

    def read(name: str) -> pa.Table:
        return pyarrow.parquet.read_table(io.BytesIO(folder.read_bytes(name)), columns=columns, schema=SCHEMA, filters=chosen)

    with ThreadPoolExecutor(THREADS) as threads:
        return pa.concat_tables(threads.map(read, parts))


@dataclass(frozen=True)
class ClipIndex:
    """The kept clips of a `clips` artifact."""

    rows: pa.Table
    """Kept rows in order, `SCHEMA` without the columns of the verdict."""
    fps: float
    frames: int
    height: int
    width: int
    shard_clips: int

    @classmethod
    def open(cls, artifact: Artifact) -> "ClipIndex":
        """Raises DataError where the artifact is no clip index."""
        recipe = json.loads(artifact.folder.read_text("clips.json"))
        columns = [name for name in SCHEMA.names if name not in _VERDICT]
        return cls(read_parts(artifact.folder, columns=columns, decision="kept"), **recipe)

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def splits(self) -> set[str]:
        """The splits that have clips."""
        return set(pc.unique(self.rows["split"]).to_pylist())

    @property
    def recipe(self) -> "DecodeRecipe":
        """How pixels are made of a row; part of the token contract."""
        from kinetok.tokenizers.base import DecodeRecipe

        return DecodeRecipe(fps=self.fps, frames=self.frames, height=self.height, width=self.width)

    @cached_property
    def shards(self) -> list[NDArray[np.int64]]:
        """Row numbers of each output shard."""
        numbers = np.arange(len(self), dtype=np.int64)
        return [numbers[start : start + self.shard_clips] for start in range(0, len(self), self.shard_clips)]

    @property
    def clip_bytes(self) -> int:
        """Of a clip's pixels."""
        return self.frames * self.height * self.width * 3

    def read_clip(self, row: int) -> "Pixels":
        """Pixels of one row, uint8 (frames, height, width, 3). Raises BadVideo where they do not decode, DataError without a source."""
        from kinetok.pipelines.data.decode import decode_clip

        at = self.rows.slice(row, 1).select(["url", "offset", "bytes", "start"]).to_pylist()[0]
        try:
            data = read_range(at["url"], at["offset"], at["bytes"])
        except FileNotFoundError as error:
            raise DataError(
                f"{at['url']} is gone since its clips were cut; put it back, or run again: the source will be listed anew"
            ) from error
        return decode_clip(data, start=at["start"], fps=self.fps, frames=self.frames, height=self.height, width=self.width)
