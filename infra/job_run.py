"""`JobRun`: what one run of a job did, as `runs/{run_id}.json` in the store says it, and tables of runs and artifacts for people.

Not covered: making one (`run.py`), and its mirror in MLflow (`tracking.py`).
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Literal, TypeAlias

from rich.markup import escape
from rich.table import Table

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.config import Config
from kinetok.infra.errors import StoreError
from kinetok.infra.plan import human_bytes, human_seconds

RUNS = "runs"

Status: TypeAlias = Literal["planned", "cached", "running", "done", "failed", "skipped"]


class StageRun(Config):
    """One stage of a job run."""

    kind: str
    key: str
    status: Status = "planned"
    folder: str
    error: str | None = None
    """What a user needs to know; a traceback where the error is not one of kinetok's own."""
    started: str | None = None
    ended: str | None = None


class JobRun(Config):
    """`runs/{run_id}.json`: what one run of a job did; rewritten whole at each change."""

    run_id: str
    job: str
    started: str
    ended: str | None = None
    host: str
    commit: str | None = None
    submission: str | None = None
    """Id of the Ray job that `kinetok submit` made of it."""
    ray_job: str | None = None
    """Ray's own id of the job that did the work."""
    dashboard: str | None = None
    """Address of the dashboard of that cluster."""
    wheel: str | None = None
    """File name of the wheel that was sent, whose version ends in a digest of the code."""
    stages: dict[str, StageRun]

    @property
    def succeeded(self) -> bool:
        """Whether every selected stage is finished."""
        return all(stage.status in ("cached", "done") for stage in self.stages.values())


def recent_runs(store: Store, count: int) -> list[JobRun]:
    """The newest `count` runs, newest first; run ids begin with their time, to the microsecond."""
    names = sorted((name for name in store.root.files(RUNS) if name.count("/") == 1 and name.endswith(".json")), reverse=True)
    return [_read(store, name) for name in names[:count]]


def run_table(state: JobRun, store: Store) -> Table:
    """What a run did, one row a stage."""
    table = Table(title=f"{state.job} {state.run_id}", title_justify="left", header_style="bold")
    for column in ("stage", "state", "time", "samples", "quarantined", "bytes", "folder or error"):
        table.add_column(column, justify="right" if column in ("time", "samples", "quarantined", "bytes") else "left", overflow="fold")
    for name, stage in state.stages.items():
        found = store.get(stage.kind, name, stage.key) if stage.status in ("done", "cached") else None
        record = found.record if found else None
        table.add_row(
            name,
            stage.status,
            _elapsed(stage),
            str(record.counts.written or "") if record else "",
            str(record.counts.quarantined or "") if record else "",
            human_bytes(record.bytes) if record else "",
            escape(str(found.folder) if found else (stage.error or "").strip().rsplit("\n", 1)[-1]),
        )
    return table


def _elapsed(stage: StageRun) -> str:
    if stage.status == "cached" or stage.started is None or stage.ended is None:
        return ""
    return human_seconds((datetime.fromisoformat(stage.ended) - datetime.fromisoformat(stage.started)).total_seconds())


def artifact_table(artifacts: Iterable[Artifact]) -> Table:
    """Finished artifacts, oldest first."""
    table = Table(title="artifacts", title_justify="left", header_style="bold")
    for column in ("kind", "name", "key", "made", "time", "samples", "quarantined", "bytes"):
        table.add_column(column, justify="right" if column in ("time", "samples", "quarantined", "bytes") else "left")
    for artifact in sorted(artifacts, key=lambda artifact: artifact.record.started):
        record = artifact.record
        counts = (str(record.counts.written or ""), str(record.counts.quarantined or ""))
        made = f"{datetime.fromisoformat(record.started):%Y-%m-%d %H:%M}"
        table.add_row(record.kind, record.name, record.key, made, human_seconds(record.seconds), *counts, human_bytes(record.bytes))
    return table


def pages(state: JobRun, store: Store) -> list[str]:
    """HTML pages among the outputs of a run, for people to open."""
    found = [store.get(stage.kind, name, stage.key) for name, stage in state.stages.items() if stage.status in ("done", "cached")]
    return [artifact.folder.path(name) for artifact in found if artifact for name in artifact.record.files if name.endswith(".html")]


def _read(store: Store, name: str) -> JobRun:
    try:
        return JobRun.model_validate_json(store.root.read_bytes(name))
    except ValueError as error:
        raise StoreError(f"{store.root.path(name)} cannot be read ({error}); delete it, the artifacts do not need it") from error
