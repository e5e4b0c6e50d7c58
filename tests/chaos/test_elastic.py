"""One training on a cluster that shrinks under it and that announces the loss of a node: the loss curve is the one of a calm cluster."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chaos.cluster import ENVIRONMENT, Cluster, destroy
from tests.chaos.world import wait_until
from tests.small_job import CAUSAL

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.checkpoint import committed
from kinetok.infra.fit import RUNS
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.storage import Folder

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(1800)]
STEPS = 40
LONG = 600
"""Steps of a training that still goes on when a notice has reached it: some seconds for the command, two for Ray Train to ask."""


def job(zero: int, every: int, workers: dict[str, int], *, steps: int = STEPS) -> dict[str, Any]:
    train = {"kind": "train", "data": "clips", "model": CAUSAL, "steps": steps, "global_batch": 4, "log_every": 1, "eval_every": steps}
    return {
        "name": "elastic",
        "tracking": None,
        "resources": {"base": {"batch_size": 2, "zero": zero, **workers}},
        "stages": {
            "scenes": {"kind": "scenes", "count": 6, "size": 64, "seconds": 2.5, "real": False},
            "videos": {"kind": "ingest", "made_by": "scenes"},
            "clips": {"kind": "clips", "videos": "videos", "fps": 8, "frames": 9, "height": 32, "width": 32},
            "base": {**train, "checkpoint_every": every, "optimizers": {"autoencoder": {"lr": 1e-3}}},
        },
    }


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head and two nodes of one CPU each."""
    with tempfile.TemporaryDirectory(prefix="kn", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Cluster(Path(folder), {}, cpus=1)
        try:
            wait_until(made.joined, 120)
            yield made
        finally:
            made.stop()


def build(cluster: Cluster, store: Path, fields: dict[str, Any], meanwhile: Callable[[Folder], None] = lambda base: None) -> Artifact:
    """Run the job on the cluster; `meanwhile` is called with the folder that the training fills."""
    path = store.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(fields | {"store": str(store)}))
    command = [sys.executable, "-m", "kinetok.pipelines.cli", "run", str(path)]
    with store.with_suffix(".log").open("wb") as log:
        driver = subprocess.Popen(command, env=os.environ | ENVIRONMENT | {"RAY_ADDRESS": cluster.address}, stdout=log, stderr=log)
    try:
        wait_until(lambda: driver.poll() is not None or bool(list(store.glob("train/base-*/metrics/*"))), 600)
        meanwhile(Folder(str(next(store.glob("train/base-*")))))
        assert driver.wait(900) == 0, store.with_suffix(".log").read_text()[-3000:]
    finally:
        destroy(driver)
    return Store(Folder(str(store))).find("base")


def losses(base: Artifact) -> dict[int, float]:
    return {int(line["step"]): line["train/autoencoder/loss"] for line in read_metrics(base.folder)}


def attempts(base: Artifact) -> list[dict[str, int]]:
    found: list[dict[str, int]] = json.loads(base.folder.read_text("training.json"))["attempts"]
    return found


def reaches(step: int) -> Callable[[Folder], None]:
    """Wait until the training has logged `step`."""

    def wait(base: Folder) -> None:
        wait_until(lambda: any(line["step"] >= step for line in read_metrics(base)), 600)

    return wait


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_lost_node_leaves_fewer_workers_and_the_same_losses(cluster: Cluster, tmp_path: Path, zero: int) -> None:
    calm = build(cluster, tmp_path / "calm", job(zero, STEPS, {"workers": 2}))

    def lose(base: Folder) -> None:
        reaches(12)(base)
        cluster.lose_node(0)

    shrunk = build(cluster, tmp_path / "shrunk", job(zero, 5, {"workers": 1, "max_workers": 2}), lose)
    assert [attempt["workers"] for attempt in attempts(shrunk)] == [2, 1]
    assert attempts(shrunk)[1]["first_step"] > 5
    assert losses(shrunk) == pytest.approx(losses(calm), rel=1e-3)


def test_a_node_that_is_announced_to_go_costs_no_step(cluster: Cluster, tmp_path: Path) -> None:
    """No checkpoint is due in the whole training but the one that the notice asks for."""

    def drain(base: Folder) -> None:
        reaches(5)(base)
        cluster.drain(0, seconds=20)
        wait_until(lambda: committed(base / RUNS) is not None, 60)
        cluster.lose_node(0)

    made = build(cluster, tmp_path / "store", job(0, 2 * LONG, {"workers": 1, "max_workers": 2}, steps=LONG), drain)
    assert [attempt["workers"] for attempt in attempts(made)] == [2, 1]
    assert attempts(made)[1]["first_step"] > 5
    assert sorted(losses(made)) == list(range(1, LONG + 1))
