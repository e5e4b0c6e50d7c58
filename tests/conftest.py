"""Fixtures that several folders of tests share."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the slowest tests first, the kills of whole jobs before all: started last, one process would wait for the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_faults.py", item.path not in slow))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for the whole session, with four logical CPUs."""
    from kinetok.infra.launch import start_ray

    start_ray(cpus=4)
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A gloo group of this process alone; one for the whole session, because DeepSpeed holds on to the first it sees."""
    import torch

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        torch.distributed.init_process_group("gloo")
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real clips beside the checkout (or where KINETOK_DATA says); tests that need them are skipped without."""
    folder = Path(os.environ.get("KINETOK_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "metadata.csv").exists():
        pytest.skip("the real clips are not here")
    return folder


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """URL of a bucket, with the environment that leads there: on a server of moto's, or on the one that KINETOK_TEST_S3 and AWS_* name."""
    import boto3
    from moto.server import ThreadedMotoServer

    if own := os.environ.get("KINETOK_TEST_S3"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", own)
            bucket = f"kinetok-{uuid.uuid4().hex[:12]}"
            boto3.client("s3").create_bucket(Bucket=bucket)
            yield f"s3://{bucket}"
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="toys")
        yield "s3://toys"
    server.stop()


LEAK_PATIENCE_SECONDS = 60.0
SERVICES = ("_AutoscalingCoordinatorActor", "ActorLocationTracker", "_StatsActor", "Controllers")
"""Ray Data's own, and ours: one of each in a cluster, without CPUs; they are there from the first data set or training on."""


def living() -> set[str]:
    """Actors that are not dead and placement groups that are not removed, as Ray's own tables say."""
    import ray
    from ray.util import placement_group_table

    actors = ray._private.state.actors()  # type: ignore[attr-defined]
    groups = placement_group_table()
    kept = [(actor["ActorClassName"], name) for name, actor in actors.items() if actor["State"] != "DEAD"]
    held = [("placement group", name) for name, group in groups.items() if group["state"] != "REMOVED"]
    return {f"{what} {name}" for what, name in (*kept, *held) if what not in SERVICES}


@pytest.fixture
def nothing_left(ray_cluster: None) -> Iterator[None]:
    """Whatever the test starts on Ray is gone soon after it."""
    before = living()
    yield
    deadline = time.monotonic() + LEAK_PATIENCE_SECONDS
    while living() - before and time.monotonic() < deadline:
        threading.Event().wait(0.2)
    assert living() - before == set()
