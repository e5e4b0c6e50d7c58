"""`Folder`: one door to files on a local disk or an object store, through fsspec.

A `Folder` is a URL and nothing else: it pickles, compares by value, and opens its filesystem in the process that uses it
(s3fs is not fork-safe). Writes are whole or absent: locally a temporary file and one `os.replace`, on an object store one put.
Listings are never cached, because s3fs shows stale ones in both directions. Configuration of S3 is by AWS_* environment only.
Not covered: appending (object stores cannot) and renaming between folders.
"""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from kinetok.infra.errors import StoreError

_TEMPORARY = ".tmp-"
_LOCK = ".flock"
_REFUSALS = ("pre-condition", "PreconditionFailed", "ConditionalRequestConflict", "conditional request")
READ_BUFFER_BYTES = 8 << 20
"""Read-ahead of streamed reads: unbuffered S3 reads cost one request per tar record."""


@dataclass(frozen=True)
class Folder:
    """A folder at `url` (a local path or `s3://bucket/prefix`); need not exist yet."""

    url: str

    def __post_init__(self) -> None:
        text = os.fspath(self.url)
        if "://" not in text:
            text = os.path.abspath(os.path.expanduser(text))
        elif text.startswith("file://"):
            text = os.path.abspath(text.removeprefix("file://"))
        object.__setattr__(self, "url", text.rstrip("/") or "/")

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}")

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

    @property
    def fs(self) -> Any:
        """The fsspec filesystem, made for this process."""
        return _filesystem(self.url)

    def path(self, name: str) -> str:
        """URL of `name` inside this folder; names may contain `/` but never step outside."""
        if name.startswith("/") or ".." in name.split("/"):
            raise StoreError(f"{name!r} would leave the folder {self.url}")
        return f"{self.url}/{name}"

    def exists(self, name: str) -> bool:
        with _clear_errors(self.url):
            return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        return int(self.fs.size(self.path(name)))

    def read_bytes(self, name: str) -> bytes:
        """The whole file; raises FileNotFoundError where it is absent."""
        target = self.path(name)
        with _clear_errors(self.url):
            data = _content(target) if self.is_local else cast(bytes, self.fs.cat_file(target))
        if data is None:
            raise FileNotFoundError(f"{target} is not there")
        return data

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from byte `start` on."""
        if self.is_local:
            with open(self.path(name), "rb") as file:
                # Not pread, which gives at most 2 GiB.
                file.seek(start)
                return file.read(length)
        return cast(bytes, self.fs.cat_file(self.path(name), start=start, end=start + length))

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Streamed reading with a large buffer."""
        if self.is_local:
            with open(self.path(name), "rb", buffering=READ_BUFFER_BYTES) as file:
                yield file
        else:
            with self.fs.open(self.path(name), "rb", block_size=READ_BUFFER_BYTES) as file:
                yield file

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the file whole, replacing any old one in one step; raises StoreError where that fails, as all writes do."""
        target = self.path(name)
        with _clear_errors(self.url, writing=target):
            if not self.is_local:
                self.fs.pipe_file(target, data)
                return
            with _aside(target) as aside, open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def put_file(self, source: Path, name: str) -> None:
        """Move or upload a finished local file to `name` in one step; `source` is gone afterwards."""
        target = self.path(name)
        with _clear_errors(self.url, writing=target):
            if not self.is_local:
                self.fs.put_file(str(source), target)
                source.unlink()
                return
            with _aside(target) as aside:
                shutil.move(source, aside)

    def write_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Compare and swap: write only if the file still holds `expected` (None: does not exist). Says whether it wrote."""
        target = self.path(name)
        with _clear_errors(self.url, writing=target):
            if not self.is_local:
                return _conditional(self.fs, target, data, expected)
            with _locked(target):
                if _content(target) != expected:
                    return False
                self.write_bytes(name, data)
                return True

    def remove_if(self, name: str, expected: bytes) -> bool:
        """Compare and delete: remove the file only if it still holds `expected`. Says whether it did."""
        target = self.path(name)
        with _clear_errors(self.url, writing=target):
            if not self.is_local:
                return _conditional(self.fs, target, None, expected)
            with _locked(target):
                if _content(target) != expected:
                    return False
                os.unlink(target)
                return True

    def clear(self, keep: str) -> None:
        """Delete everything inside but the file `keep`."""
        for name in [row["name"].rstrip("/").rsplit("/", 1)[-1] for row in self._entries()]:
            if name not in (keep, keep + _LOCK):
                self.remove(name)

    def remove(self, name: str) -> None:
        """Delete a file or a whole sub-folder; absent is fine."""
        target = self.path(name)
        with _clear_errors(self.url, writing=target), contextlib.suppress(FileNotFoundError):
            if not self.is_local:
                self.fs.rm(target, recursive=True)
            elif Path(target).is_dir():
                shutil.rmtree(target)
            else:
                os.unlink(target)

    def files(self, under: str = "") -> dict[str, int]:
        """Every file below `under` by relative name, with its size; temporary files of unfinished writes are left out."""
        root = self.path(under) if under else self.url
        with _clear_errors(self.url):
            found = self.fs.find(root, detail=True, withdirs=False)
        base = self.fs._strip_protocol(self.url).rstrip("/") + "/"
        sizes = {name.removeprefix(base): int(info["size"]) for name, info in sorted(found.items())}
        return {name: size for name, size in sizes.items() if _TEMPORARY not in name and not name.endswith(_LOCK)}

    def folders(self) -> list[str]:
        """Names of the folders directly inside this one."""
        return sorted(row["name"].rstrip("/").rsplit("/", 1)[-1] for row in self._entries() if row["type"] == "directory")

    def sweep(self) -> int:
        """Delete temporary files that a killed writer left behind; returns how many. Only the holder of the lease may call it."""
        if not self.is_local or not self.local.exists():
            return 0
        left = [path for path in self.local.rglob(f"*{_TEMPORARY}*") if path.is_file()]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def _entries(self) -> list[dict[str, str]]:
        with _clear_errors(self.url):
            try:
                return cast(list[dict[str, str]], self.fs.ls(self.url, detail=True))
            except (FileNotFoundError, NotADirectoryError):
                return []


@contextlib.contextmanager
def _aside(target: str) -> Iterator[str]:
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
def _clear_errors(url: str, writing: str | None = None) -> Iterator[None]:
    """What keeps a store from answering, and every failure of a write, as one StoreError; a failed read keeps its own error."""
    try:
        with _unreachable(url):
            yield
    except OSError as error:
        if writing is None:
            raise
        raise StoreError(
            f"cannot write {writing}: {error.strerror or error}; see to its space and permissions, or name another store"
        ) from error


@contextlib.contextmanager
def _unreachable(url: str) -> Iterator[None]:
    if "://" not in url:
        yield
        return
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except BotoCoreError as error:
        raise StoreError(f"{url} does not answer: {error}; check the AWS_* variables and the network") from error


def _filesystem(url: str) -> Any:
    protocol = url.split("://", 1)[0] if "://" in url else "file"
    options = {"use_listings_cache": False, "default_fill_cache": False} if protocol == "s3" else {}
    return fsspec.filesystem(protocol, **options)


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


def _conditional(fs: Any, target: str, data: bytes | None, expected: bytes | None) -> bool:
    """S3: put (or delete, where `data` is None) if the object is absent (`expected` None) or still holds `expected`."""
    bucket, key, _ = fs.split_path(target)
    condition = {"IfNoneMatch": "*"}
    try:
        if expected is not None:
            condition = {"IfMatch": fs.call_s3("head_object", Bucket=bucket, Key=key)["ETag"]}
            if fs.cat_file(target) != expected:
                return False
        if data is None:
            fs.call_s3("delete_object", Bucket=bucket, Key=key, **condition)
        else:
            fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        return True
    except OSError as error:
        # s3fs has no type of its own for 412, and 409 (two conditional puts at once) is as good a refusal.
        gone = expected is not None and isinstance(error, FileNotFoundError)
        if gone or isinstance(error, FileExistsError) or any(text in str(error) for text in _REFUSALS):
            return False
        raise
