"""A whole job killed with SIGKILL, or stopped with SIGTERM, in every kind of stage, then run again, against the same job left alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.small_job import small_job

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.storage import Folder

JOB = small_job("faults", scenes=10, base_steps=12, grown_steps=4)
MOMENTS = ("clips/*/index/*.parquet", "train/base-*/metrics/*.jsonl", "encode/trunk-*/shards/*.tar")
"""Files whose appearance means that a stage is in the middle of its work; the driver is killed then."""


def _start(job: Path, store: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "kinetok.pipelines.cli", "run", str(job), "--set", f"store={store}"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def _finish(job: Path, store: Path) -> None:
    process = _start(job, store)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()[-3000:]


def _signal_once(job: Path, store: Path, moment: str, number: signal.Signals) -> None:
    """Run the job until a file of the pattern lies in the store, and send its driver a signal; one that may tidy up leaves no lease."""
    process = _start(job, store)
    while not list(store.glob(moment)):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
    os.kill(process.pid, number)
    process.communicate()
    if number is signal.SIGTERM:
        assert process.returncode == 1 and not list(store.rglob("lease.json")) and not list(store.rglob("*.tmp-*"))


def _content(artifact: Artifact) -> object:
    """What must not depend on what happened on the way: data and weights, not the times in logs."""
    if artifact.kind == "ingest":  # a listing holds the times of the files it lists
        return artifact.record.metrics
    if artifact.kind == "train":
        return {path: info.sha256 for path, info in artifact.record.files.items() if path.startswith("model/")}
    return artifact.digest


def _steps(artifact: Artifact) -> list[int]:
    files = sorted(path for path in artifact.record.files if path.startswith("metrics/"))
    return [json.loads(line)["step"] for path in files for line in artifact.folder.read_text(path).splitlines()]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)  # a dozen runs of a job, on a slow machine beside other tests
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_job_ended_in_every_stage_ends_as_the_one_left_alone(number: signal.Signals, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(JOB))
    killed, calm = tmp_path / "store", tmp_path / "calm"
    _finish(job, killed)
    killed.rename(calm)  # both runs in the same place: the index of clips holds the addresses of the drawn tars
    for moment in MOMENTS:
        _signal_once(job, killed, moment, number)
    _finish(job, killed)
    expected, found = ({a.name: a for a in Store(Folder(str(store))).all()} for store in (calm, killed))
    assert {name: _content(a) for name, a in found.items()} == {name: _content(a) for name, a in expected.items()}
    assert [a.record.counts for a in found.values()] == [a.record.counts for a in expected.values()]
    assert _steps(found["base"]) == list(range(1, 13)), "metrics lines neither missing nor doubled after the resume"
    verify = subprocess.run(
        [sys.executable, "-m", "kinetok.pipelines.cli", "verify", "--all", "--store", str(killed)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert verify.returncode == 0, verify.stdout + verify.stderr
