"""The MLflow mirror: repeating changes nothing, no step twice, nothing lost while the server is away."""

import json
import multiprocessing
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from kinetok.infra import machine, tracking
from kinetok.infra.artifact import Artifact, Counts, InputInfo, Lease, Record, Store, publish
from kinetok.infra.errors import ConfigError, KinetokError
from kinetok.infra.metrics_log import MetricsLog
from kinetok.infra.mlflow_store import embedded_uri
from kinetok.infra.storage import Folder

EXPERIMENT = "kinetok"
TIMES = {"started": "2026-11-21T10:00:00+00:00", "ended": "2026-11-21T10:05:00+00:00"}


def _artifact(store: Store, kind: str, name: str, key: str, inputs: dict[str, Artifact], **files: str) -> Artifact:
    folder = store.folder(kind, name, key)
    for path, text in files.items():
        folder.write_text(path.replace("__", "/").replace("_json", ".json").replace("_html", ".html"), text)
    infos = {f: (InputInfo(kind=a.kind, name=a.name, key=a.key, digest=a.digest),) for f, a in inputs.items()}
    record = Record(
        kind=kind,
        name=name,
        key=key,
        version=1,
        config={"model": {"width": 8, "kind": "toy"}, "steps": 3},
        inputs=infos,
        digest="",
        counts=Counts(input=5, written=4, quarantined=1),
        metrics={"psnr": 21.5, "broken": None},
        started=TIMES["started"],
        seconds=3.0,
        commit="abc123",
        run_id="r1",
    )
    return publish(folder, record)


def _stage(kind: str, key: str, status: str = "done") -> dict[str, object]:
    ends = {"started": TIMES["started"], "ended": TIMES["ended"] if status != "running" else None}
    return {"kind": kind, "key": key, "status": status, "folder": "", "error": None, **ends}


def _write_run(store: Store, run_id: str, stages: dict[str, dict[str, object]], *, ended: bool = True) -> None:
    state = {"run_id": run_id, "job": "toy", "host": "elsewhere", "commit": "abc123", "stages": stages}
    times = {"started": TIMES["started"].replace("10:00", f"10:0{run_id[-1]}"), "ended": TIMES["ended"] if ended else None}
    store.root.write_text(f"runs/{run_id}.json", json.dumps({**state, **times}))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Data, a model trained on it, a report, and the job run that made them."""
    store = Store(Folder(str(tmp_path / "work")))
    log = MetricsLog(store.folder("train", "base", "b" * 16), after=-1)
    for step in range(3):
        log.write(step, {"train/loss": 1.0 / (step + 1), "val/psnr@8": 10.0 + step})
    log.flush()
    clips = _artifact(store, "clips", "clips", "c" * 16, {})
    base = _artifact(store, "train", "base", "b" * 16, {"data": clips}, model__config_json="{}", model__weights="w")
    _artifact(store, "report", "report", "e" * 16, {"trained": base}, report_html="<p>fine</p>")
    _write_run(store, "r1", {"clips": _stage("clips", "c" * 16), "base": _running_now("base"), "report": _stage("report", "e" * 16)})
    return store


def _running_now(name: str) -> dict[str, object]:
    """A finished train stage whose end lies after the metric lines just written."""
    return {**_stage("train", name[0] * 16), "ended": "2100-01-01T00:00:00+00:00"}


def _client(store: Store) -> MlflowClient:
    return MlflowClient(tracking_uri=embedded_uri(store), registry_uri=embedded_uri(store))


def _runs(store: Store, run_id: str = "r1") -> dict[str, Run]:
    client = _client(store)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.`kinetok.run` = '{run_id}'")
    named = {run.data.tags.get("kinetok.stage", ""): run for run in found}
    assert len(named) == len(found), "one MLflow run per stage"
    return named


def _steps(store: Store, run: Run, metric: str) -> list[int]:
    return [point.step for point in _client(store).get_metric_history(run.info.run_id, metric)]


def _picture(store: Store) -> dict[str, object]:
    """All that MLflow holds of the run, for comparing."""
    picture: dict[str, object] = {}
    for name, run in _runs(store).items():
        sets = sorted((entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs)
        series = {metric: _steps(store, run, metric) for metric in run.data.metrics}
        picture[name] = (run.info.run_id, run.info.status, run.data.tags, run.data.params, sets, series)
    return picture


def test_a_run_is_mirrored_whole_and_twice_is_as_once(store: Store) -> None:
    tracking.mirror(store, "r1", None, EXPERIMENT)
    first = _picture(store)
    tracking.mirror(store, "r1", None, EXPERIMENT)
    assert _picture(store) == first

    runs, client = _runs(store), _client(store)
    assert set(runs) == {"", "clips", "base", "report"}
    base = runs["base"]
    assert base.info.status == "FINISHED" and base.data.tags["mlflow.parentRunId"] == runs[""].info.run_id
    assert base.data.params["model.width"] == "8"
    assert base.data.metrics["result/psnr"] == 21.5 and base.data.metrics["count/quarantined"] == 1
    assert _steps(store, base, "train/loss") == [0, 1, 2] == _steps(store, base, "val/psnr_8")
    assert base.data.tags["kinetok.upstream"] == f"clips-{'c' * 16}"
    assert {file.path for file in client.list_artifacts(runs[""].info.run_id)} == {"report.html"}
    assert {file.path for file in client.list_artifacts(runs["report"].info.run_id)} >= {"report.html", "record.json"}
    best = client.get_model_version_by_alias("base", "best")
    assert int(best.version) == 1 and best.tags["kinetok.key"] == "b" * 16
    assert len(client.search_model_versions("name = 'base'")) == 1
    report = client.get_run(runs["report"].info.run_id)  # a search leaves model inputs out
    assert [model.model_id for model in report.inputs.model_inputs] == [best.tags["kinetok.model_id"]]
    assert tracking.pending(store) == []


def test_output_and_input_are_the_same_data_set(store: Store) -> None:
    tracking.mirror(store, "r1", None, EXPERIMENT)
    runs = _runs(store)
    (made,), (read,) = (runs[name].inputs.dataset_inputs for name in ("clips", "base"))
    assert (made.dataset.name, made.dataset.digest) == (read.dataset.name, read.dataset.digest)
    assert len(made.dataset.digest) == 36
    contexts = [{tag.key: tag.value for tag in entry.tags}["mlflow.data.context"] for entry in (made, read)]
    assert contexts == ["output", "input"]


def test_a_resume_never_doubles_a_step(store: Store) -> None:
    key = "d" * 16
    out = store.folder("train", "again", key)
    running = {"again": _stage("train", key, "running")}
    _write_run(store, "r2", running, ended=False)
    log = MetricsLog(out, after=-1)
    for step in range(6):
        log.write(step, {"train/loss": float(step)})
    log.flush()
    tracking.mirror(store, "r2", None, EXPERIMENT)
    assert _runs(store, "r2")["again"].info.status == "RUNNING"

    resumed = MetricsLog(out, after=3)
    for step in range(4, 9):
        resumed.write(step, {"train/loss": float(step)})
    resumed.flush()
    for _ in range(2):
        tracking.mirror(store, "r2", None, EXPERIMENT)
    assert _steps(store, _runs(store, "r2")["again"], "train/loss") == list(range(9))
    assert tracking.pending(store) == ["r1", "r2"]


def test_a_cached_stage_points_to_the_run_that_made_it(store: Store) -> None:
    tracking.mirror(store, "r1", None, EXPERIMENT)
    _write_run(store, "r2", {"base": {**_stage("train", "b" * 16, "cached"), "started": None, "ended": None}})
    tracking.mirror(store, "r2", None, EXPERIMENT)
    cached = _runs(store, "r2")["base"]
    assert cached.data.tags["kinetok.cached"] == "true"
    assert cached.data.tags["kinetok.made_by_run"] == _runs(store)["base"].info.run_id
    assert not cached.data.metrics and len(_client(store).search_model_versions("name = 'base'")) == 1


def test_the_machine_is_sampled_while_this_host_runs_the_job(store: Store) -> None:
    state = json.loads(store.root.read_text("runs/r1.json"))
    now = {"started": "2026-01-01T00:00:00+00:00", "ended": None, "host": socket.gethostname()}
    stage = {**_stage("clips", "f" * 16, "running"), "started": now["started"]}
    store.root.write_text("runs/r1.json", json.dumps({**state, **now, "stages": {"clips": stage}}))
    tracking.mirror(store, "r1", None, EXPERIMENT)
    assert len(_steps(store, _runs(store)["clips"], "system/cpu_utilization_percentage")) == 1


def test_samples_of_the_machine_keep_their_distance(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for now in (0.0, 1.0, 5.0, 9.0, 700.0):
        machine.sample(folder, now=now)
    assert [line["time"] for line in machine.samples(folder)] == [0.0, 5.0, 700.0]


def test_a_killed_run_is_closed_by_sync_where_the_next_began(store: Store) -> None:
    _write_run(store, "r0", {"clips": _stage("clips", "9" * 16, "running")}, ended=False)
    assert tracking.sync(store, None, EXPERIMENT) == ["r0", "r1"]
    killed = _runs(store, "r0")
    assert killed["clips"].info.status == "KILLED" and killed[""].info.status == "FAILED"
    assert tracking.pending(store) == [] == tracking.sync(store, None, EXPERIMENT)


def test_sync_leaves_a_run_open_that_still_builds(store: Store) -> None:
    folder = store.folder("clips", "clips", "9" * 16)
    _write_run(store, "r0", {"clips": {**_stage("clips", "9" * 16, "running"), "folder": str(folder)}}, ended=False)
    lease = Lease(folder)
    assert lease.acquire()
    tracking.sync(store, None, EXPERIMENT)
    lease.release()
    assert _runs(store, "r0")["clips"].info.status == "RUNNING" and tracking.pending(store) == ["r0"]


@pytest.mark.timeout(60)
def test_a_server_that_is_down_says_so_at_once_and_sync_replays(store: Store) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(tracking.TrackingDown, match="kinetok sync") as caught:
            tracking.mirror(store, "r1", uri, EXPERIMENT)
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value, KinetokError) and tracking.pending(store) == ["r1"]
    assert tracking.sync(store, None, EXPERIMENT) == ["r1"]
    assert _steps(store, _runs(store)["base"], "train/loss") == [0, 1, 2]


def _mirror_in_child(root: str, run_id: str) -> None:
    tracking.mirror(Store(Folder(root)), run_id, None, EXPERIMENT)


def test_six_processes_on_a_fresh_store_share_one_database(store: Store) -> None:
    for run_id in ("r2", "r3"):
        _write_run(store, run_id, {"clips": _stage("clips", "c" * 16, "cached")})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "mlflow.store.tracking.sqlalchemy_store"])
    children = [context.Process(target=_mirror_in_child, args=(str(store.root), f"r{1 + n % 3}")) for n in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 6
    assert set(_runs(store)) == {"", "clips", "base", "report"} and set(_runs(store, "r3")) == {"", "clips"}
    assert len(_client(store).search_model_versions("name = 'base'")) == 1


def test_a_store_on_s3_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        tracking.resolve(Store(Folder("s3://bucket/work")), None)


def test_the_mlflow_run_leads_to_the_ray_job_and_its_place_is_told(store: Store) -> None:
    state = json.loads(store.root.read_text("runs/r1.json"))
    state |= {"ray_job": "01000000", "submission": "kinetok-toy-1", "dashboard": "10.0.0.1:8265"}
    store.root.write_text("runs/r1.json", json.dumps(state))
    place = tracking.mirror(store, "r1", None, EXPERIMENT)
    parent = _runs(store)[""]
    assert parent.info.run_id in place
    assert parent.data.tags["ray.job_id"] == "01000000" and parent.data.tags["ray.submission_id"] == "kinetok-toy-1"
    page = "http://10.0.0.1:8265/#/jobs/kinetok-toy-1"
    assert parent.data.tags["ray.dashboard"] == page and page in parent.data.tags["mlflow.note.content"]


def test_figures_of_a_clusters_nodes_are_read_from_their_exporters() -> None:
    page = "\n".join(
        [
            "# HELP ray_node_cpu_utilization busy",
            'ray_node_cpu_utilization{ip="10.0.0.1"} 42.5',
            'ray_node_mem_used{ip="10.0.0.1"} 2e+09',
            'ray_node_gpus_utilization{GpuIndex="0"} 90',
            'ray_node_gpus_utilization{GpuIndex="1"} 70',
        ]
    )
    expected = {"cpu_utilization_percentage": 42.5, "system_memory_usage_megabytes": 2000.0, "gpu_utilization_percentage": 80.0}
    assert dict(machine.node_figures(page)) == expected


def test_a_run_that_a_late_answer_made_twice_is_removed(store: Store) -> None:
    tracking.mirror(store, "r1", None, EXPERIMENT)
    first, client = _picture(store), _client(store)
    for run in _runs(store).values():
        kept = {name: run.data.tags[name] for name in ("kinetok.run", "kinetok.stage", "mlflow.parentRunId") if name in run.data.tags}
        client.create_run(run.info.experiment_id, run.info.start_time, kept)
    tracking.mirror(store, "r1", None, EXPERIMENT)
    assert _picture(store) == first
