"""A whole job whose source, store and checkpoints are on S3 behind faults, against the same job on a calm store; MLflow's files too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.faults.s3_proxy import Fault, S3Proxy, calm, seeded
from tests.small_job import small_job

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.mlflow_store import connect, embedded_uri
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import read_parts

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(1800)]
RATES = dict.fromkeys([Fault.ERROR, Fault.SLOW_DOWN, Fault.RESET, Fault.LOST, Fault.HALF], 0.03)
JOB = small_job("storm", scenes=10, base_steps=6, grown_steps=2) | {"tracking": None}


def _run(job: Path, store: str) -> None:
    for words in (["run", str(job), "--set", f"store={store}"], ["verify", "--all", "--store", store]):
        done = subprocess.run(
            [sys.executable, "-m", "kinetok.pipelines.cli", *words],
            check=False,
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": "120"},
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def _content(artifact: Artifact) -> object:
    """What must not depend on what happened on the way, nor on where the store is."""
    if artifact.kind == "ingest":
        return artifact.record.metrics
    if artifact.kind == "clips":
        rows = read_parts(artifact.folder).drop_columns("url").to_pylist()
        return rows, artifact.record.counts
    if artifact.kind == "train":
        return {path: info.sha256 for path, info in artifact.record.files.items() if path.startswith("model/")}
    return artifact.digest


def _results(store: Folder) -> dict[str, object]:
    return {artifact.name: _content(artifact) for artifact in Store(store).all()}


def test_a_job_on_a_store_full_of_faults_ends_as_on_a_calm_one(object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(JOB))
    base = f"{object_store}/{tmp_path.name}"
    with S3Proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        _run(job, f"{base}/calm")
        asked = len(proxy.seen)
        proxy.begin(seeded(3, RATES))
        _run(job, f"{base}/storm")
        struck = {str(fault): proxy.count(fault) for fault in RATES}
        proxy.begin(calm)
        assert _results(Folder(f"{base}/storm")) == _results(Folder(f"{base}/calm"))
    (tmp_path / "storm.json").write_text(json.dumps({"requests": asked, "faults": struck}))
    assert sum(struck.values()) > 30


def test_mlflow_keeps_its_files_on_s3(object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of runs and models go to S3 beside a database elsewhere; faults are outlasted by boto3's own repetitions."""
    store = Store(Folder(str(tmp_path)))
    (tmp_path / "file.txt").write_text("content")
    with S3Proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, connect(store, embedded_uri(store)) as client:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.begin(seeded(1, dict.fromkeys(RATES, 0.1), at_most=2))
        experiment = client.create_experiment("s3", artifact_location=f"{object_store}/mlflow")
        run = client.create_run(experiment).info.run_id
        for number in range(10):
            client.log_artifact(run, str(tmp_path / "file.txt"), f"folder{number}")
        assert len(client.list_artifacts(run)) == 10
        (tmp_path / "back").mkdir()
        assert Path(client.download_artifacts(run, "folder7/file.txt", str(tmp_path / "back"))).read_text() == "content"
        assert proxy.count() > 0
