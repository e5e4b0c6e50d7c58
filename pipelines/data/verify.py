"""Deep checks of data artifacts, beyond the digests that every artifact has: counts re-added from the parts, ids unique, shards whole.

`problems` re-reads everything and yields one sentence per finding, naming the file; none means that the artifact is sound (contracts 1
and 2). Not covered: whether pixels or tokens are right, which only making them again can tell.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError

from kinetok.infra.artifact import Artifact, Counts
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.tars import DamagedShard, read_members
from kinetok.pipelines.data.token_shards import MOMENTS, Moments, added, index_name, member_name, no_moments, quarantine_name, shard_name

DECISIONS = {"kept": "written", "filtered": "filtered", "quarantined": "quarantined"}
"""Decision of a clip index row -> the count it adds to."""


def problems(artifact: Artifact) -> Iterator[str]:
    """Everything wrong with an artifact; its own digests first, then what its kind promises."""
    yield from artifact.problems()
    if artifact.kind == "clips":
        yield from _clips(artifact)
    elif artifact.kind in ("encode", "vit", "text"):
        yield from _shards(artifact)


class _Unreadable(NamedTuple):
    """A file that is no Parquet table."""

    sentence: str


def _table(folder: Folder, name: str, columns: list[str]) -> pa.Table | _Unreadable:
    try:
        return pq.read_table(io.BytesIO(folder.read_bytes(name)), columns=columns)
    except (pa.ArrowException, OSError) as error:
        return _Unreadable(f"{name}: cannot be read ({error})")


def _clips(artifact: Artifact) -> Iterator[str]:
    rows = {str(line["path"]): line["count"] for line in artifact.manifest()}
    total: Counter[str] = Counter()
    ids: list[pa.ChunkedArray] = []
    for name in artifact.folder.files("index"):
        part = _table(artifact.folder, name, ["id", "decision"])
        if isinstance(part, _Unreadable):
            yield part.sentence
            continue
        if len(part) != rows.get(name, len(part)):
            yield f"{name}: {len(part)} rows, the manifest says {rows[name]}"
        found = Counter(part["decision"].to_pylist())
        total += found
        ids.append(part["id"])
    counts = Counts(input=total.total(), **{count: total[decision] for decision, count in DECISIONS.items()})
    yield from _compare(counts, artifact.record.counts)
    yield from _doubled(ids)


def _shards(artifact: Artifact) -> Iterator[str]:
    folder = artifact.folder
    recorded = {
        str(line["path"]): {name: Moments.model_validate(line[name]) for name in no_moments() if name in line}
        for line in artifact.manifest()
    }
    shards = {int(name.rpartition("/")[2].partition(".")[0]) for sub in ("shards", "index", "quarantine") for name in folder.files(sub)}
    yield from (f"{shard_name(shard)}: missing" for shard in range(max(shards, default=0)) if shard not in shards)
    written = bad = 0
    ids: list[pa.ChunkedArray] = []
    for shard in sorted(shards):
        index = _table(folder, index_name(shard), ["id", "place", "split", "offset", "bytes"])
        if isinstance(index, _Unreadable):
            yield index.sentence
            continue
        written += len(index)
        ids.append(index["id"])
        yield from _shard(folder, shard, index, recorded.get(shard_name(shard), {}))
        if folder.exists(quarantine_name(shard)):
            quarantine = _table(folder, quarantine_name(shard), ["id"])
            if isinstance(quarantine, _Unreadable):
                yield quarantine.sentence
                continue
            bad += len(quarantine)
            ids.append(quarantine["id"])
    yield from _compare(Counts(input=written + bad, written=written, quarantined=bad), artifact.record.counts)
    yield from _doubled(ids)


def _shard(folder: Folder, shard: int, index: pa.Table, recorded: Mapping[str, Moments]) -> Iterator[str]:
    """The tar must open strictly, hold the members of the index at their offsets, in order, and nothing else, and add up to its moments."""
    name = shard_name(shard)
    found: list[tuple[str, int, int]] = []
    ids: list[str] = []
    moments, splits = no_moments(), index["split"].to_pylist()
    try:
        with folder.open(name) as file:
            for member in read_members(file, name):
                if member.name.endswith(".json"):
                    ids.append(str(json.loads(member.data)["id"]))
                else:
                    found.append((member.name, member.offset, member.size))
                    moments = added(moments, member.data, splits[len(found) - 1] if len(found) <= len(splits) else None)
    except SafetensorError as error:
        yield f"{name}: a sample cannot be read ({error})"
        return
    except (DamagedShard, FileNotFoundError) as error:
        yield f"{name}: {error}"
        return
    rows = index.to_pylist()
    if found != [(member_name(shard, row["place"], "safetensors"), row["offset"], row["bytes"]) for row in rows]:
        yield f"{name}: holds {len(found)} samples that are not the {len(rows)} of its index, or not where it says"
    elif ids != [row["id"] for row in rows]:
        yield f"{name}: ids of its samples are not those of its index"
    elif any(recorded.get(name, Moments()) != sums for name, sums in moments.items() if name in recorded or name == MOMENTS):
        yield f"{name}: the sums of its latents are not those of the manifest"


def _compare(found: Counts, recorded: Counts) -> Iterator[str]:
    for name in Counts.model_fields:
        if getattr(found, name) != getattr(recorded, name):
            yield f"the parts add up to {getattr(found, name)} {name}, the record says {getattr(recorded, name)}"


def _doubled(ids: list[pa.ChunkedArray]) -> Iterator[str]:
    together = pa.chunked_array([chunk for array in ids for chunk in array.chunks], pa.string())
    if pc.count_distinct(together).as_py() != len(together):
        twice = [item["values"] for item in pc.value_counts(together).to_pylist() if item["counts"] > 1]
        yield f"{len(twice)} ids occur more than once, among them {', '.join(map(repr, twice[:3]))}"
