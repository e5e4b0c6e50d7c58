"""Quarantined samples of an artifact: list them and sum them up by reason, whichever stage wrote them. Retrying is in `retry.py`."""

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import THREADS
from kinetok.pipelines.data.reasons import MEANINGS

COLUMNS = ("id", "shard", "reason", "message", "position")
"""Columns that every quarantine table has, whichever stage wrote it."""


@dataclass(frozen=True)
class ReasonCount:
    """How many samples share a reason, with a few of them."""

    reason: str
    meaning: str
    count: int
    examples: tuple[tuple[str, str], ...]
    """(id, message)."""


def rows(folder: Folder) -> list[dict[str, object]]:
    """Every quarantined sample of an artifact's folder, with the columns `COLUMNS`."""
    parts = _parts(folder, "quarantine")
    if parts:
        return _read(folder, parts, None)
    return _read(folder, _parts(folder, "index"), pc.field("decision") == "quarantined")


def report(folder: Folder, *, examples: int = 3) -> list[ReasonCount]:
    """Quarantined samples by reason, most frequent first."""
    found = rows(folder)
    by_reason = Counter(str(row["reason"]) for row in found)
    return [
        ReasonCount(
            reason,
            MEANINGS[reason],
            count,
            tuple((str(row["id"]), str(row["message"])) for row in found if row["reason"] == reason)[:examples],
        )
        for reason, count in by_reason.most_common()
    ]


def summary(folder: Folder) -> str:
    """`report` as lines of text."""
    return "\n".join(
        f"  {entry.count:6d} {entry.reason}: {entry.meaning}; first {_printable(': '.join(entry.examples[0]))}"
        for entry in report(folder, examples=1)
    )


def listing(folder: Folder) -> str:
    """Every quarantined sample, one line each: `COLUMNS` with tabs between."""
    return "\n".join("\t".join(_printable("" if row[name] is None else row[name]) for name in COLUMNS) for row in rows(folder))


def _printable(value: object) -> str:
    """Text from strangers without what a terminal would obey."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(value))


def _parts(folder: Folder, under: str) -> list[str]:
    if not folder.exists(under):
        return []
    return [name for name in folder.files(under) if name.endswith(".parquet")]


def _read(folder: Folder, parts: list[str], chosen: pa.compute.Expression | None) -> list[dict[str, object]]:
    def read(name: str) -> pa.Table:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(folder.read_bytes(name)))
        if chosen is None:
            return file.read(list(COLUMNS))
        if "decision" not in file.schema_arrow.names:
            return pa.table({name: [] for name in COLUMNS})  # the index of token shards lists sound samples only
        return file.read([*COLUMNS, "decision"]).filter(chosen).select(list(COLUMNS))

    with ThreadPoolExecutor(THREADS) as threads:
        return [row for table in threads.map(read, parts) for row in table.to_pylist()]
