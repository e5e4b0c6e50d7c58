"""MLflow as a mirror of the files on the store: `mirror` replays one job run, any number of times, with the same outcome.

One parent run per job run, one nested child per stage, cached ones included. Nothing is kept in memory between calls: runs are found
by tags, and the tag `kinetok.logged` says up to which step metrics were sent, so steps that a resume repeats are dropped. Figures of
the driver's machine go to `runs/{run_id}/system/` first and are mirrored like the rest. With the server down a job goes on, and
`sync` replays later. Not covered: what an artifact becomes in MLflow (`registry.py`), opening it (`mlflow_store.py`).
"""

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from kinetok.infra import machine
from kinetok.infra.artifact import Lease, Store
from kinetok.infra.errors import StoreError
from kinetok.infra.fingerprint import Plain, fingerprint
from kinetok.infra.metrics_log import Line, read_metrics
from kinetok.infra.mlflow_store import TrackingDown, connect, experiment_id, resolve, ui
from kinetok.infra.registry import Place, log_artifact, log_report, metric_name, milliseconds

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

__all__ = ["TrackingDown", "mirror", "pending", "sync", "ui"]

RUNS = "runs"
MARKER = "mirrored.json"
LOCK = "_mirror"
BATCH = 900
"""Metrics of one request; MLflow takes 1000."""
ENDS = {"done": "FINISHED", "cached": "FINISHED", "failed": "FAILED", "running": "KILLED"}
"""How a child ends in MLflow. Planned and skipped stages get no child: they stand in the parent's description."""

JobState: TypeAlias = dict[str, Plain]
"""A job run's file, `runs/{run_id}.json`."""


@dataclass(frozen=True)
class _Mirror:
    """One replay under way."""

    client: "MlflowClient"
    experiment: str
    store: Store
    state: JobState
    known: dict[str, "Run"]
    """MLflow runs of this job run by stage name; the parent's name is empty."""

    def place(self, stage: str) -> Place:
        return Place(self.client, self.experiment, str(self.known[stage].info.run_id))


def mirror(store: Store, run_id: str, uri: str | None, experiment: str) -> None:
    """Bring MLflow up to the files of one job run. Repeating it changes nothing; raises TrackingDown when MLflow does not answer."""
    state = _read_run(store, run_id)
    if state.get("ended") is None and state.get("host") == socket.gethostname():
        machine.sample(store.root / RUNS / run_id)
    _replay(store, state, resolve(store, uri), experiment)


def sync(store: Store, uri: str | None, experiment: str) -> list[str]:
    """Replay every run that `pending` lists; returns their ids. A run that was killed is closed where the next one began."""
    chosen, waiting = resolve(store, uri), set(pending(store))
    states = [_read_run(store, run_id) for run_id in _run_ids(store)]
    for state, later in zip(states, [*states[1:], None], strict=True):
        if state["run_id"] in waiting:
            ended = state.get("ended") or (later["started"] if later else None)
            _replay(store, {**state, "ended": ended}, chosen, experiment)
    return [str(state["run_id"]) for state in states if state["run_id"] in waiting]


def pending(store: Store) -> list[str]:
    """Ids of the job runs that no MLflow holds in full, oldest first: those still running, and those whose server was down."""
    return [run_id for run_id in _run_ids(store) if not (store.root / RUNS / run_id).exists(MARKER)]


def _run_ids(store: Store) -> list[str]:
    names = [name.removeprefix(f"{RUNS}/") for name in store.root.files(RUNS)] if store.root.exists(RUNS) else []
    states = [_read_run(store, name.removesuffix(".json")) for name in names if "/" not in name and name.endswith(".json")]
    return [str(state["run_id"]) for state in sorted(states, key=lambda state: str(state["started"]))]


def _read_run(store: Store, run_id: str) -> JobState:
    try:
        state: JobState = json.loads(store.root.read_bytes(f"{RUNS}/{run_id}.json"))
    except FileNotFoundError:
        raise StoreError(f"no job run {run_id!r} in {store.root}: its file {RUNS}/{run_id}.json is missing") from None
    return state


def _stages(state: JobState) -> dict[str, JobState]:
    stages = state["stages"]
    assert isinstance(stages, dict)
    return {name: stage for name, stage in stages.items() if isinstance(stage, dict)}


def _replay(store: Store, state: JobState, uri: str, experiment: str) -> None:
    run_id = str(state["run_id"])
    with connect(store, uri) as client, _alone(store):
        number = experiment_id(client, store, uri, experiment)
        found = client.search_runs([number], f"tags.`kinetok.run` = '{run_id}'", max_results=1000)
        work = _Mirror(client, number, store, state, {run.data.tags.get("kinetok.stage", ""): run for run in found})
        _open_parent(work)
        for name, stage in _stages(state).items():
            if stage["status"] in ENDS:
                _mirror_stage(work, name, stage)
        _describe(work)
        if state.get("ended") is not None:
            _close_parent(work)
            (store.root / RUNS / run_id).write_text(MARKER, json.dumps({"uri": uri.rsplit("@", 1)[-1], "experiment": experiment}))


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Holds the store's mirror lease for the block: two mirrors at once would each make the parent, or register the model."""
    lease = Lease(store.root / RUNS / LOCK)
    until = time.monotonic() + lease.seconds
    while not lease.acquire():
        if time.monotonic() > until:
            raise TrackingDown(f"{lease.who()} is still mirroring {store.root}; `kinetok sync` finishes it later")
        time.sleep(0.1)
    try:
        yield
    finally:
        lease.release()


def _open_parent(work: _Mirror) -> None:
    if "" in work.known:
        return
    state = work.state
    tags = {
        "kinetok.run": state["run_id"],
        "kinetok.job": state["job"],
        "kinetok.commit": state.get("commit"),
        "kinetok.host": state.get("host"),
    }
    texts = {name: str(value) for name, value in tags.items()}
    work.known[""] = work.client.create_run(work.experiment, milliseconds(state["started"]), texts, f"{state['job']} {state['run_id']}")


def _close_parent(work: _Mirror) -> None:
    good = all(stage["status"] in ("done", "cached") for stage in _stages(work.state).values())
    work.client.set_terminated(work.place("").run_id, "FINISHED" if good else "FAILED", milliseconds(work.state["ended"]))


def _describe(work: _Mirror) -> None:
    """The stages as a table in the parent's description, which the MLflow UI shows first."""
    rows = [f"| {name} | {stage['kind']} | {stage['status']} | `{stage['key']}` |" for name, stage in _stages(work.state).items()]
    text = "\n".join(["| stage | kind | status | key |", "|---|---|---|---|", *rows])
    work.client.set_tag(work.place("").run_id, "mlflow.note.content", text)


def _mirror_stage(work: _Mirror, name: str, stage: JobState) -> None:
    """Bring one child up to date; one whose end was mirrored is not touched again."""
    begin = stage.get("started") or work.state["started"]
    end = begin if stage["status"] == "cached" else stage.get("ended") or work.state.get("ended")
    if name not in work.known:
        tags = {"kinetok.run": work.state["run_id"], "kinetok.stage": name, "kinetok.kind": stage["kind"], "kinetok.key": stage["key"]}
        texts = {"mlflow.parentRunId": work.place("").run_id, **{tag: str(value) for tag, value in tags.items()}}
        work.known[name] = work.client.create_run(work.experiment, milliseconds(begin), texts, name)
    closed = fingerprint([stage, end])
    if work.known[name].data.tags.get("kinetok.mirrored") == closed:
        return
    if stage["status"] != "cached":
        _log_curves(work, name, stage, milliseconds(begin), milliseconds(end) if end else None)
    artifact = work.store.get(str(stage["kind"]), name, str(stage["key"])) if stage["status"] in ("done", "cached") else None
    if artifact is not None:
        log_artifact(work.place(name), work.store, artifact, cached=stage["status"] == "cached")
        log_report(work.place(""), artifact)
    if end is not None:
        _close_stage(work, name, stage, end, closed)


def _close_stage(work: _Mirror, name: str, stage: JobState, end: Plain, closed: str) -> None:
    run_id = work.place(name).run_id
    if stage.get("error"):
        work.client.set_tag(run_id, "kinetok.error", str(stage["error"])[:5000])
    work.client.set_terminated(run_id, ENDS[str(stage["status"])], milliseconds(end))
    work.client.set_tag(run_id, "kinetok.mirrored", closed)


def _log_curves(work: _Mirror, name: str, stage: JobState, begin: int, end: int | None) -> None:
    """Send the lines past the last step sent, of the stage's own metrics and of the machine; times are in milliseconds."""
    from mlflow.entities import RunTag

    logged: dict[str, int] = json.loads(work.known[name].data.tags.get("kinetok.logged", "{}"))
    own = read_metrics(work.store.folder(str(stage["kind"]), name, str(stage["key"])))
    whole = machine.samples(work.store.root / RUNS / str(work.state["run_id"]))
    here = [{**line, "step": float((_at(line) - begin) // 1000)} for line in whole if _at(line) >= begin]
    for group, lines in (("own", own), ("machine", here)):
        in_time = [line for line in lines if end is None or _at(line) <= end]
        for batch in _batches(in_time, after=logged.get(group, -1)):
            logged[group] = int(batch[-1].step)
            work.client.log_batch(work.place(name).run_id, metrics=batch, tags=[RunTag("kinetok.logged", json.dumps(logged))])


def _at(line: Line) -> int:
    return int((line["time"] or 0.0) * 1000)


def _batches(lines: Sequence[Line], after: int) -> Iterator[list["Metric"]]:
    """Metrics of the lines past step `after`, whole lines together, at most `BATCH` (or one line) at a time."""
    from mlflow.entities import Metric

    batch: list[Metric] = []
    for line in lines:
        step = int(line["step"] or 0)
        points = [Metric(metric_name(k), v, _at(line), step) for k, v in line.items() if k not in ("step", "time") and v is not None]
        if step <= after or not points:
            continue
        if batch and len(batch) + len(points) > BATCH:
            yield batch
            batch = []
        batch += points
    if batch:
        yield batch
