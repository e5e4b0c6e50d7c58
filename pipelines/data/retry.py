"""Try the quarantined samples of an artifact again: those of `clips` at once, those of `encode` in the next run.

Of `clips`, only quarantined samples are read, and what came of it is published: after a fault that was not in the data (a read cut
short, a full memory), a new decoder, or a repaired file of a folder. A damaged tar is streamed once more as a whole. The artifact keeps
its key, because what was asked for is the same, and gets a new digest: what was built on the old one is refused from then on, with the
remedy to build it again. The record is removed first and written last, so that a kill in between leaves an unfinished artifact which the
next run completes from its parts. A tar that changed is refused: a run lists the source anew. `encode` needs a model and machines, which
are a run's to find: the shards that have quarantined samples are opened again, as a kill would have left them, and the next run encodes
them alone.
"""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow.parquet

from kinetok.infra.artifact import RECORD, Artifact, Lease, Store, publish
from kinetok.infra.errors import DataError, StoreError
from kinetok.infra.stage import Resources
from kinetok.pipelines.data.clip_index import Row, part_name
from kinetok.pipelines.data.clip_parts import (
    Candidate,
    candidate_rows,
    finish_index,
    finished_parts,
    read_video_file,
    shard_rows,
    write_part,
)
from kinetok.pipelines.data.guard import Guard, guard
from kinetok.pipelines.data.reasons import Reason
from kinetok.pipelines.data.recipe import CutRecipe, IndexRecipe
from kinetok.pipelines.data.sources import Shard, SourcePlan, check_unchanged, read_range

SHARDED = ("encode", "vit")
"""Kinds whose shards are made one by one of the clips of an index."""
_IN_THE_TAR = (Reason.UNSAFE_MEMBER, Reason.DUPLICATE, Reason.TOO_LARGE)
"""Reasons that only another tar can remove."""


@dataclass(frozen=True)
class Retried:
    """The artifact as published again, with how many samples were quarantined before and after."""

    artifact: Artifact
    before: int
    after: int


def retry(store: Store, artifact: Artifact) -> Retried:
    """Try again what a `clips` artifact quarantined. Raises DataError on another kind or on changed tars, StoreError where it is in use."""
    _require_kind(artifact, "clips")
    with _alone(artifact):
        return _retry(artifact, _plan(store, artifact))


def reopen(artifact: Artifact) -> int:
    """Make the next run encode the shards of an `encode` or `vit` artifact that have quarantined samples; how many those are.

    Raises DataError on another kind, StoreError where it is in use.
    """
    _require_kind(artifact, *SHARDED)
    folder = artifact.folder
    with _alone(artifact):
        indices = [name.replace("quarantine/", "index/") for name in folder.files("quarantine")]
        for name in [RECORD, *indices] if indices else ():
            folder.remove(name)
    return len(indices)


def _require_kind(artifact: Artifact, *kinds: str) -> None:
    if artifact.kind not in kinds:
        raise DataError(f"{artifact.name} is made by `{artifact.kind}`, which cannot be tried again in part: force it")


@contextmanager
def _alone(artifact: Artifact) -> Iterator[None]:
    lease = Lease(artifact.folder)
    if not lease.acquire():
        raise StoreError(f"{artifact.folder} is being built by {lease.who()}; wait for it to end")
    try:
        yield
    finally:
        lease.release()


def _plan(store: Store, artifact: Artifact) -> SourcePlan:
    (made_from,) = artifact.record.inputs["videos"]
    ingest = store.get(made_from.kind, made_from.name, made_from.key)
    if ingest is None:
        raise StoreError(f"the listing {made_from.name}-{made_from.key} is gone from {store.root}; run the job again")
    return SourcePlan(ingest.folder)


def _retry(artifact: Artifact, plan: SourcePlan) -> Retried:
    began = time.monotonic()
    folder, record = artifact.folder, artifact.record
    recipe = IndexRecipe.model_validate({name: value for name, value in record.config.items() if name in IndexRecipe.model_fields})
    before = finished_parts(folder)
    shards = [shard for shard in plan.shards() if before[shard.shard]["quarantined"]]
    for shard in shards:
        check_unchanged(shard)
    folder.remove(RECORD)
    seconds = Resources.model_validate(record.resources).decode_seconds
    with guard(seconds, apart=True) as guarded:
        for shard in shards:
            old: list[Row] = pyarrow.parquet.read_table(io.BytesIO(folder.read_bytes(part_name(shard.shard)))).to_pylist()
            write_part(shard.shard, _again(old, shard, plan, recipe, guarded), folder)
    parts = finished_parts(folder)
    counts = finish_index(folder, parts.values(), recipe)
    taken = record.seconds + time.monotonic() - began
    clips = {"clips": float(counts.written), "seconds": counts.written * recipe.frames / recipe.fps}
    retries = {"retries": (record.metrics.get("retries") or 0.0) + 1}
    update = {"counts": counts, "seconds": taken, "metrics": {**record.metrics, **clips, **retries}}
    published = publish(folder, record.model_copy(update=update))
    return Retried(published, record.counts.quarantined, counts.quarantined)


def _again(old: list[Row], shard: Shard, plan: SourcePlan, recipe: CutRecipe, guarded: Guard) -> list[Row]:
    """Rows of a part with its quarantined samples tried again, in their old places."""
    if any(row["reason"] == Reason.DAMAGED_SHARD for row in old):
        return list(shard_rows(shard, plan, recipe, guarded))
    rows: list[Row] = []
    for row in old:
        again = row["decision"] == "quarantined" and (shard.kind == "folder" or row["reason"] not in _IN_THE_TAR)
        rows += candidate_rows(_candidate(row, shard), shard.shard, recipe, guarded) if again else [row]
    return rows


def _candidate(row: Row, shard: Shard) -> Candidate:
    url = str(row["url"])
    if shard.kind == "folder":
        data, problem = read_video_file(url)
        offset = 0
    else:
        offset, problem = int(row["offset"] or 0), None
        data = read_range(url, offset, int(row["bytes"] or 0))
    text = {name: str(row[name]) for name in ("video", "member", "caption", "group", "split")}
    return Candidate(**text, url=url, offset=offset, size=len(data), data=data, problem=problem)
