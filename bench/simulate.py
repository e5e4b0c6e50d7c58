"""10,000 shards and 1,000 workers against an object store that answers in simulated time: what a shard costs, and what limits first.

    python bench/simulate.py

The planner, the listing, leases, parts, shards, resume and publishing are the real ones, down to the requests of `infra/s3.py` and its
repetitions; under them stands a store in memory that has latencies and, for each prefix, S3's published limits of requests per second,
beyond which it answers SlowDown. Simulated are the store, the workers' computing and the clock. Not simulated: Ray (about 25 ms of the
driver for each block), networks and their bandwidth.

Prints what the driver computes for one shard (real CPU milliseconds, which must stay flat), requests for one shard, and how far from
alone the workers run; then a job of the same workers with ever less work in each shard, until the store is the bottleneck.
"""

import argparse
import heapq
import json
import random
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import md5
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from botocore.exceptions import ClientError
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save

from kinetok.infra import s3
from kinetok.infra.artifact import MANIFEST, Counts, Lease, Record, Store, publish
from kinetok.infra.errors import StoreError
from kinetok.infra.job import parse_job
from kinetok.infra.plan import Step, plan
from kinetok.infra.storage import Folder
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.data.clip_index import Row
from kinetok.pipelines.data.clip_parts import finish_index, finished_parts, write_part
from kinetok.pipelines.data.recipe import IndexRecipe
from kinetok.pipelines.data.sources import SourcePlan, check_unchanged, list_source, write_plan
from kinetok.pipelines.data.token_shards import Sample, resume, write_shard

T = TypeVar("T")
TAR_BYTES = 256 << 20
CLIPS = 8
"""Of a shard; a real one has more, which costs workers and not the driver."""
SECONDS = {"put": 0.04, "get": 0.02, "list": 0.08}
"""From request to answer."""
LIMITS = {"put": 3500, "get": 5500, "list": 5500}
"""Requests per second that S3 promises for a prefix."""
ROUNDS = 10
"""Shards of one worker, where the store's limit is sought."""
SPREAD = 0.3
"""Of the workers' computing times, as a part of their mean."""


@dataclass
class Clock:
    """Simulated seconds of whoever is at work."""

    now: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class MemoryStore:
    """The requests of botocore's S3 client that kinetok makes, on a dictionary."""

    clock: Clock
    files: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)
    """Size, tag and content; of a source tar the content is not there."""
    names: list[str] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    busy: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    """Requests by sort, prefix and second."""
    limited: bool = True
    """The driver's own requests are few; those of workers are held against the limits."""

    def add(self, name: str, data: bytes, size: int | None = None) -> None:
        if name not in self.files:
            insort(self.names, name)
        self.files[name] = (len(data) if size is None else size, f'"{md5(data + name.encode()).hexdigest()}"', data)

    def put_object(self, Bucket: str, Key: str, Body: bytes, IfNoneMatch: str = "", IfMatch: str = "", **_: object) -> s3.Answer:
        self._asked("put", Key)
        held = self.files.get(Key)
        if (IfNoneMatch and held) or (IfMatch and (held is None or held[1].strip('"') != IfMatch)):
            raise _error("PreconditionFailed", 412)
        self.add(Key, bytes(Body))
        return {"ETag": self.files[Key][1]}

    def get_object(self, Bucket: str, Key: str, Range: str = "", **_: object) -> s3.Answer:
        self._asked("get", Key)
        size, tag, data = self._held(Key)
        first, _dash, last = Range.removeprefix("bytes=").partition("-")
        part = data[int(first or 0) : int(last or size) + 1]
        if Range and not data:
            raise _error("InvalidRange", 416)
        return {"Body": BytesIO(part), "ContentLength": len(part), "ContentRange": f"bytes {Range}/{size}", "ETag": tag}

    def head_object(self, Bucket: str, Key: str) -> s3.Answer:
        self._asked("get", Key)
        size, tag, _ = self._held(Key)
        return {"ContentLength": size, "ETag": tag, "Metadata": {}}

    def delete_object(self, Bucket: str, Key: str, **_: object) -> s3.Answer:
        self._asked("put", Key)
        if self.files.pop(Key, None):
            del self.names[bisect_left(self.names, Key)]
        return {}

    def delete_objects(self, Bucket: str, Delete: s3.Answer) -> s3.Answer:
        self._asked("put", Delete["Objects"][0]["Key"])
        for row in Delete["Objects"]:
            if self.files.pop(row["Key"], None):
                del self.names[bisect_left(self.names, row["Key"])]
        return {}

    def list_objects_v2(
        self, Bucket: str, Prefix: str, MaxKeys: int, ContinuationToken: str = "", Delimiter: str = "", **_: object
    ) -> s3.Answer:
        self._asked("list", Prefix)
        at = bisect_left(self.names, max(Prefix, ContinuationToken))
        rows: list[s3.Answer] = []
        folders: dict[str, None] = {}
        while at < len(self.names) and self.names[at].startswith(Prefix) and len(rows) + len(folders) < MaxKeys:
            name = self.names[at]
            below = name.removeprefix(Prefix)
            if Delimiter and Delimiter in below:
                folder = Prefix + below.partition(Delimiter)[0] + Delimiter
                folders[folder] = None
                at = bisect_left(self.names, folder + chr(0x10FFFF))
                continue
            rows.append({"Key": name, "Size": self.files[name][0], "ETag": self.files[name][1]})
            at += 1
        more = at < len(self.names) and self.names[at].startswith(Prefix)
        found = {"Contents": rows, "CommonPrefixes": [{"Prefix": name} for name in folders], "IsTruncated": more}
        return found | ({"NextContinuationToken": self.names[at]} if more else {})

    def _held(self, name: str) -> tuple[int, str, bytes]:
        if name not in self.files:
            raise _error("NoSuchKey", 404)
        return self.files[name]

    def _asked(self, sort: str, name: str) -> None:
        """Count a request and let its time pass; one beyond the second's limit of its prefix is refused."""
        self.asked[sort] += 1
        prefix = "/".join(name.split("/")[:3])
        place = (sort, prefix, int(self.clock.now))
        self.clock.now += SECONDS[sort]
        if self.limited and self.busy[place] >= LIMITS[sort]:
            self.refused += 1
            raise _error("SlowDown", 503)
        self.busy[place] += self.limited


def _error(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "simulated")


@dataclass
class Phase:
    """What one stage took."""

    makespan: float
    """Simulated seconds from the first worker's start to the last one's end."""
    alone: float
    """The same for workers that never wait for the store."""
    store_seconds: float
    """Of a worker, for one shard."""


@dataclass
class Outcome:
    """One simulated job: ingest, clips, encode, and the plan of a second run that finds all of it."""

    shards: int
    driver: dict[str, float]
    """Real CPU seconds of the driver, by what it did."""
    requests: Counter[str]
    phases: dict[str, Phase]
    peak: int
    """Most puts that one prefix took in a second."""
    refused: int
    """SlowDown answers."""
    given_up: int
    """Shards whose commit was given up after all repetitions, and made again."""

    @property
    def milliseconds(self) -> float:
        return 1000 * sum(self.driver.values()) / self.shards


class Simulation:
    """A job on `shards` shards and `workers` workers, each shard taking `compute` seconds of a worker on average."""

    def __init__(self, shards: int, workers: int, compute: float, seed: int) -> None:
        self.shards, self.workers, self.compute = shards, workers, compute
        self.random = random.Random(seed)
        random.seed(seed)  # of the waits before a request is repeated
        self.clock = Clock()
        self.memory = MemoryStore(self.clock)
        s3._client = lambda: self.memory
        s3.time = SimpleNamespace(monotonic=lambda: self.clock.now, sleep=self.clock.sleep)  # type: ignore[attr-defined]
        self.driver: dict[str, float] = {}
        self.given_up = 0
        for number in range(shards):
            self.memory.add(f"webvid/{number:06d}.tar", b"", TAR_BYTES)

    def run(self) -> Outcome:
        source = f"s3://data/webvid/{{000000..{self.shards - 1:06d}}}.tar"
        clips = {"kind": "clips", "videos": "videos", "fps": 8, "frames": 17, "height": 64, "width": 64, "shard_clips": CLIPS}
        job = parse_job({"name": "sim", "stages": {"videos": {"kind": "ingest", "source": source}, "clips": clips}}, STAGES)
        store = Store(Folder("s3://data/store"))
        ingest, cut = self._driver("plan", lambda: plan(job, store))
        self._publish(ingest, lambda: write_plan(ingest.folder, list_source(source)))
        phases = {"clips": self._clips(cut, SourcePlan(ingest.folder)), "encode": self._encode(store.folder("encode", "tokens", "0" * 16))}
        again = self._driver("plan again", lambda: plan(job, store))
        assert all(step.artifact for step in again), "the second run finds all of the first"
        peak = max((count for (sort, _, _), count in self.memory.busy.items() if sort == "put"), default=0)
        return Outcome(self.shards, self.driver, self.memory.asked, phases, peak, self.memory.refused, self.given_up)

    def _clips(self, step: Step, source: SourcePlan) -> Phase:
        out, recipe = step.folder, IndexRecipe.model_validate(step.stage.model_dump(include=set(IndexRecipe.model_fields)))
        shards = self._driver("list shards", source.shards)
        assert self._driver("resume", lambda: finished_parts(out)) == {}
        parts: dict[int, Any] = {}

        def cut(number: int) -> None:
            check_unchanged(shards[number])
            parts[number] = write_part(number, _rows(number), out)

        phase = self._workers(cut)
        self._driver("resume", lambda: finished_parts(out))
        counts = self._driver("finish", lambda: finish_index(out, parts.values(), recipe))
        self._publish(step, lambda: counts)
        return phase

    def _encode(self, out: Folder) -> Phase:
        payload = save({"tokens": np.zeros((4, 1, 2, 2), np.float32)})
        samples = [Sample(place, payload, {"id": f"v/{place}", "split": "train"}) for place in range(CLIPS)]
        lines: dict[int, Any] = {}

        def encode(number: int) -> None:
            lines[number] = write_shard(out, number, samples, [])

        phase = self._workers(encode)
        found = self._driver("resume", lambda: resume(out))
        assert found == lines, "every shard is found as it was written"
        text = "".join(json.dumps(line) + "\n" for number in sorted(lines) for line in lines[number])
        self._driver("finish", lambda: out.write_text(MANIFEST, text))
        self._driver("publish", lambda: publish(out, _record("encode", "tokens", "0" * 16, {})))
        return phase

    def _publish(self, step: Step, make: Callable[[], object]) -> None:
        """What the engine does around a stage: lease, output, record."""
        lease = Lease(step.folder)
        assert lease.acquire()
        made = self._driver("finish", make)
        counts = made if isinstance(made, Counts) else Counts()
        record = _record(step.stage.kind, step.name, step.key, dict(step.stage.literals()), counts=counts, facts=dict(step.facts))
        self._driver("publish", lambda: publish(step.folder, record))
        lease.release()

    def _workers(self, work: Callable[[int], None]) -> Phase:
        """Every shard by the worker that is free first: it computes, then commits through the store."""
        begin = self.clock.now
        free = [begin] * self.workers
        alone = [begin] * self.workers
        committing: list[tuple[float, int]] = []
        waited = 0.0
        for number in range(self.shards):
            seconds = max(0.0, self.random.gauss(self.compute, SPREAD * self.compute))
            heapq.heappush(committing, (heapq.heappop(free) + seconds, number))
            heapq.heappush(alone, heapq.heappop(alone) + seconds)
            while not free:
                waited += self._commit(work, committing, free)
        while committing:
            waited += self._commit(work, committing, free)
        self.clock.now = max(free)
        return Phase(max(free) - begin, max(alone) - begin, waited / self.shards)

    def _commit(self, work: Callable[[int], None], committing: list[tuple[float, int]], free: list[float]) -> float:
        """The next commit in time; its worker is free after it. Returns the seconds it took."""
        self.clock.now, number = heapq.heappop(committing)
        began = self.clock.now
        try:
            work(number)
        except StoreError:  # SlowDown, as often as a request is repeated: a stage ends here, and the next run commits the shard
            self.given_up += 1
            heapq.heappush(committing, (self.clock.now, number))
        else:
            heapq.heappush(free, self.clock.now)
        return self.clock.now - began

    def _driver(self, what: str, call: Callable[[], T]) -> T:
        """Call, and note the CPU seconds."""
        self.memory.limited = False
        began = time.process_time()
        try:
            return call()
        finally:
            self.driver[what] = self.driver.get(what, 0.0) + time.process_time() - began
            self.memory.limited = True


def _record(kind: str, name: str, key: str, config: dict[str, Any], *, counts: Counts | None = None, facts: Any = None) -> Record:
    return Record(
        kind=kind,
        name=name,
        key=key,
        version=1,
        config=config,
        facts=facts or {},
        digest="",
        counts=counts or Counts(),
        started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )


def _rows(shard: int) -> list[Row]:
    """Clips of one shard as `clips` would find them."""
    window: dict[str, str | int | float | None] = {
        "url": f"s3://data/webvid/{shard:06d}.tar",
        "bytes": 1 << 20,
        "caption": "a dog runs over a field",
        "decision": "kept",
    }
    ids = [f"{shard:06d}/{number:04d}" for number in range(CLIPS)]
    return [{**window, "id": f"{name}/0", "video": name, "shard": shard, "group": name, "split": "train", "start": 0.0} for name in ids]


def flatness(outcomes: list[Outcome]) -> Table:
    title = "driver and store, for one shard"
    table = Table("shards", "driver, CPU ms", "puts", "gets", "lists", "a worker's store time, s", "efficiency", title=title)
    for outcome in outcomes:
        asked = [f"{outcome.requests[sort] / outcome.shards:.2f}" for sort in ("put", "get", "list")]
        store = sum(phase.store_seconds for phase in outcome.phases.values())
        alone, whole = (sum(getattr(phase, name) for phase in outcome.phases.values()) for name in ("alone", "makespan"))
        table.add_row(f"{outcome.shards:,}", f"{outcome.milliseconds:.2f}", *asked, f"{store:.3f}", f"{alone / whole:.1%}")
    return table


def saturation(found: list[tuple[float, Outcome]], workers: int) -> Table:
    title = f"{workers:,} workers with less and less to do: encode"
    table = Table("s of work in a shard", "shards/s, alone", "shards/s", "efficiency", "most puts/s", "SlowDown", "given up", title=title)
    for compute, outcome in found:
        phase = outcome.phases["encode"]
        rates = (outcome.shards / phase.alone, outcome.shards / phase.makespan)
        told = (
            *(f"{rate:,.0f}" for rate in rates),
            f"{rates[1] / rates[0]:.1%}",
            f"{outcome.peak:,}",
            f"{outcome.refused:,}",
            f"{outcome.given_up:,}",
        )
        table.add_row(f"{compute:g}", *told)
    return table


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--shards", type=int, nargs="+", default=[100, 1000, 10_000])
    asked.add_argument("--workers", type=int, default=1000)
    asked.add_argument("--compute", type=float, nargs="+", default=[30.0, 3.0, 1.0, 0.3], help="seconds of work in a shard")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    first = given.compute[0]
    Simulation(10, given.workers, first, given.seed).run()  # imports and caches, which are not a shard's
    outcomes = [Simulation(shards, given.workers, first, given.seed).run() for shards in given.shards]
    Console().print(flatness(outcomes))
    found = [(each, Simulation(ROUNDS * given.workers, given.workers, each, given.seed).run()) for each in given.compute]
    Console().print(saturation(found, given.workers))
    if given.json:
        told = [
            {"shards": o.shards, "driver_ms": o.milliseconds, "driver": o.driver, "requests": o.requests, "peak": o.peak} for o in outcomes
        ]
        rates = [
            {
                "compute": c,
                "refused": o.refused,
                "given_up": o.given_up,
                "seconds": o.phases["encode"].makespan,
                "alone": o.phases["encode"].alone,
            }
            for c, o in found
        ]
        given.json.write_text(json.dumps({"flat": told, "saturation": rates}, indent=1))


if __name__ == "__main__":
    main()
