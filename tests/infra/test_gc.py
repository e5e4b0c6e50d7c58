"""Garbage: what nothing refers to goes, and only that, and not while somebody has it in hand."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from rich.console import Console

from kinetok.infra import gc
from kinetok.infra.artifact import LEASE, RECORD, Lease, Store
from kinetok.infra.errors import StoreError
from kinetok.infra.gc import Rules, delete, find
from kinetok.infra.run import Selection, run
from kinetok.infra.storage import Folder

NOW = Rules(age=0.0)


@pytest.fixture
def store(toys: ModuleType, tmp_path: Path) -> Store:
    """The toy job built twice, the second time with another number in `few`; `many` and `other` are of both runs."""
    for override in ("few.count=3", "few.count=4"):
        job, place = toys.job(tmp_path, override)
        assert run(job, place, console=Console(file=StringIO())).succeeded
    return place


def runs(store: Store) -> list[str]:
    return sorted(name for name in store.root.files("runs") if name.endswith(".json") and name.count("/") == 1)


def names(found: list[gc.Garbage]) -> list[tuple[str, str]]:
    return sorted((garbage.what, garbage.folder.url.rsplit("/", 1)[1].partition("-")[0]) for garbage in found)


def test_what_a_run_names_and_what_that_was_made_of_stays(store: Store) -> None:
    assert find(store, NOW) == []
    store.root.remove(runs(store)[0])
    found = find(store, NOW)
    assert names(found) == [("artifact", "few"), ("artifact", "last"), ("artifact", "total")]
    assert delete(store, found, NOW) == found
    assert sorted(artifact.name for artifact in store.all()) == ["few", "last", "many", "other", "total"]
    assert all(not list(artifact.problems()) and not artifact.folder.exists(LEASE) for artifact in store.all())
    assert find(store, NOW) == []


def test_inputs_stay_though_no_run_names_them(toys: ModuleType, store: Store) -> None:
    job, _ = toys.job(store.root, "few.count=4")
    run(job, store, Selection(only=("last",)), console=Console(file=StringIO()))
    for name in runs(store)[:-1]:
        store.root.remove(name)
    assert ("artifact", "many") not in names(find(store, NOW)), "`last` was made of `total`, and that of `many`"
    assert ("artifact", "other") in names(find(store, NOW))


def test_only_the_newest_runs_of_a_job_count_and_young_ones_and_those_that_never_ended(store: Store) -> None:
    assert names(find(store, Rules(age=0.0, keep_runs=1))) == [("artifact", "few"), ("artifact", "last"), ("artifact", "total")]
    assert find(store, Rules(age=3600.0, keep_runs=1)) == []
    first = runs(store)[0]
    state = json.loads(store.root.read_text(first)) | {"ended": None}
    store.root.write_text(first, json.dumps(state))
    assert find(store, Rules(age=0.0, keep_runs=1)) == []


def test_unfinished_scratch_and_stale_leases(store: Store) -> None:
    few = store.find("few").folder
    few.write_text("_work/scratch", "left by a late writer")
    many = store.find("many").folder
    many.write_text(LEASE, json.dumps({"holder": "elsewhere:1:a", "generation": 1, "expires": 1.0, "at": "2026-01-01"}))
    resumable = store.find("other").folder
    resumable.remove(RECORD)
    (store.root / "numbers" / f"gone-{'0' * 16}").write_text("parts/0.txt", "0")
    (store.root / "numbers" / "notes").write_text("mine.txt", "not kinetok's")
    found = find(store, NOW)
    assert names(found) == [("lease", "many"), ("scratch", "few"), ("unfinished", "gone")]
    delete(store, found, NOW)
    assert not few.exists("_work") and not many.exists(LEASE) and resumable.exists("sum.txt")
    assert store.root.folders() == ["numbers", "runs", "sum"] and (store.root / "numbers").exists("notes/mine.txt")
    assert not [artifact.name for artifact in store.all() for _ in artifact.problems()]


def test_what_somebody_holds_or_names_meanwhile_is_left_alone(store: Store) -> None:
    store.root.remove(runs(store)[0])
    found = {garbage.folder.url.rsplit("/", 1)[1].partition("-")[0]: garbage for garbage in find(store, NOW)}
    held = Lease(found["few"].folder)
    assert held.acquire()
    assert "few" not in dict(map(reversed, names(find(store, NOW))))
    state = json.loads(store.root.read_text(runs(store)[0]))
    key = found["total"].folder.url.rsplit("-", 1)[1]
    state["stages"]["total"]["key"] = key
    store.root.write_text("runs/29990101-000000-abcdef.json", json.dumps(state))
    assert delete(store, list(found.values()), NOW) == [found["last"]]
    held.release()


@pytest.mark.parametrize(
    "break_it", [lambda root: root.write_text("runs/20260101-000000-000000.json", "{"), lambda root: root.remove("runs")]
)
def test_doubts_delete_nothing(store: Store, break_it: Callable[[Folder], None]) -> None:
    break_it(store.root)
    with pytest.raises(StoreError, match=r"cannot be read|nothing is deleted"):
        find(store, NOW)


def test_the_command_only_lists_unless_told_to_delete(store: Store) -> None:
    from kinetok.pipelines.cli import main

    store.root.remove(runs(store)[0])
    arguments = ["gc", "--store", str(store.root), "--age-hours", "0"]
    listed = CliRunner().invoke(main, arguments)
    assert listed.exit_code == 0 and "few-" in listed.output and "--delete" in listed.output
    assert len(list(store.all())) == 8
    deleted = CliRunner().invoke(main, [*arguments, "--delete"])
    assert deleted.exit_code == 0 and len(list(store.all())) == 5
