"""Fixtures that several folders of tests share."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")


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
