"""Garbage of a store: what no record refers to. `find` looks, `delete` deletes; in between a person may read the list.

A run's record (`runs/{run_id}.json`) names the artifacts it built or used, an artifact's record names its inputs. What neither names is
garbage, finished or not; so are scratch folders inside finished artifacts and leases whose holders are gone. A run counts if it is among
the newest of its job, is younger than the age given, or never ended: whether it lives cannot be known from afar, and its record must
be deleted by hand to let go of what it names. Deleting holds the artifact's lease and looks once more whether something refers to it;
the record goes first, so that half an artifact is never taken for whole. Where a record cannot be read, or a store holds no run, nothing
is touched.
Not covered: files that are none of kinetok's, which are left alone, and MLflow, whose registry may point at models here.
"""

import contextlib
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from kinetok.infra.artifact import LEASE, RECORD, WORK, Artifact, Lease, Store
from kinetok.infra.errors import StoreError
from kinetok.infra.job_run import JobRun, recent_runs
from kinetok.infra.storage import Folder

_NAME = re.compile(r".+-([0-9a-f]{16})")
Name = tuple[str, str]
"""Kind and key of an artifact; its stage's name is a label."""


@dataclass(frozen=True)
class Garbage:
    """A folder that may go, or a part of it."""

    folder: Folder
    what: Literal["artifact", "unfinished", "scratch", "lease"]
    bytes: int


@dataclass(frozen=True)
class Rules:
    """What counts as old."""

    age: float
    """Seconds: younger runs and artifacts are left alone."""
    keep_runs: int | None = None
    """Newest runs of each job that count; None: all."""


def find(store: Store, rules: Rules) -> list[Garbage]:
    """Everything that may go. Raises StoreError where a record cannot be read, or nothing says what is wanted."""
    wanted = _wanted(store, rules)
    return [garbage for kind, folder in _folders(store) for garbage in _look(store, kind, folder, wanted, rules)]


def delete(store: Store, found: list[Garbage], rules: Rules) -> list[Garbage]:
    """Delete what of `found` is still garbage and in nobody's hands; returns what went."""
    return [garbage for garbage in found if _delete(store, garbage, rules)]


def _folders(store: Store) -> Iterator[tuple[str, Folder]]:
    """Folders of artifacts, finished or not; anything else in a store is not ours to judge."""
    for kind in store.root.folders():
        for name in (store.root / kind).folders():
            if _NAME.fullmatch(name):
                yield kind, store.root / kind / name


def _wanted(store: Store, rules: Rules) -> set[Name]:
    """What the runs that count name, and all that it was made of."""
    runs = recent_runs(store, sys.maxsize)
    if not runs:
        raise StoreError(f"{store.root} holds no record of a run, so nothing says what is wanted: nothing is deleted")
    wanted = {(stage.kind, stage.key) for run in _counting(runs, rules) for stage in run.stages.values()}
    inputs = {(a.kind, a.key): {(i.kind, i.key) for infos in a.record.inputs.values() for i in infos} for a in store.all()}
    waiting = list(wanted)
    while waiting:
        new = inputs.get(waiting.pop(), set()) - wanted
        wanted |= new
        waiting += new
    return wanted


def _counting(runs: list[JobRun], rules: Rules) -> Iterator[JobRun]:
    """The runs whose artifacts stay; `runs` are newest first."""
    seen: dict[str, int] = defaultdict(int)
    for run in runs:
        seen[run.job] += 1
        among_newest = rules.keep_runs is None or seen[run.job] <= rules.keep_runs
        if among_newest or run.ended is None or _age(run.ended) < rules.age:
            yield run


def _look(store: Store, kind: str, folder: Folder, wanted: set[Name], rules: Rules) -> Iterator[Garbage]:
    if Lease(folder).held:
        return
    artifact, files = store.read(folder), folder.files()
    size = sum(files.values())
    if artifact is None:
        if (kind, _key(folder)) not in wanted:
            yield Garbage(folder, "unfinished", size)
    elif (kind, artifact.key) not in wanted and _artifact_age(artifact) >= rules.age:
        yield Garbage(folder, "artifact", size)
    else:
        scratch = sum(size for name, size in files.items() if name.startswith(f"{WORK}/"))
        if scratch:
            yield Garbage(folder, "scratch", scratch)
        if LEASE in files:
            yield Garbage(folder, "lease", files[LEASE])


def _delete(store: Store, garbage: Garbage, rules: Rules) -> bool:
    folder = garbage.folder
    lease = Lease(folder)
    if not lease.acquire():
        return False
    try:
        # A run that began since may have named it; its record is written before it takes a lease or uses a finished artifact.
        if garbage.what in ("artifact", "unfinished"):
            kind = folder.url.rsplit("/", 2)[1]
            if (kind, _key(folder)) in _wanted(store, rules):
                return False
            folder.remove(RECORD)
            folder.clear(keep=LEASE)
        else:
            folder.remove(WORK)
    finally:
        lease.release()
    if folder.is_local:
        with contextlib.suppress(OSError):
            folder.local.rmdir()
    return True


def _key(folder: Folder) -> str:
    found = _NAME.fullmatch(folder.url.rsplit("/", 1)[1])
    assert found is not None
    return found[1]


def _artifact_age(artifact: Artifact) -> float:
    return _age(artifact.record.started) - artifact.record.seconds


def _age(when: str) -> float:
    return time.time() - datetime.fromisoformat(when).timestamp()
