"""Folders: whole writes, compare-and-swap under contention, clear errors; the same on a local disk and on S3."""

import os
import pickle
import threading
from pathlib import Path

import pytest

from kinetok.infra.errors import StoreError
from kinetok.infra.storage import Folder


def test_an_absent_folder_is_empty(folder: Folder) -> None:
    assert folder.files() == {}
    assert folder.folders() == []
    assert not folder.exists("a")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("a")
    folder.remove("a")
    folder.clear(keep="a")


def test_files_come_back_as_written(folder: Folder) -> None:
    folder.write_bytes("a", b"0123456789")
    folder.write_text("sub/deep/b", "ü")
    assert folder.read_bytes("a") == b"0123456789"
    assert folder.read_range("a", 3, 4) == b"3456"
    assert folder.read_text("sub/deep/b") == "ü"
    assert folder.files() == {"a": 10, "sub/deep/b": 2}
    assert folder.files("sub") == {"sub/deep/b": 2}
    assert folder.folders() == ["sub"]
    assert (folder.exists("a"), folder.size("a")) == (True, 10)
    with folder.open("a") as file:
        assert file.read() == b"0123456789"
    folder.write_bytes("a", b"new")
    assert folder.read_bytes("a") == b"new"


def test_fetch_copies_to_a_local_path(folder: Folder, tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("sub/full", b"0123456789")):
        folder.write_bytes(name, data)
        folder.fetch(name, tmp_path / "here" / name)
        assert (tmp_path / "here" / name).read_bytes() == data


def test_copy_writes_the_last_file_last(folder: Folder) -> None:
    for name in ("a", "sub/b", "state"):
        folder.write_text(name, name)
    (folder / "sub").copy(folder / "to", last="b")
    assert (folder / "to").files() == {"b": 5}
    with pytest.raises(FileNotFoundError):
        (folder / "sub").copy(folder / "again", last="gone")


def test_put_file_takes_the_file_away(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"data")
    folder.put_file(source, "deep/target")
    assert folder.read_bytes("deep/target") == b"data"
    assert not source.exists()


def test_clear_keeps_one_file(folder: Folder) -> None:
    for name in ("keep", "a", "sub/b"):
        folder.write_text(name, name)
    folder.clear(keep="keep")
    assert folder.files() == {"keep": 4}


def test_write_if_and_remove_if_compare_first(folder: Folder) -> None:
    assert folder.write_if("a", b"1", None)
    assert not folder.write_if("a", b"2", None)
    assert not folder.write_if("a", b"2", b"0")
    assert folder.read_bytes("a") == b"1"
    assert folder.write_if("a", b"2", b"1")
    assert not folder.remove_if("a", b"1")
    assert folder.remove_if("a", b"2")
    assert not folder.remove_if("a", b"2")
    assert not folder.write_if("a", b"3", b"2")
    assert folder.files() == {}


def test_of_many_writers_one_wins_each_round(folder: Folder) -> None:
    """Each thread counts up by compare-and-swap and now and then deletes: no step is lost, whatever the order."""
    threads, steps = 3, 5
    wins = [0] * threads
    folder.write_bytes("n", b"0")

    def count(thread: int) -> None:
        while wins[thread] < steps:
            current = folder.read_bytes("n")
            wins[thread] += folder.write_if("n", str(int(current) + 1).encode(), current)

    workers = [threading.Thread(target=count, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert folder.read_bytes("n") == str(threads * steps).encode()


def test_a_lock_that_was_deleted_meanwhile_does_not_count(tmp_path: Path) -> None:
    """Creating and deleting the same file from many threads: exactly one at a time holds it."""
    folder, holding, most = Folder(str(tmp_path)), [], []

    def take(name: bytes) -> None:
        taken = 0
        while taken < 30:
            if folder.write_if("held", name, None):
                holding.append(name)
                most.append(len(holding))
                holding.remove(name)
                assert folder.remove_if("held", name)
                taken += 1

    workers = [threading.Thread(target=take, args=(name,)) for name in (b"a", b"b", b"c")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(most) == 90 and set(most) == {1}
    assert list(tmp_path.iterdir()) == []


def test_names_never_leave_the_folder(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(StoreError, match="would leave"):
            folder.write_bytes(name, b"")


def test_a_failed_write_leaves_nothing_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    folder.write_bytes("a", b"old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*/a: No space left on device"):
        folder.write_bytes("a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert folder.read_bytes("a") == b"old"


def test_a_store_below_a_folder_that_looks_temporary_is_not_empty(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / ".tmp-1" / "store"))
    folder.write_text("a/b", "x")
    assert folder.files() == {"a/b": 1}


def test_sweep_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write_bytes("sub/a", b"whole")
    (tmp_path / "sub" / "b.tmp-12345678").write_bytes(b"half")
    assert folder.files() == {"sub/a": 5}
    assert folder.sweep() == 1
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a"]


def test_a_store_that_does_not_answer_is_named(object_store: str) -> None:
    with pytest.raises(StoreError, match=r"cannot write s3://no-such-bucket/a: The specified bucket does not exist"):
        Folder("s3://no-such-bucket").write_bytes("a", b"")
    with pytest.raises(StoreError, match="no-such-bucket"):
        Folder("s3://no-such-bucket").write_if("a", b"", None)


def test_a_folder_is_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="no place that kinetok can use"):
        Folder("gs://bucket")
    assert Folder("work") == Folder(str(tmp_path / "work")) == Folder(f"file://{tmp_path}/work/")
    assert pickle.loads(pickle.dumps(Folder("s3://b/c/"))) == Folder("s3://b/c")
    with pytest.raises(StoreError, match="not a local folder"):
        _ = Folder("s3://b").local
