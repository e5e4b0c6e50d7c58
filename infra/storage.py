"""`Folder`: one door to files on a local disk or an object store.

A `Folder` is a URL and nothing else: it pickles, compares by value, and may be used by any process and thread. Writes are whole or absent:
locally a temporary file and one `os.replace`, on an object store one put (`s3.py`, where its requests are repeated while that helps).
Nothing is cached. Errors of a store that cannot be used, and of every write, are StoreErrors that say what, where and the remedy.
Not covered: appending (object stores cannot) and renaming between folders.
"""

import contextlib
import fcntl
import io
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from kinetok.infra import s3
from kinetok.infra.errors import ConfigError, StoreError
from kinetok.infra.read_ahead import ReadAhead
from kinetok.infra.s3 import Found
from kinetok.infra.secrets import in_address, redact

_TEMPORARY = ".tmp-"
_LOCK = ".flock"
READ_BUFFER_BYTES = 8 << 20
"""Read-ahead of streamed reads from a disk."""
BUFFER_BYTES = 1 << 20
"""Taken at a time from the blocks of a stream from an object store."""
COPIES = 8
"""Files copied inside a store at a time."""


@dataclass(frozen=True)
class Folder:
    """A folder at `url` (a local path or `s3://bucket/prefix`); need not exist yet."""

    url: str
    patience: float | None = field(default=None, compare=False, repr=False)
    """Seconds after which a request to an object store is not repeated; None leaves it to `s3.ATTEMPTS`."""

    def __post_init__(self) -> None:
        text = os.fspath(self.url)
        if in_address(text):
            raise ConfigError(f"{redact(text)} holds a login or a signature, which records would show: give it in the environment (AWS_*)")
        if "://" not in text:
            text = os.path.abspath(os.path.expanduser(text))
        elif text.startswith("file://"):
            text = os.path.abspath(text.removeprefix("file://"))
        elif not text.startswith("s3://"):
            raise StoreError(f"{text} is no place that kinetok can use: give a local path or s3://bucket/prefix")
        object.__setattr__(self, "url", text.rstrip("/") or "/")

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}", self.patience)

    def hurried(self, seconds: float) -> "Folder":
        """The same folder, with `patience`."""
        return replace(self, patience=seconds)

    def __str__(self) -> str:
        return self.url

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def local(self) -> Path:
        """This folder as a local path; raises StoreError on an object store."""
        if not self.is_local:
            raise StoreError(f"{self.url} is not a local folder")
        return Path(self.url)

    def path(self, name: str) -> str:
        """URL of `name` inside this folder; names may contain `/` but never step outside."""
        if name.startswith("/") or ".." in name.split("/"):
            raise StoreError(f"{name!r} would leave the folder {self.url}")
        return f"{self.url}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        if self.is_local:
            return os.path.exists(self.path(name))
        return s3.find(self._at(name)) is not None or s3.has_below(self._at(name))

    def stat(self, name: str) -> Found:
        """Size and version of a file; raises FileNotFoundError."""
        if self.is_local:
            return _found(self.path(name), name)
        found = s3.find(self._at(name))
        if found is None:
            raise FileNotFoundError(f"{self.path(name)} is not there")
        return found._replace(name=name)

    def size(self, name: str) -> int:
        return self.stat(name).bytes

    def read_bytes(self, name: str) -> bytes:
        """The whole file; raises FileNotFoundError where it is absent."""
        if not self.is_local:
            return s3.read(self._at(name))
        data = _content(self.path(name))
        if data is None:
            raise FileNotFoundError(f"{self.path(name)} is not there")
        return data

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from byte `start` on, fewer where the file ends before."""
        if not self.is_local:
            return s3.read_range(self._at(name), start, length)
        with open(self.path(name), "rb") as file:
            # Not pread, which gives at most 2 GiB.
            file.seek(start)
            return file.read(length)

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Streamed reading of the file as it is now; of one on an object store a few blocks are in memory, whatever its size."""
        if self.is_local:
            with open(self.path(name), "rb", buffering=READ_BUFFER_BYTES) as file:
                yield file
            return
        at, now = self._at(name), self.stat(name)
        raw = ReadAhead(
            lambda start, length: s3.block(at, start, length, now.version), now.bytes, block=s3.BLOCK_BYTES, ahead=s3.AT_ONCE - 1
        )
        with io.BufferedReader(raw, BUFFER_BYTES) as stream:
            yield stream

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to a local path, a few blocks in memory at a time; folders on the way are made."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.open(name) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, READ_BUFFER_BYTES)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the file whole, replacing any old one in one step; raises StoreError where that fails, as all writes do."""
        target = self.path(name)
        if not self.is_local:
            s3.write(self._at(name), len(data), lambda start, length: data[start : start + length])
            return
        with _clear_errors(target), written_aside(target) as aside, open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def put_file(self, source: Path, name: str) -> None:
        """Move or upload a finished local file to `name` in one step; `source` is gone afterwards."""
        target = self.path(name)
        if not self.is_local:
            disk = Folder(str(source.parent))
            s3.write(self._at(name), source.stat().st_size, lambda start, length: disk.read_range(source.name, start, length))
            source.unlink()
            return
        with _clear_errors(target), written_aside(target) as aside:
            shutil.move(source, aside)

    def write_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Compare and swap: write only if the file still holds `expected` (None: does not exist). Says whether it wrote."""
        target = self.path(name)
        if not self.is_local:
            return s3.write_if(self._at(name), data, expected)
        with _clear_errors(target), _locked(target):
            if _content(target) != expected:
                return False
            self.write_bytes(name, data)
            return True

    def remove_if(self, name: str, expected: bytes) -> bool:
        """Compare and delete: remove the file only if it still holds `expected`. Says whether it did."""
        target = self.path(name)
        if not self.is_local:
            return s3.remove_if(self._at(name), expected)
        with _clear_errors(target), _locked(target):
            if _content(target) != expected:
                return False
            os.unlink(target)
            return True

    def clear(self, keep: str) -> None:
        """Delete everything inside but the file `keep`."""
        files, folders = self.entries()
        for name in [*(file.name for file in files), *folders]:
            if name not in (keep, keep + _LOCK):
                self.remove(name)

    def remove(self, name: str) -> None:
        """Delete a file or a whole sub-folder; absent is fine."""
        target = self.path(name)
        if not self.is_local:
            s3.remove(self._at(name))
            return
        with _clear_errors(target), contextlib.suppress(FileNotFoundError):
            if Path(target).is_dir() and not Path(target).is_symlink():
                shutil.rmtree(target)
            else:
                os.unlink(target)

    def copy(self, target: "Folder", last: str) -> None:
        """Copy every file to another folder of the same store, `last` after all others. Raises FileNotFoundError where one vanishes."""
        names = self.files().keys()
        with ThreadPoolExecutor(COPIES) as threads:
            list(threads.map(lambda name: self._copy_file(name, target), names - {last}))
        self._copy_file(last, target)

    def _copy_file(self, name: str, target: "Folder") -> None:
        if not self.is_local:
            s3.copy(self._at(name), target._at(name))
            return
        with open(self.path(name), "rb") as source, _clear_errors(target.path(name)), written_aside(target.path(name)) as aside:
            shutil.copyfile(source.name, aside)

    def found(self, under: str = "") -> list[Found]:
        """Every file below `under` by its name from here, with size and version; what unfinished writes left aside is no file."""
        if self.is_local:
            found = _walk(self.path(under) if under else self.url, under)
        else:
            base = s3.place(self.url).prefix
            found = (file._replace(name=file.name.removeprefix(base)) for file in s3.listing(self._at(under)))
        return sorted(file for file in found if _TEMPORARY not in file.name and not file.name.endswith(_LOCK))

    def files(self, under: str = "") -> dict[str, int]:
        """Every file below `under` by its name from here, with its size."""
        return {file.name: file.bytes for file in self.found(under)}

    def entries(self) -> tuple[list[Found], list[str]]:
        """Files directly inside this folder, and names of the folders there; nothing where it does not exist."""
        if not self.is_local:
            files, folders = s3.entries(self._at(""))
            base = s3.place(self.url).prefix
            return sorted(file._replace(name=file.name.removeprefix(base)) for file in files), sorted(folders)
        try:
            rows = sorted(os.scandir(self.url), key=lambda row: row.name)
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        files = [file for row in rows if row.is_file() for file in _walk_one(row.path, row.name)]
        return files, [row.name for row in rows if row.is_dir()]

    def folders(self) -> list[str]:
        """Names of the folders directly inside this one."""
        return self.entries()[1]

    def sweep(self) -> int:
        """Delete temporary files that a killed writer left behind; returns how many. Only the holder of the lease may call it."""
        if not self.is_local or not self.local.exists():
            return 0
        left = [path for path in self.local.rglob(f"*{_TEMPORARY}*") if path.is_file()]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def _at(self, name: str) -> s3.Place:
        return s3.place(self.path(name) if name else self.url, self.patience)


def _found(path: str, name: str) -> Found:
    state = Path(path).stat()
    return Found(name, state.st_size, str(state.st_mtime))


def _walk(folder: str, name: str) -> Iterator[Found]:
    """Files below a local folder; links to folders are not followed, and what is deleted meanwhile is passed over."""
    try:
        rows = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for row in rows:
        inner = f"{name}/{row.name}" if name else row.name
        if row.is_dir(follow_symlinks=False):
            yield from _walk(row.path, inner)
            continue
        yield from _walk_one(row.path, inner)


def _walk_one(path: str, name: str) -> Iterator[Found]:
    with contextlib.suppress(FileNotFoundError):
        yield _found(path, name)


@contextlib.contextmanager
def written_aside(target: str) -> Iterator[str]:
    """A temporary sibling of `target`, moved over it when the block succeeds and deleted when it does not."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    aside = f"{target}{_TEMPORARY}{uuid.uuid4().hex[:8]}"
    try:
        yield aside
        os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


@contextlib.contextmanager
def _clear_errors(target: str) -> Iterator[None]:
    """Every failure of a local write as a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {target}: {error.strerror or error}; see to its space and permissions, or name another store"
        ) from error


@contextlib.contextmanager
def _locked(target: str) -> Iterator[None]:
    """An exclusive lock on a local file for the block, held through a sibling that is deleted again.

    Whoever opened the sibling before it was deleted would lock a file that nobody else sees, and so looks again.
    """
    os.makedirs(os.path.dirname(target), exist_ok=True)
    path = target + _LOCK
    while True:
        with open(path, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(lock.fileno()), Path(path).stat())
            except FileNotFoundError:
                continue
            if current:
                try:
                    yield
                finally:
                    os.unlink(path)
                return


def _content(target: str) -> bytes | None:
    """A local file, or None where there is none, or only a file where its folder should be."""
    try:
        return Path(target).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
