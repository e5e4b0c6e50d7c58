"""The simulated store answers as S3 does, and a small simulation runs the real code to its end."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kinetok.infra import s3
from kinetok.infra.storage import Folder

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for name in ("_client", "time"):
        monkeypatch.setattr(s3, name, getattr(s3, name))
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("simulate")


def test_the_store_in_memory_is_one(simulate: ModuleType) -> None:
    simulation = simulate.Simulation(3, 1, 1.0, 0)
    folder = Folder("s3://data/x")
    folder.write_bytes("a/1", b"one")
    folder.write_bytes("a/2", b"two")
    assert folder.read_bytes("a/1") == b"one" and folder.read_range("a/2", 1, 2) == b"wo" and folder.files() == {"a/1": 3, "a/2": 3}
    assert not folder.write_if("a/1", b"new", None) and folder.write_if("a/1", b"new", b"one") and folder.read_bytes("a/1") == b"new"
    assert Folder("s3://data").folders() == ["webvid", "x"] and not folder.exists("a/3")
    folder.remove("a")
    assert folder.files() == {} and simulation.clock.now > 0


def test_a_store_beyond_its_limit_says_slow_down_and_is_asked_again(simulate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(simulate.LIMITS, "put", 5)
    found = simulate.Simulation(40, 40, 0.0, 0).run()
    assert found.refused and found.peak == 5
    alone = simulate.Simulation(40, 40, 10.0, 0).run()
    assert alone.phases["encode"].alone <= alone.phases["encode"].makespan


def test_what_a_shard_costs_does_not_grow(simulate: ModuleType) -> None:
    few, many = (simulate.Simulation(shards, 20, 3.0, 0).run() for shards in (20, 60))
    each = [{sort: count / found.shards for sort, count in found.requests.items()} for found in (few, many)]
    assert all(each[1][sort] <= each[0][sort] for sort in ("put", "get", "list"))
