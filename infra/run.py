"""`run()`: build what a plan lacks, independent stages side by side, and record what happened in `runs/{run_id}.json`.

Each stage that must be built gets a thread, as soon as its inputs are finished and its CPUs fit beside what is running; the work
itself is in Ray's or the stage's own processes. A lease on the output folder keeps two runs from building the same artifact: the
second waits and uses the first one's result. A failed stage takes down only what is made of it. MLflow is told from a thread that
can fail alone (contract 7).
Not covered: what is built and why (`plan.py`), which machine does the work (`launch.py`).
"""

import contextlib
import math
import os
import queue
import signal
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from rich.console import Console

from kinetok.infra.artifact import LEASE, RECORD, WORK, Artifact, Lease, Record, Store, lost, publish
from kinetok.infra.errors import Cancelled, ConfigError, KinetokError
from kinetok.infra.fingerprint import canonical
from kinetok.infra.job import Job, Tracking
from kinetok.infra.job_run import RUNS, JobRun, StageRun, Status
from kinetok.infra.plan import Step, check_inputs, input_info, plan
from kinetok.infra.progress import Board, Row
from kinetok.infra.provenance import RayJob, commit, environment, ray_job, submission
from kinetok.infra.secrets import redact
from kinetok.infra.stage import StageContext
from kinetok.infra.storage import Folder

MADE_OF = f"{WORK}/inputs.json"
"""Digests of the inputs that an unfinished artifact is being made of."""
POLL_SECONDS = 1.0
"""Between two looks at an artifact that another run is building."""
MIRROR_SECONDS = 10.0
WATCH_SECONDS = 5.0
"""Between two looks at what a stage without progress waits for."""


@dataclass(frozen=True)
class Selection:
    """Which stages of a job a run builds; the others must be finished where they are needed."""

    only: tuple[str, ...] = ()
    """Just these stages."""
    start: tuple[str, ...] = ()
    """These stages and all that are made of them."""
    force: bool = False
    """Build the selected stages again though they are finished."""

    def names(self, job: Job) -> set[str]:
        """The selected stages; raises ConfigError on a name that is none."""
        job.require([*self.only, *self.start])
        chosen = set(self.only) | (job.downstream(self.start) if self.start else set())
        return chosen or set(job.stages)


def run(job: Job, store: Store, selection: Selection = Selection(), *, console: Console | None = None) -> JobRun:
    """Plan the job and build the selected stages; returns once all have ended. Raises KinetokError only before anything starts."""
    chosen = selection.names(job)
    for stage in job.stages.values():
        stage.fetch()
    steps = plan(job, store, chosen if selection.force else ())
    _require_inputs(steps, chosen)
    _require_room(steps, chosen)
    console = console or Console(stderr=True)
    with Board.of([step.name for step in steps if step.name in chosen], console) as board:
        return _Runner(job, store, steps, chosen, board).run()


@dataclass(frozen=True)
class _Ended:
    """What a stage's thread says at its end."""

    name: str
    artifact: Artifact | None = None
    built: bool = False
    """False where another run built it meanwhile."""
    error: str | None = None


class _Runner:
    """One job run. All state changes in the thread that calls `run`; stage threads and signals only put events."""

    def __init__(self, job: Job, store: Store, steps: Sequence[Step], chosen: set[str], board: Board) -> None:
        self.store, self.board = store, board
        self.steps = {step.name: step for step in steps if step.name in chosen}
        self.waiting = _longest_first(self.steps.values())
        self.running: dict[str, threading.Event] = {}
        """Stop events of the stages under way."""
        self.artifacts = {step.name: step.artifact for step in steps if step.artifact is not None}
        self.events: queue.SimpleQueue[_Ended | RayJob | None] = queue.SimpleQueue()
        """None: the run was asked to stop."""
        self.cancelled = False
        self.cpus = math.inf if os.environ.get("RAY_ADDRESS") else float(os.cpu_count() or 1)
        """A cluster elsewhere queues by itself."""
        self.ray = threading.Lock()
        self.environment = environment()
        stages = {step.name: StageRun(kind=step.stage.kind, key=step.key, folder=str(step.folder)) for step in self.steps.values()}
        now = datetime.now(UTC)
        run_id = f"{now:%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:4]}"
        sent = submission()
        self.state = JobRun(
            run_id=run_id,
            job=job.name,
            started=now.isoformat(),
            host=socket.gethostname(),
            commit=commit(),
            submission=sent.id if sent else None,
            wheel=sent.wheel if sent else None,
            stages=stages,
        )
        self.mirror = _Mirror(store, run_id, job.tracking, board)

    def run(self) -> JobRun:
        """Build everything; the state is written at each change, and once more at the end."""
        self._write()
        with self._stoppable(), self.mirror:
            while self.waiting or self.running:
                self._start_ready()
                if self.running:
                    self._await_event()
            self._update(ended=_now())
        return self.state

    def _await_event(self) -> None:
        """Handle what happens next; while nothing does, say what stages without progress wait for."""
        try:
            self._handle(self.events.get(timeout=WATCH_SECONDS))
        except queue.Empty:
            for name in self.running:
                _note_waiting(self.steps[name], self.board.rows[name])

    def _start_ready(self) -> None:
        """Settle or start every stage whose inputs have ended."""
        for name in list(self.waiting):
            step = self.steps[name]
            if any(above in self.waiting or above in self.running for above in step.upstream):
                continue
            missing = [above for above in step.upstream if above not in self.artifacts]
            if name in self.artifacts:
                self._settle_cached(step)
            elif self.cancelled or missing:
                self._end(name, "skipped", "the run was stopped" if self.cancelled else f"{', '.join(missing)} not built")
            elif self._fits(step):
                self._start(step)

    def _fits(self, step: Step) -> bool:
        """Whether the stage's CPUs are free; one that is bigger than the machine runs alone."""
        used = sum(_cpus(self.steps[name]) for name in self.running)
        return not self.running or used + _cpus(step) <= self.cpus

    def _start(self, step: Step) -> None:
        stop = self.running[step.name] = threading.Event()
        self.waiting.remove(step.name)
        self._set(step.name, "running", started=_now())
        threading.Thread(target=self._attempt, args=(step, stop), name=step.name, daemon=True).start()

    def _settle_cached(self, step: Step) -> None:
        try:
            check_inputs(self.artifacts[step.name], self.artifacts, step)
        except KinetokError as error:
            del self.artifacts[step.name]
            self._end(step.name, "failed", str(error))
        else:
            self._end(step.name, "cached")

    def _handle(self, event: _Ended | RayJob | None) -> None:
        if isinstance(event, RayJob):
            self._update(ray_job=event.id, dashboard=event.dashboard)
            return
        if event is None:
            self.cancelled = True
            for stop in self.running.values():
                stop.set()
            self.board.say("stopping: stages end at their next safe point; press Ctrl-C again to leave at once")
            return
        del self.running[event.name]
        if event.artifact is None:
            self._end(event.name, "failed", event.error)
        else:
            self.artifacts[event.name] = event.artifact
            self._end(event.name, "done" if event.built else "cached")

    def _end(self, name: str, status: Status, error: str | None = None) -> None:
        if name in self.waiting:
            self.waiting.remove(name)
        self._set(name, status, error=error, ended=_now())

    def _set(self, name: str, status: Status, **changes: str | None) -> None:
        stage = self.state.stages[name].model_copy(update={"status": status, **changes})
        self.board.set(name, status, (changes.get("error") or "").strip().rsplit("\n", 1)[-1])
        self._update(stages={**self.state.stages, name: stage})

    def _update(self, **changes: object) -> None:
        """A store that fails now must not take the finished stages with it: the next change writes the state again."""
        self.state = self.state.model_copy(update=changes)
        try:
            self._write()
        except (KinetokError, OSError) as error:
            self.board.say(f"the state of this run is not written: {error}")
        self.mirror.poke()

    def _write(self) -> None:
        self.store.root.write_text(f"{RUNS}/{self.state.run_id}.json", self.state.model_dump_json(indent=1))

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask the run to stop; the second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: object) -> None:
            # Ray's own handler, which stands before this one in a process that started it, has set an alarm that aborts in three seconds.
            signal.alarm(0)
            signal.signal(number, signal.default_int_handler)
            self.events.put(None)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _attempt(self, step: Step, stop: threading.Event) -> None:
        """Body of a stage's thread."""
        try:
            artifact, built = self._obtain(step, stop)
            ended = _Ended(step.name, artifact, built)
        except KinetokError as error:
            ended = _Ended(step.name, error=redact(str(error)))
        except BaseException:  # noqa: BLE001
            # A stage is anybody's code: whatever it raises (a panic of a Rust library is no Exception) must fail this stage alone, and be
            # told whole; a thread that ended without a word would keep the run waiting for ever.
            ended = _Ended(step.name, error=redact(traceback.format_exc()))
        self.events.put(ended)

    def _obtain(self, step: Step, stop: threading.Event) -> tuple[Artifact, bool]:
        """The step's artifact, built here or by the run that holds its lease, and whether it was built here."""
        lease = Lease(step.folder, on_lost=stop.set)
        while not lease.acquire():
            self.board.rows[step.name].note = f"waits for {lease.who()}, which is building it"
            if stop.wait(POLL_SECONDS):
                raise Cancelled(f"stage {step.name} was asked to stop")
        try:
            found = None if step.forced else self.store.get(step.stage.kind, step.name, step.key)
            return (found, False) if found else (self._build(step, lease, stop), True)
        except Cancelled:
            if lease.lost:
                raise lost(step.folder) from None
            raise
        finally:
            lease.release()

    def _build(self, step: Step, lease: Lease, stop: threading.Event) -> Artifact:
        if step.forced:
            step.folder.remove(RECORD)
            step.folder.clear(keep=LEASE)
        if step.stage.uses_ray:
            self._start_ray(step)
        started, began = _now(), time.monotonic()
        inputs = {name: self._input(value) for name, value in step.inputs.items()}
        _clear_foreign(step.folder, inputs)
        report = partial(_report, self.board.rows[step.name], step.name, stop)
        ctx = StageContext(step.name, step.key, inputs, step.folder, step.resources, report, stop)
        result = step.stage.run(ctx)
        ctx.check()
        record = Record(
            kind=step.stage.kind,
            name=step.name,
            key=step.key,
            version=step.stage.version,
            config=dict(step.stage.literals()),
            facts=dict(step.facts),
            inputs={n: tuple(map(input_info, (a,) if isinstance(a, Artifact) else a)) for n, a in inputs.items()},
            digest="",
            counts=result.counts,
            metrics={name: value if math.isfinite(value) else None for name, value in result.metrics.items()},
            started=started,
            seconds=time.monotonic() - began,
            resources=step.resources.model_dump(mode="json"),
            run_id=self.state.run_id,
            commit=self.state.commit,
            environment=self.environment,
        )
        if not lease.renew():
            raise lost(step.folder)
        return publish(step.folder, record)

    def _input(self, names: str | tuple[str, ...]) -> Artifact | tuple[Artifact, ...]:
        return self.artifacts[names] if isinstance(names, str) else tuple(self.artifacts[name] for name in names)

    def _start_ray(self, step: Step) -> None:
        """Start or join a Ray cluster, once; stages that need it at the same time wait for each other."""
        from kinetok.infra import capacity
        from kinetok.infra.launch import start_ray

        with self.ray:
            self.board.rows[step.name].note = "starts Ray"
            start_ray(custom=_custom(self.steps.values()))
            self.board.rows[step.name].note = ""
        self.events.put(ray_job())
        capacity.require({step.name: step.stage.asks(step.resources)})


def _longest_first(steps: Collection[Step]) -> list[str]:
    """Names of `steps`, which stand after what they are made of: those first that most stages wait for one after the other, ties as given.

    Where CPUs are too few for all that is ready, the chain that ends last must not wait for what nobody needs soon.
    """
    chain = dict.fromkeys((step.name for step in steps), 0)
    for step in reversed(list(steps)):
        for above in chain.keys() & set(step.upstream):
            chain[above] = max(chain[above], chain[step.name] + 1)
    return sorted(chain, key=lambda name: -chain[name])


class _Mirror:
    """The thread that tells MLflow what the files say; a context manager whose end waits for the last replay."""

    def __init__(self, store: Store, run_id: str, tracking: Tracking | None, board: Board) -> None:
        self.store, self.run_id, self.tracking, self.board = store, run_id, tracking, board
        self.changed, self.closed = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._replay, name="mirror", daemon=True)

    def poke(self) -> None:
        """Replay soon."""
        self.changed.set()

    def __enter__(self) -> None:
        if self.tracking is not None:
            self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.changed.set()
        if self.tracking is not None:
            self.thread.join()

    def _replay(self) -> None:
        from kinetok.infra.tracking import mirror

        assert self.tracking is not None
        told = known = last = False
        while not last:
            self.changed.wait(MIRROR_SECONDS)
            self.changed.clear()
            last = self.closed.is_set()
            try:
                place = mirror(self.store, self.run_id, self.tracking.uri, self.tracking.experiment)
                if not known:
                    self.board.say(f"MLflow: {place}")
                known = True
            except KinetokError as error:
                if not told:
                    self.board.say(f"the job goes on without MLflow: {error}")
                told = True


def _clear_foreign(folder: Folder, inputs: Mapping[str, Artifact | tuple[Artifact, ...]]) -> None:
    """Delete the parts of an unfinished artifact where an input was built anew under its old key since: old and new parts do not mix."""
    digests = {name: [a.digest for a in ((found,) if isinstance(found, Artifact) else found)] for name, found in inputs.items()}
    if not digests:
        return
    if folder.exists(MADE_OF) and folder.read_bytes(MADE_OF) != canonical(digests):
        folder.clear(keep=LEASE)
    folder.write_bytes(MADE_OF, canonical(digests))


def _report(
    row: Row,
    name: str,
    stop: threading.Event,
    *,
    done: int | None = None,
    total: int | None = None,
    unit: str | None = None,
    quarantined: int | None = None,
    note: str | None = None,
) -> None:
    """`StageContext.progress`: show it, and end the stage where it was asked to stop."""
    row.report(done=done, total=total, unit=unit, quarantined=quarantined, note=note)
    if stop.is_set():
        raise Cancelled(f"stage {name} was asked to stop")


def _require_inputs(steps: Sequence[Step], chosen: set[str]) -> None:
    """Raise ConfigError where a selected stage needs one that is neither selected nor finished."""
    finished = {step.name for step in steps if step.artifact is not None}
    for step in steps:
        if step.name in chosen and step.artifact is None:
            missing = [name for name in step.upstream if name not in finished | chosen]
            if missing:
                raise ConfigError(
                    f"{step.name} needs {', '.join(missing)}, which is not built yet: select it too, or run the whole job first"
                )


def _require_room(steps: Sequence[Step], chosen: set[str]) -> None:
    """Raise ConfigError where the cluster that is joined could never hold one of the stages to be built."""
    due = [step for step in steps if step.name in chosen and step.artifact is None and step.stage.uses_ray]
    if due and os.environ.get("RAY_ADDRESS"):
        from kinetok.infra import capacity
        from kinetok.infra.launch import start_ray

        start_ray()
        capacity.require({step.name: step.stage.asks(step.resources) for step in due})


def _note_waiting(step: Step, row: Row) -> None:
    """Where a stage has not made a first step since it began, say what of it finds no room on the cluster; what it says itself stays."""
    from kinetok.infra import capacity

    if step.stage.uses_ray and (not row.note or row.note.startswith(capacity.WAITS)):
        row.note = "" if row.rate is not None else capacity.waiting(step.stage.asks(step.resources))


def _custom(steps: Iterable[Step]) -> set[str]:
    """Names of the custom resources that steps ask for."""
    return {name for step in steps for asked in (step.resources.custom, step.resources.decoder_custom) for name in asked}


def _cpus(step: Step) -> float:
    """CPUs of a stage's workers, and of one of each sort of task that feeds them."""
    feeding = sum(ask.each.get("CPU", 0) for ask in step.stage.asks(step.resources) if ask.beside)
    return step.resources.workers * step.resources.cpus + feeding


def _now() -> str:
    return datetime.now(UTC).isoformat()
