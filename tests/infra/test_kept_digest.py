"""Digests of large files: found once, right after whatever happens to the file, the clock or the folder they are kept in."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest

from kinetok.infra import kept_digest as module
from kinetok.infra.kept_digest import SETTLED_SECONDS, kept_digest

ONE, TWO = b"one" * 100, b"two" * 100


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests are kept; every file is worth it, and has settled by the clock."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "WORTH_BYTES", 1)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() + 2 * SETTLED_SECONDS))
    return tmp_path / "cache" / "kinetok" / "digests"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The name of each file that is read."""
    found: list[str] = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda stream: found.append(Path(stream.name).name) or read(stream))
    yield found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(ONE)
    return path


def rewritten(file: Path) -> None:
    file.write_bytes(TWO)


def rewritten_under_the_old_time(file: Path) -> None:
    before = file.stat()
    file.write_bytes(TWO)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_under_the_old_time(file: Path) -> None:
    before, other = file.stat(), file.with_suffix(".new")
    other.write_bytes(TWO)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def test_a_file_is_read_once_by_whatever_name(cache: Path, reads: list[str], file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.bin"
    link.symlink_to(file)
    assert [kept_digest(path) for path in (file, file, link)] == 3 * [sha256(ONE).hexdigest()]
    assert reads == ["weights.bin"] and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("change", [rewritten, rewritten_under_the_old_time, replaced_under_the_old_time])
def test_a_change_is_seen(change: Callable[[Path], None], cache: Path, reads: list[str], file: Path) -> None:
    kept_digest(file)
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock has gone on, as it has for a file that settled
        change(file)
    assert file.stat().st_size == before.st_size
    assert kept_digest(file) == kept_digest(file) == sha256(TWO).hexdigest()
    assert len(reads) == 2 and len(list(cache.iterdir())) == 1, "the old entry is gone"


def test_of_a_file_that_has_just_changed_nothing_is_kept(
    cache: Path, reads: list[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change once more without a change of its times."""
    monkeypatch.setattr(module, "time", time)
    assert kept_digest(file) == kept_digest(file) == sha256(ONE).hexdigest()
    assert len(reads) == 2 and not cache.exists()


def test_of_a_file_that_changes_while_it_is_read_nothing_is_kept(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = module._read

    def meanwhile(stream: module.BufferedReader) -> str:
        digest = read(stream)
        with file.open("ab") as end:
            end.write(b"more")
        return digest

    monkeypatch.setattr(module, "_read", meanwhile)
    kept_digest(file)
    monkeypatch.setattr(module, "_read", read)
    assert not cache.exists()
    assert kept_digest(file) == sha256(ONE + b"more").hexdigest()


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"0 0 0 0 " + 64 * b"0" + b"\n", None])
def test_an_entry_that_is_damaged_counts_for_nothing(damage: bytes | None, cache: Path, reads: list[str], file: Path) -> None:
    kept_digest(file)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-9] if damage is None else damage)
    assert kept_digest(file) == kept_digest(file) == sha256(ONE).hexdigest()
    assert len(reads) == 2, "and is written anew"


def test_a_folder_that_cannot_be_written_costs_time_alone(cache: Path, file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert kept_digest(file) == kept_digest(file) == sha256(ONE).hexdigest()


def test_many_at_once_leave_one_whole_entry(cache: Path, reads: list[str], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Barrier(8)
    with monkeypatch.context() as patch, ThreadPoolExecutor(8) as threads:
        patch.setattr(module, "_known", lambda *asked: together.wait() and None)  # all look before any has written
        assert set(threads.map(lambda _: kept_digest(file), range(8))) == {sha256(ONE).hexdigest()}
    assert len(reads) == 8 and kept_digest(file) == sha256(ONE).hexdigest() and len(reads) == 8
    assert len(list(cache.iterdir())) == 1


def test_a_small_file_is_not_worth_an_entry(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORTH_BYTES", len(ONE) + 1)
    assert kept_digest(file) == sha256(ONE).hexdigest() and not cache.exists()


def test_a_relative_cache_home_does_not_count(cache: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kept_digest(file)
    assert not (tmp_path / "cache").exists() and len(list((tmp_path / "home" / ".cache" / "kinetok" / "digests").iterdir())) == 1
