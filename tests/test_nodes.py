"""A submitted job on several nodes: decoding on one group, encoding and training on the other, as Ray's own state tells it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import yaml
from tests.small_job import CAUSAL, TRAIN

from kinetok.infra.artifact import Store
from kinetok.infra.storage import Folder

from .infra.clusters import Running, cluster, namespaces

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(1800)]
GROUPS = {"decoder_custom": {"decoder": 1}, "custom": {"trainer": 1}}
JOB = {
    "name": "groups",
    "tracking": None,
    "resources": {"default": {"batch_size": 2, **GROUPS}, "base": {"batch_size": 1, "workers": 2}},
    "stages": {
        "scenes": {"kind": "scenes", "count": 6, "size": 64, "seconds": 2.5, "real": False, "shard_videos": 3},
        "videos": {"kind": "ingest", "made_by": "scenes"},
        "clips": {"kind": "clips", "videos": "videos", "fps": 8, "frames": 9, "height": 32, "width": 32, "shard_clips": 4},
        "base": {"kind": "train", "data": "clips", "model": CAUSAL, "steps": 4, **TRAIN},
        "tokens": {"kind": "encode", "data": "clips", "model": "base"},
    },
}
DECODER, TRAINER = {"CPU": 2, "decoder": 2}, {"CPU": 1, "trainer": 1}
Nodes = Callable[[Sequence[dict[str, float]]], AbstractContextManager[Running]]
DECODING, COMPUTING = ("clips: cut", "tokens: decode_unit"), ("RayTrainWorker", "tokens: Encoder")
"""What Ray calls the tasks that cut clips, and those that decode them; the workers of a training, and of an encode."""


def kinetok(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kinetok.pipelines.cli", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the nodes and the commands of a test share: no token, one thread, and this very Python."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def placed(running: Running) -> dict[str, set[str]]:
    """For each function and class of ours, the custom resources and addresses of the nodes that its tasks and actors ran on."""
    from ray.util.state import list_actors, list_nodes, list_tasks

    def group(resources: dict[str, float]) -> str:
        return next((name for name in ("decoder", "trainer") if name in resources), "head")

    groups = {node.node_id: f"{group(node.resources_total)} {node.node_ip}" for node in list_nodes(running.dashboard)}
    found: dict[str, set[str]] = {name: set() for name in (*DECODING, *COMPUTING)}
    for task in list_tasks(running.dashboard, limit=10_000, filters=[("type", "=", "NORMAL_TASK")]):
        for name in DECODING:
            if f"({name}" in task.name and task.node_id:
                found[name].add(groups[task.node_id])
    for actor in list_actors(running.dashboard, limit=10_000):
        for name in COMPUTING:
            if name in actor.class_name and actor.node_id:
                found[name].add(groups[actor.node_id])
    return found


def run_on(nodes: Nodes, folder: Path) -> tuple[dict[str, set[str]], str]:
    """Run the job on a decoder and two trainers; where its work was, and what was said of a job that no node can hold."""
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    store = folder / "store"
    with nodes([DECODER, TRAINER, TRAINER]) as running:
        where = ["--address", running.dashboard, "--store", str(store)]
        done = kinetok("submit", str(folder / "job.yaml"), *where)
        assert done.returncode == 0, done.stdout + done.stderr
        found = placed(running)
        impossible = kinetok("submit", str(folder / "job.yaml"), *where, "--from", "base", "--force", "--set", "resources.base={gpus: 1}")
        assert impossible.returncode == 1
    assert {a.name for a in Store(Folder(str(store))).all()} == set(JOB["stages"])  # type: ignore[call-overload]
    summary = json.loads(next(store.glob("train/base-*/training.json")).read_text())
    assert summary["attempts"] == [{"workers": 2, "first_step": 1}]
    return found, impossible.stdout


def test_decoding_and_computing_stay_on_their_nodes(tmp_path: Path) -> None:
    found, refused = run_on(cluster, tmp_path)
    assert all({where.split()[0] for where in found[name]} == {"decoder"} for name in DECODING), found
    assert all({where.split()[0] for where in found[name]} == {"trainer"} for name in COMPUTING), found
    assert "base asks for 1 x training worker of 1 CPU, 1 GPU" in refused and "GPU 0 on the biggest node and 0 in the whole" in refused


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces want root and iproute2")
def test_the_same_with_an_address_for_each_node(tmp_path: Path) -> None:
    found, _ = run_on(namespaces, tmp_path)
    assert all(found[name] == {"decoder 10.77.0.2"} for name in DECODING), found
    assert found["RayTrainWorker"] == {"trainer 10.77.0.3", "trainer 10.77.0.4"}, found
    assert found["tokens: Encoder"] <= found["RayTrainWorker"], found
