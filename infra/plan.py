"""`plan()`: what a job would do, and why, without doing any of it.

Each stage becomes a Step: its key, the artifact that already holds its output, or the fields in which it differs from the newest
artifact of the same kind and name. Time and size are guessed from earlier records of the same kind. `run` starts from these very
steps. Not covered: leases and what other runs are building at the moment (`run.py`).
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import TypeAlias, TypeVar

from rich.markup import escape
from rich.table import Table

from kinetok.infra.artifact import Artifact, InputInfo, Record, Store
from kinetok.infra.errors import DataError, StoreError
from kinetok.infra.fingerprint import Plain, fingerprint, plain
from kinetok.infra.job import Job
from kinetok.infra.sizing import size
from kinetok.infra.stage import Resources, Stage
from kinetok.infra.storage import Folder

Names: TypeAlias = Mapping[str, str | tuple[str, ...]]
"""Names of the stages behind each Ref field; a tuple where the field is one."""
Number = TypeVar("Number", int, float)
UNKNOWN = "unknown"
"""Stands for the key of a step whose identity cannot be told here."""
SOURCES = "sources"
"""Metric of a stage that reads a source: how many of its things went in."""


@dataclass(frozen=True)
class Change:
    """A field in which a stage differs from its newest earlier artifact; None where the field is absent on that side."""

    path: str
    old: Plain
    new: Plain
    upstream: str | None = None
    """The stage whose new key is the change, where the field is an input."""

    def __str__(self) -> str:
        return f"{self.path}: {self.upstream} changed" if self.upstream else f"{self.path}: {_short(self.old)} -> {_short(self.new)}"


@dataclass(frozen=True)
class Estimate:
    """Guess from an earlier record, None where nothing is known."""

    samples: int | None = None
    """Samples that go in."""
    written: int | None = None
    """Samples that come out."""
    bytes: int | None = None
    seconds: float | None = None
    cpu_hours: float | None = None
    gpu_hours: float | None = None
    money: float | None = None
    """Of CPUs and GPUs, where the job has prices."""
    storage: float | None = None
    """Money for a month of the output."""


@dataclass(frozen=True)
class Step:
    """A stage with its key: what is there, or why it must be built."""

    name: str
    stage: Stage
    key: str
    identity: Mapping[str, Plain]
    inputs: Names
    resources: Resources
    folder: Folder
    artifact: Artifact | None
    """The finished output, where the store has it."""
    reason: str
    """Why it is built, in a few words; empty where it is cached."""
    changes: tuple[Change, ...] = ()
    estimate: Estimate = field(default_factory=Estimate)
    forced: bool = False
    """Whether it is built again though the store has it."""

    @property
    def facts(self) -> dict[str, object]:
        """What `Stage.facts` said when the plan was made."""
        facts = self.identity["facts"]
        assert isinstance(facts, dict)
        return dict(facts)

    @property
    def upstream(self) -> tuple[str, ...]:
        """Names of the stages this one is made of."""
        return tuple(dict.fromkeys(itertools.chain.from_iterable((v,) if isinstance(v, str) else v for v in self.inputs.values())))

    def to_json(self) -> dict[str, Plain]:
        """The step as plain data, for `kinetok plan --json`."""
        guess = self.estimate
        return {
            "name": self.name,
            "kind": self.stage.kind,
            "key": self.key,
            "folder": str(self.folder),
            "cached": self.artifact is not None,
            "reason": self.reason,
            "changes": [{"path": c.path, "old": c.old, "new": c.new, "upstream": c.upstream} for c in self.changes],
            "inputs": {name: value if isinstance(value, str) else list(value) for name, value in self.inputs.items()},
            "expected": plain(asdict(guess)),
        }


def plan(job: Job, store: Store, forced: Collection[str] = (), *, sources: int | None = None, outline: bool = False) -> list[Step]:
    """Every stage of the job, inputs first; those of `forced` count as not built.

    With `sources`, everything is to be built, and sized as if the source held so many videos. Raises StoreError where a finished artifact
    was made of other inputs than there are now; and where a stage's facts are not at hand DataError or StoreError, unless `outline`, which
    gives such a step and all that is made of it no key (`UNKNOWN`) and the cause as its reason. An outline cannot be run.
    """
    planner = _Planner(job, store, forced if sources is None else list(job.stages), sources, outline)
    for name in job.order():
        planner.steps[name] = planner.step(name)
    for step in planner.steps.values():
        if step.artifact is not None:
            check_inputs(step.artifact, {n: s.artifact for n, s in planner.steps.items() if s.artifact is not None}, step)
    return list(planner.steps.values())


def check_inputs(artifact: Artifact, present: Mapping[str, Artifact], step: Step) -> None:
    """Raise StoreError where an input of a finished artifact is there but no longer holds what the artifact was made of."""
    for field_name, names in step.inputs.items():
        stages = (names,) if isinstance(names, str) else names
        for name, info in zip(stages, artifact.record.inputs.get(field_name, ()), strict=False):
            if name in present and present[name].digest != info.digest:
                raise StoreError(
                    f"{artifact.folder} was made of {name} with digest {info.digest[:12]}, but {present[name].folder} now has "
                    f"{present[name].digest[:12]} under the same key: build what follows {name} again with --from {step.name} --force"
                )


def input_info(artifact: Artifact) -> InputInfo:
    """How a record names one of its inputs."""
    return InputInfo(kind=artifact.kind, name=artifact.name, key=artifact.key, digest=artifact.digest)


@dataclass
class _Planner:
    """Makes steps one by one, inputs first; reads each kind's records at most once."""

    job: Job
    store: Store
    forced: Collection[str]
    sources: int | None = None
    """Size the job as if its source held so many."""
    outline: bool = False
    """Show a stage whose facts are not at hand instead of refusing the job."""
    steps: dict[str, Step] = field(default_factory=dict)
    _records: dict[str, list[Artifact]] = field(default_factory=dict)

    def step(self, name: str) -> Step:
        stage = self.job.stages[name]
        inputs = _input_names(stage)
        above = [ref for _, ref in stage.refs() if self.steps[ref].key == UNKNOWN]
        if above:
            return self._without_key(name, inputs, f"its key follows from {above[0]}")
        try:
            identity = stage.identity({field_name: self._keys(names) for field_name, names in inputs.items()})
        except (DataError, StoreError) as error:
            if not self.outline:
                raise
            return self._without_key(name, inputs, f"{error}{_remedy(name, stage)}")
        key = fingerprint(identity)
        found = self.store.get(stage.kind, name, key)
        forced = name in self.forced and (found is not None or self.sources is not None)
        # Built again under its own name: the folder of another name that holds the same stays what its record says.
        folder = found.folder if found and not forced else self.store.folder(stage.kind, name, key)
        artifact = None if forced else found
        reason, changes = ("", ()) if artifact else ("forced", ()) if forced else self._why(name, stage, identity, folder)
        step = Step(name, stage, key, identity, inputs, self.job.resources[name], folder, artifact, reason, changes, forced=forced)
        return step if artifact else replace(step, estimate=self._estimate(step))

    def _without_key(self, name: str, inputs: Names, reason: str) -> Step:
        """A step of an outline whose identity is not known here."""
        stage = self.job.stages[name]
        folder = self.store.folder(stage.kind, name, UNKNOWN)
        step = Step(name, stage, UNKNOWN, {"facts": {}}, inputs, self.job.resources[name], folder, None, reason)
        return replace(step, estimate=self._estimate(step))

    def _keys(self, names: str | tuple[str, ...]) -> str | list[str]:
        return self.steps[names].key if isinstance(names, str) else [self.steps[name].key for name in names]

    def _why(self, name: str, stage: Stage, identity: Mapping[str, Plain], folder: Folder) -> tuple[str, tuple[Change, ...]]:
        if folder.files():
            return "unfinished: goes on where it ended", ()
        earlier = [artifact for artifact in self._earlier(stage.kind) if artifact.name == name]
        if not earlier:
            return "new", ()
        changes = tuple(self._changes(earlier[0].record, identity, _input_names(stage)))
        return "changed" if changes else "new", changes

    def _changes(self, old: Record, identity: Mapping[str, Plain], inputs: Names) -> Iterator[Change]:
        """Fields that differ between a record and the identity of the present step."""
        before: dict[str, Plain] = {"version": old.version, **_flat(old.config), **_flat({"facts": old.facts})}
        after: dict[str, Plain] = {"version": identity["version"], **_flat(identity["config"]), **_flat({"facts": identity["facts"]})}
        for path in sorted(before.keys() | after.keys()):
            if path not in before or path not in after or before[path] != after[path]:
                yield Change(path, before.get(path), after.get(path))
        for name in sorted(old.inputs.keys() | inputs.keys()):
            yield from self._changed_inputs(name, old.inputs.get(name, ()), inputs.get(name, ()))

    def _changed_inputs(self, path: str, before: tuple[InputInfo, ...], names: str | tuple[str, ...]) -> Iterator[Change]:
        now = [self.steps[name] for name in ((names,) if isinstance(names, str) else names)]
        for old, new in itertools.zip_longest(before, now):
            if old is None or new is None or old.key != new.key:
                same = old is not None and new is not None and old.name == new.name
                yield Change(path, _label(old), _label(new), new.name if same and new else None)

    def _estimate(self, step: Step) -> Estimate:
        """The newest record of the same kind, of the same name if there is one, scaled by the work there is now."""
        earlier = sorted(self._earlier(step.stage.kind), key=lambda artifact: artifact.name != step.name)
        if not earlier:
            return Estimate()
        record = earlier[0].record
        scale = self._scale(step, record)
        samples = round(record.counts.input * scale)
        needs = size(step.stage, step.resources, record, samples=samples, scale=scale, prices=self.job.prices)
        return Estimate(
            samples,
            round(record.counts.written * scale),
            round(record.bytes * scale),
            needs.seconds,
            needs.cpu_hours,
            needs.gpu_hours,
            needs.money,
            needs.storage,
        )

    def _scale(self, step: Step, record: Record) -> float:
        """Work of `step` against that of an earlier stage, 1 where nothing tells."""
        fields = step.stage.scales_with
        if fields:
            literals = step.stage.literals()
            return _product(literals.get(name) for name in fields) / _product(record.config.get(name) for name in fields)
        now, then = self._samples_into(step), self._samples_before(record)
        if now and then:
            return now / then
        of_source = record.metrics.get(SOURCES) or record.counts.input
        return self.sources / of_source if self.sources and of_source else 1.0

    def _samples_into(self, step: Step) -> int | None:
        """Samples of the nearest stage above that has any, made or expected."""
        for above in (self.steps[name] for name in step.upstream):
            written = above.artifact.record.counts.written if above.artifact else above.estimate.written
            if found := written or self._samples_into(above):
                return found
        return None

    def _samples_before(self, record: Record) -> int | None:
        """The same of an earlier artifact, as far as its inputs are still there."""
        for info in (info for infos in record.inputs.values() for info in infos):
            above = self.store.get(info.kind, info.name, info.key)
            if above and (found := above.record.counts.written or self._samples_before(above.record)):
                return found
        return None

    def _earlier(self, kind: str) -> list[Artifact]:
        """Finished artifacts of a kind, newest first."""
        if kind not in self._records:
            self._records[kind] = sorted(self.store.of_kind(kind), key=lambda artifact: artifact.record.started, reverse=True)
        return self._records[kind]


def plan_table(steps: Iterable[Step]) -> Table:
    """The plan for people; what does not fit in a column is in `to_json`."""
    table = Table(title_justify="left", header_style="bold", expand=False)
    for column in ("stage", "kind", "key", "state", "why"):
        table.add_column(column, overflow="fold")
    for column in ("samples", "bytes", "time"):
        table.add_column(column, justify="right")
    for step in steps:
        guess = step.estimate
        why = "\n".join([*([step.reason] if not step.changes else []), *map(str, step.changes)])
        state = "[green]cached[/]" if step.artifact else "[yellow]build[/]"
        if step.artifact:
            samples, size, time = str(step.artifact.record.counts.written or ""), human_bytes(step.artifact.record.bytes), ""
        else:
            samples, size, time = _unknown(guess.samples, str), _unknown(guess.bytes, human_bytes), _unknown(guess.seconds, human_seconds)
        table.add_row(step.name, step.stage.kind, step.key, state, escape(why), samples, size, time)
    return table


def size_table(steps: Iterable[Step]) -> Table:
    """What the stages to be built take, and the sum, which is the time of a run where nothing goes side by side."""
    table = Table(title_justify="left", header_style="bold", show_footer=True)
    guesses = [(step.name, step.estimate) for step in steps if step.artifact is None]
    sums = {name: sum(getattr(guess, name) or 0 for _, guess in guesses) for name in _SIZES}
    table.add_column("stage", "all")
    for name, (title, show) in _SIZES.items():
        table.add_column(title, show(sums[name]) if name != "samples" else "", justify="right")
    for stage, guess in guesses:
        table.add_row(stage, *(_unknown(getattr(guess, name), show) for name, (_, show) in _SIZES.items()))
    return table


def human_bytes(count: float) -> str:
    """`1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """`42 s`, `3:05 min`, `2:10 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


_SIZES: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "samples": ("samples", "{:,.0f}".format),
    "bytes": ("bytes", human_bytes),
    "seconds": ("time", human_seconds),
    "cpu_hours": ("CPU hours", "{:,.1f}".format),
    "gpu_hours": ("GPU hours", "{:,.1f}".format),
    "money": ("money", "{:,.2f}".format),
    "storage": ("storage, a month", "{:,.2f}".format),
}


def _unknown(value: Number | None, show: Callable[[Number], str]) -> str:
    return "unknown" if value is None else show(value)


def _remedy(name: str, stage: Stage) -> str:
    """How to name another place to read facts from."""
    fields = [field for field in stage.reads if isinstance(getattr(stage, field), str)]
    return "; " + " and ".join(f"--set {name}.{field}=..." for field in fields) + " names another" if fields else ""


def _label(source: InputInfo | Step | None) -> str | None:
    return None if source is None else f"{source.name}-{source.key}"


def _short(value: Plain) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _product(values: Iterable[object]) -> float:
    """Product of what is a number other than zero."""
    return prod((float(value) for value in values if isinstance(value, int | float) and value), start=1.0)


def _input_names(stage: Stage) -> dict[str, str | tuple[str, ...]]:
    found: dict[str, str | tuple[str, ...]] = {}
    for name, ref in stage.refs():
        several = isinstance(getattr(stage, name), tuple)
        before = found.get(name, ())
        found[name] = (*before, str(ref)) if several and isinstance(before, tuple) else str(ref)
    return found


def _flat(value: object, path: str = "") -> dict[str, Plain]:
    """Nested mappings as one of dotted paths; lists stay whole."""
    if not isinstance(value, Mapping):
        return {path: plain(value)}
    inner = (_flat(item, f"{path}.{name}" if path else str(name)) for name, item in value.items())
    return {key: item for flat in inner for key, item in flat.items()}
