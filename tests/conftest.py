"""Fixtures that several folders of tests share."""

import os
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
def shared_data() -> Path:
    """The real clips beside the checkout (or where KINETOK_DATA says); tests that need them are skipped without."""
    folder = Path(os.environ.get("KINETOK_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "metadata.csv").exists():
        pytest.skip("the real clips are not here")
    return folder
