"""What is sent to a cluster, and what a connection that is lost on the way does to it: nothing."""

import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from kinetok.infra import provenance, submit
from kinetok.infra.errors import ClusterError, ConfigError
from kinetok.infra.submit import JOB_FILE, Jobs, Parcel
from kinetok.infra.wheel import build_wheel
from kinetok.pipelines.cli import main

from .clusters import Line, Running, cluster

JOB = "name: tiny\ntracking: null\nstages:\n  scenes: {kind: scenes, count: 1, size: 32, seconds: 1, real: false}\n"


def kinetok(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """No token, whatever lies in this user's home; and the head finds this very Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield


@pytest.fixture
def parcel(tmp_path: Path) -> Parcel:
    return Parcel("tiny job", JOB.encode(), ("--set", "scenes.count=2; rm -rf /"), build_wheel(tmp_path / "wheels"))


class Head:
    """Stands in for the Jobs API: remembers what was submitted, and breaks down as it is told."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.lost_answers = 0

    def list_jobs(self) -> list[object]:
        return [
            SimpleNamespace(submission_id=name, status=SimpleNamespace(is_terminal=lambda state=state: state == "ended"), start_time=0)
            for name, state in self.jobs.items()
        ]

    def submit_job(self, *, submission_id: str, **_: object) -> str:
        if submission_id in self.jobs:
            raise RuntimeError(f"Request failed with status code 500: ValueError: Job with submission_id {submission_id} already exists.")
        self.jobs[submission_id] = "running"
        if self.lost_answers:
            self.lost_answers -= 1
            raise RuntimeError("Request failed with status code 502: Bad Gateway")
        return submission_id


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    found = Head()
    monkeypatch.setattr(submit, "_client", lambda address: found)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.001)
    return found


def test_the_job_file_travels_alone_and_its_options_are_no_shell(parcel: Parcel, tmp_path: Path) -> None:
    folder = tmp_path / "sent"
    folder.mkdir()
    environment = parcel.environment(folder)
    assert environment == {
        "working_dir": str(folder),
        "py_modules": [str(parcel.wheel.with_suffix("") / "kinetok")],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"},
    }
    assert [path.name for path in folder.iterdir()] == [JOB_FILE]
    assert parcel.command == "python3 -m kinetok.pipelines.cli run job.yaml --set 'scenes.count=2; rm -rf /'"
    assert re.fullmatch(r"kinetok-tiny_job-[0-9a-f]{12}-", parcel.prefix)


def test_an_answer_that_is_lost_doubles_no_job(parcel: Parcel, head: Head) -> None:
    head.lost_answers = 1
    assert Jobs("http://head").submit(parcel) == (f"{parcel.prefix}1", True)
    assert list(head.jobs) == [f"{parcel.prefix}1"]


def test_what_runs_is_joined_and_what_has_ended_runs_again(parcel: Parcel, head: Head) -> None:
    jobs = Jobs("http://head")
    assert jobs.submit(parcel) == (f"{parcel.prefix}1", False)
    assert jobs.submit(parcel) == (f"{parcel.prefix}1", True)
    head.jobs[f"{parcel.prefix}1"] = "ended"
    assert jobs.submit(parcel) == (f"{parcel.prefix}2", False)
    other = Parcel(parcel.name, parcel.job + b" ", parcel.options, parcel.wheel)
    assert jobs.submit(other) == (f"{other.prefix}1", False) and other.prefix != parcel.prefix


def test_a_head_that_never_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.001)
    with pytest.raises(ClusterError, match=r"http://127.0.0.1:1 does not answer: .* see to the tunnel or the address"):
        Jobs("http://127.0.0.1:1")


def test_patience_begins_anew_after_a_connection_that_had_held(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hours of a followed log count for nothing in how long the head has been silent."""
    clock = iter([0.0, 7200.0, 7201.0, 7202.0, 7203.0, 14000.0, 14001.0])
    notes: list[str] = []
    jobs, failures = Jobs("http://head"), iter([True, True, True, False])
    monkeypatch.setattr(submit, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))

    def ask() -> str:
        if next(failures):
            raise ConnectionError("reset")
        return "answer"

    assert jobs._patiently(ask, 900.0, notes.append) == "answer"
    assert len(notes) == 2, "told once for each loss"


def test_a_submission_is_found_by_its_start(head: Head) -> None:
    head.jobs = {"kinetok-a-1-1": "ended", "kinetok-a-1-2": "ended", "raysubmit_x": "running"}
    jobs = Jobs("http://head")
    assert jobs.find("a-1-2") == "kinetok-a-1-2"
    with pytest.raises(ClusterError, match="2 submissions begin with a: kinetok-a-1-1, kinetok-a-1-2"):
        jobs.find("a")
    with pytest.raises(ClusterError, match="no submission begins with raysubmit"):
        jobs.find("raysubmit")


def test_a_store_of_this_machine_alone_is_refused() -> None:
    submit.require_shared("s3://bucket/prefix")
    submit.require_shared("/mnt/shared")
    with pytest.raises(ConfigError, match="store: work is a folder of the machine that runs the job; name one that every node reaches"):
        submit.require_shared("work")


def test_a_driver_that_was_sent_knows_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"metadata": {"job_submission_id": "kinetok-x-1", provenance.WHEEL: "k.whl", provenance.COMMIT: "abc+dirty"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(told))
    assert provenance.submission() == ("kinetok-x-1", "k.whl", "abc+dirty")
    assert provenance.commit() == "abc+dirty"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    assert provenance.submission() is None


@pytest.fixture(scope="module")
def running(ray_cluster: None) -> Iterator[Running]:
    """Beside a local Ray of this process, as other tests leave one: neither takes the other's address."""
    with cluster([]) as found:
        yield found


@pytest.mark.ray
@pytest.mark.long
def test_submitted_over_a_line_that_breaks(running: Running, tmp_path: Path) -> None:
    """The answer to the submission is lost, and the log's connection breaks: one job, told once, with nothing but its two files."""
    job = tmp_path / "job.yaml"
    job.write_text(JOB)
    (tmp_path / "secret.txt").write_text("of the working tree")
    line = Line(int(running.dashboard.rpartition(":")[2]), break_after_request=[b"POST /api/jobs/"], break_answers=1)
    with line.open() as near:
        done = kinetok("submit", str(job), "--address", near, "--store", str(tmp_path / "store"))
        assert done.exit_code == 0, done.output
        listed = kinetok("status", "--address", near).stdout
    assert line.cut == 2 and not line.break_after_request
    assert len(re.findall("kinetok-tiny", listed)) == 1 and "succeeded" in listed
    assert done.stdout.count("scenes: running") == 1 and "does not answer; the job goes on there" in done.stderr
    record = json.loads(next((tmp_path / "store" / "runs").glob("*.json")).read_text())
    assert record["submission"] in done.stderr and record["wheel"].startswith("kinetok-") and record["stages"]["scenes"]["status"] == "done"
    assert (record["commit"] or "").removesuffix("+dirty") == (provenance.commit() or "").removesuffix("+dirty")
    packages = [sent for sent in line.sent if sent.startswith(b"PUT /api/packages/")]
    contents = [set(zipfile.ZipFile(io.BytesIO(sent[sent.index(b"PK\x03\x04") :])).namelist()) for sent in packages]
    job_package = next(names for names in contents if JOB_FILE in names)
    assert job_package == {JOB_FILE}
    assert all(names == job_package or all(name.startswith("kinetok") for name in names) for names in contents)
    assert b"of the working tree" not in b"".join(line.sent)


@pytest.mark.ray
@pytest.mark.long
def test_a_cancelled_job_stops_where_it_may_go_on(running: Running, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB.replace("count: 1", "count: 100000"))
    sent = kinetok("submit", str(job), "--address", running.dashboard, "--store", str(tmp_path / "store"), "--detach")
    assert sent.exit_code == 0
    name = sent.stderr.split()[0]
    while "scenes: running" not in kinetok("logs", name, "--address", running.dashboard).stdout:
        pass
    assert kinetok("cancel", name, "--address", running.dashboard).stdout == f"{name} is stopping\n"
    followed = kinetok("logs", name, "--follow", "--address", running.dashboard)
    assert followed.exit_code == 1 and "stage scenes was asked to stop" in followed.stdout
    assert "stopped" in kinetok("status", name, "--address", running.dashboard).stdout
    shown = kinetok("status", name, "--store", str(tmp_path / "store")).stdout
    assert "failed" in shown and "asked to stop" in shown
