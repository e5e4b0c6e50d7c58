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
from typing import TYPE_CHECKING

from kinetok.infra import machine
from kinetok.infra.artifact import Lease, Store
from kinetok.infra.errors import StoreError
from kinetok.infra.fingerprint import fingerprint
from kinetok.infra.job_run import RUNS, JobRun, StageRun
from kinetok.infra.metrics_log import Line, read_metrics
from kinetok.infra.mlflow_store import TrackingDown, connect, experiment_id, resolve, ui
from kinetok.infra.registry import Place, log_artifact, log_report, metric_name, milliseconds
from kinetok.infra.secrets import redact
from kinetok.infra.storage import Folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

__all__ = ["TrackingDown", "mirror", "pending", "sync", "ui"]

MARKER = "mirrored.json"
LOCK = "_mirror"
ERROR_LENGTH = 5000
"""Characters kept of an error; MLflow cuts tags at 8000."""
BATCH = 900
"""Metrics of one request; MLflow takes 1000."""
ENDS = {"done": "FINISHED", "cached": "FINISHED", "failed": "FAILED", "running": "KILLED"}
"""How a child ends in MLflow. Planned and skipped stages get no child: they stand in the parent's description."""


@dataclass(frozen=True)
class _Mirror:
    """One replay under way."""

    client: "MlflowClient"
    experiment: str
    store: Store
    run: JobRun
    known: dict[str, "Run"]
    """MLflow runs of this job run by stage name; the parent's name is empty."""

    def place(self, stage: str) -> Place:
        return Place(self.client, self.experiment, str(self.known[stage].info.run_id))


def mirror(store: Store, run_id: str, uri: str | None, experiment: str) -> str:
    """Bring MLflow up to the files of one job run, and say where it stands there. Repeating it changes nothing.

    Raises TrackingDown when MLflow does not answer.
    """
    run = _read_run(store, run_id)
    if run.ended is None and run.host == socket.gethostname():
        machine.sample(store.root / RUNS / run_id)
    return _replay(store, run, resolve(store, uri), experiment)


def sync(store: Store, uri: str | None, experiment: str) -> list[str]:
    """Replay every run that `pending` lists; returns their ids. A run that was killed is closed where the next one began.

    One that still builds something beside the next one is left open.
    """
    chosen, waiting = resolve(store, uri), set(pending(store))
    runs = _all_runs(store)
    for run, later in zip(runs, [*runs[1:], None], strict=True):
        if run.run_id in waiting:
            ended = run.ended or (later.started if later and not _builds(run) else None)
            _replay(store, run.model_copy(update={"ended": ended}), chosen, experiment)
    return [run.run_id for run in runs if run.run_id in waiting]


def pending(store: Store) -> list[str]:
    """Ids of the job runs that no MLflow holds in full, oldest first: those still running, and those whose server was down."""
    return [run.run_id for run in _all_runs(store) if not (store.root / RUNS / run.run_id).exists(MARKER)]


def _all_runs(store: Store) -> list[JobRun]:
    """Every job run of a store, oldest first."""
    names = [name.removeprefix(f"{RUNS}/") for name in store.root.files(RUNS)] if store.root.exists(RUNS) else []
    runs = [_read_run(store, name.removesuffix(".json")) for name in names if "/" not in name and name.endswith(".json")]
    return sorted(runs, key=lambda run: run.started)


def _builds(run: JobRun) -> bool:
    """Whether a stage of the run holds its lease."""
    return any(stage.status == "running" and Lease(Folder(stage.folder)).held for stage in run.stages.values())


def _read_run(store: Store, run_id: str) -> JobRun:
    try:
        return JobRun.model_validate_json(store.root.read_bytes(f"{RUNS}/{run_id}.json"))
    except FileNotFoundError:
        raise StoreError(f"no job run {run_id!r} in {store.root}: its file {RUNS}/{run_id}.json is missing") from None
    except ValueError as error:
        raise StoreError(f"{store.root}/{RUNS}/{run_id}.json is no job run ({error}); delete the file to leave that run out") from error


def _replay(store: Store, run: JobRun, uri: str, experiment: str) -> str:
    with connect(store, uri) as client, _alone(store):
        number = experiment_id(client, store, uri, experiment)
        found = client.search_runs([number], f"tags.`kinetok.run` = '{run.run_id}'", max_results=1000)
        work = _Mirror(client, number, store, run, _by_stage(client, found))
        _open_parent(work)
        for name, stage in run.stages.items():
            if stage.status in ENDS:
                _mirror_stage(work, name, stage)
        _describe(work)
        if run.ended is not None:
            _close_parent(work)
            marker = {"uri": redact(uri), "experiment": experiment}
            (store.root / RUNS / run.run_id).write_text(MARKER, json.dumps(marker))
        place = f"experiments/{number}/runs/{work.place('').run_id}"
        return f"{redact(uri)}/#/{place}" if uri.startswith("http") else f"{place} of {redact(uri)}"


def _by_stage(client: "MlflowClient", found: Sequence["Run"]) -> dict[str, "Run"]:
    """One MLflow run for each stage, the parent's name empty.

    A server that makes a run but answers too late is asked again and makes another: the one that was written to stays, the rest goes.
    """
    known: dict[str, Run] = {}
    for run in sorted(found, key=lambda run: (-len(run.data.tags), run.info.run_id)):
        if known.setdefault(run.data.tags.get("kinetok.stage", ""), run) is not run:
            client.delete_run(run.info.run_id)
    return known


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
    run = work.run
    tags = {"kinetok.run": run.run_id, "kinetok.job": run.job, "kinetok.commit": str(run.commit), "kinetok.host": run.host}
    work.known[""] = work.client.create_run(work.experiment, milliseconds(run.started), tags, f"{run.job} {run.run_id}")


def _close_parent(work: _Mirror) -> None:
    status = "FINISHED" if work.run.succeeded else "FAILED"
    work.client.set_terminated(work.place("").run_id, status, milliseconds(work.run.ended))


def _describe(work: _Mirror) -> None:
    """The stages as a table in the parent's description, which the MLflow UI shows first."""
    rows = [f"| {name} | {stage.kind} | {stage.status} | `{stage.key}` |" for name, stage in work.run.stages.items()]
    links = {name: value for name, value in _ray_tags(work.run).items() if value}
    told = [f"\nRay: {', '.join(f'{name} {value}' for name, value in links.items())}"] if links else []
    text = "\n".join(["| stage | kind | status | key |", "|---|---|---|---|", *rows, *told])
    for name, value in {"mlflow.note.content": text, **links}.items():
        work.client.set_tag(work.place("").run_id, name, value)


def _ray_tags(run: JobRun) -> dict[str, str | None]:
    """The way from the MLflow run to the Ray job."""
    page = f"http://{run.dashboard}/#/jobs/{run.submission or run.ray_job}" if run.dashboard else None
    return {"ray.job_id": run.ray_job, "ray.submission_id": run.submission, "ray.dashboard": page}


def _mirror_stage(work: _Mirror, name: str, stage: StageRun) -> None:
    """Bring one child up to date; one whose end was mirrored is not touched again."""
    begin = stage.started or work.run.started
    end = begin if stage.status == "cached" else stage.ended or work.run.ended
    if name not in work.known:
        tags = {"kinetok.run": work.run.run_id, "kinetok.stage": name, "kinetok.kind": stage.kind, "kinetok.key": stage.key}
        tags["mlflow.parentRunId"] = work.place("").run_id
        work.known[name] = work.client.create_run(work.experiment, milliseconds(begin), tags, name)
    closed = fingerprint([stage, end])
    if work.known[name].data.tags.get("kinetok.mirrored") == closed:
        return
    if stage.status != "cached":
        _log_curves(work, name, stage, milliseconds(begin), milliseconds(end) if end else None)
    artifact = work.store.get(stage.kind, name, stage.key) if stage.status in ("done", "cached") else None
    if artifact is not None:
        log_artifact(work.place(name), work.store, artifact, cached=stage.status == "cached")
        log_report(work.place(""), artifact)
    if end is not None:
        _close_stage(work, name, stage, end, closed)


def _close_stage(work: _Mirror, name: str, stage: StageRun, end: str, closed: str) -> None:
    run_id = work.place(name).run_id
    if stage.error:
        work.client.set_tag(run_id, "kinetok.error", stage.error[:ERROR_LENGTH])
    work.client.set_terminated(run_id, ENDS[stage.status], milliseconds(end))
    work.client.set_tag(run_id, "kinetok.mirrored", closed)


def _log_curves(work: _Mirror, name: str, stage: StageRun, begin: int, end: int | None) -> None:
    """Send the lines past the last step sent, of the stage's own metrics and of the machine; times are in milliseconds."""
    from mlflow.entities import RunTag

    logged: dict[str, int] = json.loads(work.known[name].data.tags.get("kinetok.logged", "{}"))
    own = read_metrics(work.store.folder(stage.kind, name, stage.key))
    whole = machine.samples(work.store.root / RUNS / work.run.run_id)
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
