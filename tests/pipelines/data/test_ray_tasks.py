"""Rows come back as they finish; a user's error keeps its kind and message across processes."""

import os
import threading
from typing import Any

import pytest
import ray

from kinetok.infra.errors import DataError, KinetokError, StoreError
from kinetok.infra.launch import ASIDE, MODEL_MEMORY
from kinetok.infra.stage import Resources
from kinetok.pipelines.data.ray_tasks import each_on_actors, each_on_ray


def test_nothing_to_do_starts_nothing() -> None:
    assert list(each_on_ray("cut", lambda item: item, [], resources=Resources(), stop=threading.Event())) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_every_item_once() -> None:
    def square(item: dict[str, Any]) -> dict[str, Any]:
        return {"square": item["n"] ** 2}

    rows = each_on_ray("squares", square, [{"n": n} for n in range(6)], resources=Resources(decoders=2), stop=threading.Event())
    assert sorted(row["square"] for row in rows) == [0, 1, 4, 9, 16, 25]


def whose(item: dict[str, Any]) -> dict[str, Any]:
    """What Ray calls the task that this runs in, how its process allocates memory, and how nice it is."""
    memory, nice = os.environ.get("GLIBC_TUNABLES"), os.getpriority(os.PRIO_PROCESS, 0)
    return {"task": ray.get_runtime_context().get_task_name(), "memory": memory, "nice": nice}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_calls_tasks_and_actors_by_their_stage() -> None:
    (task,) = each_on_ray("spring", whose, [{"n": 1}], resources=Resources(), stop=threading.Event())
    assert task["task"] == "Map(spring: whose)"
    (row,) = each_on_actors("autumn", lambda: whose, [{"n": 1}], resources=Resources(), stop=threading.Event())
    assert row["memory"] == MODEL_MEMORY["GLIBC_TUNABLES"]
    actors = ray._private.state.actors().values()  # type: ignore[attr-defined]
    assert "MapWorker(Map(autumn: Worker))" in {actor["ActorClassName"] for actor in actors}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_counts_no_cpu_stands_aside_and_nothing_else() -> None:
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    for cpus, asked in ((1.0, ours), (0.0, min(ours + ASIDE, 19))):
        (row,) = each_on_actors("aside", lambda: whose, [{"n": 1}], resources=Resources(cpus=cpus), stop=threading.Event())
        assert row["nice"] == asked


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (DataError("tar 3 is odd"), DataError, "^tar 3 is odd$"),
        (OSError(28, "No space left on device", "x"), StoreError, r"No space left on device.*then run again"),
    ],
)
def test_errors_keep_their_meaning(error: Exception, kind: type[KinetokError], message: str) -> None:
    def fail(item: dict[str, Any]) -> dict[str, Any]:
        raise error

    with pytest.raises(kind, match=message):
        list(each_on_ray("cut", fail, [{"n": 1}], resources=Resources(), stop=threading.Event()))
