"""`Artifact`, `Record`, `Store`: finished outputs of stages, and the one way to publish them.

An artifact is a folder `{root}/{kind}/{name}-{key}`. It is whole if and only if `record.json` is there, and that is written last.
Files that a stage writes in many pieces (token shards) are listed in its `manifest.jsonl`, one line per committed piece, so that
`publish` never reads them again; every other file is hashed here. `_work/` is scratch space and is deleted on publishing.
Leases keep two runs from building the same artifact: see `Lease`. Not covered: what the files mean (pipelines).
"""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from kinetok.infra.config import Config
from kinetok.infra.errors import LeaseLost, StoreError
from kinetok.infra.fingerprint import Plain, canonical
from kinetok.infra.storage import Folder

RECORD = "record.json"
MANIFEST = "manifest.jsonl"
WORK = "_work"
LEASE = "lease.json"


class Counts(Config):
    """Samples in and out of a stage; `input = written + filtered + quarantined` (contract 1). All zero where a stage has no samples."""

    input: int = 0
    written: int = 0
    filtered: int = 0
    quarantined: int = 0

    @property
    def balanced(self) -> bool:
        return self.input == self.written + self.filtered + self.quarantined


class FileInfo(Config):
    """Size and digest of one file."""

    bytes: int
    sha256: str


class InputInfo(Config):
    """Which artifact stood behind a Ref field."""

    kind: str
    name: str
    key: str
    digest: str


class Record(Config):
    """`record.json`: what an artifact is, what made it and out of what."""

    kind: str
    name: str
    key: str
    version: int
    config: dict[str, object]
    facts: dict[str, object] = Field(default_factory=dict)
    inputs: dict[str, tuple[InputInfo, ...]] = Field(default_factory=dict)
    files: dict[str, FileInfo] = Field(default_factory=dict)
    digest: str
    """sha256 over the canonical listing of `files`; the manifest stands in for the pieces it lists."""
    bytes: int = 0
    """Size of all files, the pieces in the manifest included."""
    counts: Counts = Counts()
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Non-finite figures are stored as null."""
    started: str
    seconds: float
    resources: dict[str, object] = Field(default_factory=dict)
    commit: str | None = None
    """Git commit of the code, `+dirty` appended where the tree had changes."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Versions of Python and the packages that matter."""
    run_id: str | None = None
    """The job run that made it."""


@dataclass(frozen=True)
class Artifact:
    """A finished output: its folder and its record."""

    folder: Folder
    record: Record

    @property
    def key(self) -> str:
        return self.record.key

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def kind(self) -> str:
        return self.record.kind

    @property
    def digest(self) -> str:
        return self.record.digest

    def manifest(self) -> list[dict[str, Plain]]:
        """Lines of `manifest.jsonl`, empty where the artifact has none."""
        if MANIFEST not in self.record.files:
            return []
        return [json.loads(line) for line in self.folder.read_text(MANIFEST).splitlines()]

    def problems(self) -> Iterator[str]:
        """Re-reads every file: yields one sentence per missing, torn, changed or unlisted file, and per unbalanced count."""
        listed = dict(self.record.files)
        present = self.folder.files()
        if MANIFEST in listed and MANIFEST in present:
            listed |= _pieces(self.folder)
        for path, info in listed.items():
            if path not in present:
                yield f"{path}: missing"
            elif present[path] != info.bytes:
                yield f"{path}: {present[path]} bytes, the record says {info.bytes}"
            elif digest_of_file(self.folder, path) != info.sha256:
                yield f"{path}: content changed since it was recorded"
        for path in present.keys() - listed.keys() - {RECORD, LEASE}:
            yield f"{path}: not in the record"
        if _digest(self.record.files) != self.record.digest:
            yield f"{RECORD}: its digest is not that of the files it lists"
        if not self.record.counts.balanced:
            yield f"counts do not balance: {self.record.counts}"


@dataclass(frozen=True)
class Store:
    """All artifacts below one root."""

    root: Folder

    def folder(self, kind: str, name: str, key: str) -> Folder:
        return self.root / kind / f"{name}-{key}"

    def get(self, kind: str, name: str, key: str) -> Artifact | None:
        """The finished artifact, or None. An artifact of the same kind and key under another name will do: names are labels."""
        for folder in (self.folder(kind, name, key), *self._same_key(kind, key)):
            found = self.read(folder)
            if found is not None:
                return found
        return None

    def read(self, folder: Folder) -> Artifact | None:
        """The artifact in `folder`, or None where it has no record; raises StoreError on an unreadable record."""
        try:
            data = folder.read_bytes(RECORD)
        except FileNotFoundError:
            return None
        try:
            return Artifact(folder, Record.model_validate_json(data))
        except ValueError as error:
            raise StoreError(f"{folder.path(RECORD)} cannot be read ({error}); delete the folder to build it again") from error

    def all(self) -> Iterator[Artifact]:
        """Every finished artifact."""
        for kind in self.root.folders():
            yield from self.of_kind(kind)

    def of_kind(self, kind: str) -> Iterator[Artifact]:
        """Every finished artifact of one kind."""
        for name in (self.root / kind).folders():
            found = self.read(self.root / kind / name)
            if found is not None:
                yield found

    def find(self, text: str) -> Artifact:
        """The artifact that `text` names: a folder path, `name-key`, a stage name (the newest of that name), or the start of a key."""
        if os.sep in text:
            found = self.read(Folder(text))
            if found is None:
                raise StoreError(f"{text} holds no finished artifact (no {RECORD})")
            return found
        everything = list(self.all())
        matches = [a for a in everything if text in (a.name, f"{a.name}-{a.key}") or (len(text) >= 4 and a.key.startswith(text))]
        if not matches:
            known = ", ".join(sorted({a.name for a in everything})) or "nothing yet"
            raise StoreError(f"no artifact {text!r} in {self.root}; it holds {known}")
        return max(matches, key=lambda a: a.record.started)

    def _same_key(self, kind: str, key: str) -> Iterator[Folder]:
        for name in (self.root / kind).folders():
            if name.endswith(f"-{key}"):
                yield self.root / kind / name


def publish(folder: Folder, record: Record) -> Artifact:
    """Hash what is in `folder`, fill `files`, `bytes` and `digest`, and write the record last; the folder is an artifact afterwards.

    Raises StoreError where the counts do not balance, or a piece that the manifest lists is missing or of another size.
    """
    if not record.counts.balanced:
        raise StoreError(
            f"the {record.kind} stage {record.name} lost or doubled samples: {record.counts}; input must equal the other three together"
        )
    folder.remove(WORK)
    folder.sweep()
    present = {path: size for path, size in folder.files().items() if not path.startswith(f"{WORK}/")}
    pieces = _pieces(folder) if folder.exists(MANIFEST) else {}
    for path, info in pieces.items():
        # A listing may be older than what it lists; the file itself is not.
        size = present.get(path) if present.get(path) == info.bytes else _size(folder, path)
        if size != info.bytes:
            raise StoreError(f"{folder.path(path)}: the manifest says {info.bytes} bytes, there are {size or 'none'}; run the job again")
    files = {
        path: FileInfo(bytes=size, sha256=digest_of_file(folder, path))
        for path, size in present.items()
        if path not in pieces and path not in (RECORD, LEASE)
    }
    total = sum(info.bytes for info in (*files.values(), *pieces.values()))
    finished = record.model_copy(update={"files": files, "bytes": total, "digest": _digest(files)})
    folder.write_text(RECORD, finished.model_dump_json(indent=1))
    return Artifact(folder, finished)


def _size(folder: Folder, path: str) -> int | None:
    try:
        return folder.size(path)
    except FileNotFoundError:
        return None


def _pieces(folder: Folder) -> dict[str, FileInfo]:
    lines = [json.loads(line) for line in folder.read_text(MANIFEST).splitlines()]
    return {str(line["path"]): FileInfo(bytes=line["bytes"], sha256=line["sha256"]) for line in lines}


def _digest(files: Mapping[str, FileInfo]) -> str:
    return hashlib.sha256(canonical({path: info.sha256 for path, info in files.items()})).hexdigest()


def digest_of_file(folder: Folder, name: str) -> str:
    """sha256 of a file, read as a stream."""
    state = hashlib.sha256()
    with folder.open(name) as file:
        while block := file.read(4 << 20):
            state.update(block)
    return state.hexdigest()


class Lease:
    """The right to build one artifact: `lease.json` beside its files, renewed by a heartbeat thread.

    Held as long as the process lives; another run waits, or takes over once `expires` has passed (a generation higher). Clocks of the
    machines must agree to a few seconds. A store that does not answer is asked again until the term has passed, by each renewal for a
    third of it, so that a loss is noticed in time. When the lease is lost, `on_lost` is called once, and `release` leaves the new holder's
    file alone.
    """

    def __init__(self, folder: Folder, *, seconds: float = 30.0, on_lost: Callable[[], None] | None = None) -> None:
        self.folder = folder.hurried(seconds / 3)
        self.seconds = seconds
        self.on_lost = on_lost
        self.lost = False
        self.holder = f"{_place()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._generation = 0
        self._expires = 0.0
        self._written: bytes | None = None
        self._guard = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {folder}", daemon=True)

    def acquire(self) -> bool:
        """Take the lease if it is free, expired, or its holder is a dead process of this machine. Says whether it was taken."""
        current = self._current()
        if current is not None:
            state = _State.model_validate_json(current)
            if state.holds:
                return False
            self._generation = state.generation
        self._generation += 1
        if not self._write(expected=current):
            return False
        self._thread.start()
        return True

    def renew(self) -> bool:
        """Extend the term; False where the lease is lost. Raises OSError or StoreError while the store does not answer."""
        with self._guard:
            if not self.lost and not self._write(expected=self._written):
                self._lose()
            return not self.lost

    @property
    def held(self) -> bool:
        """Whether anybody has it now."""
        current = self._current()
        return current is not None and _State.model_validate_json(current).holds

    def who(self) -> str:
        """The present holder, for messages."""
        current = self._current()
        return _State.model_validate_json(current).holder if current else "nobody"

    def release(self) -> None:
        """Stop the heartbeat, then give the lease back if it is still ours. A store that fails now only makes the next run wait."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._written is not None and not self.lost:
            with contextlib.suppress(OSError, StoreError):
                self.folder.remove_if(LEASE, self._written)

    def _current(self) -> bytes | None:
        try:
            return self.folder.read_bytes(LEASE)
        except FileNotFoundError:
            return None

    def _write(self, expected: bytes | None) -> bool:
        """Write a new term over `expected`; an earlier write of ours whose answer was lost on the way counts as ours."""
        expires = time.time() + self.seconds
        state = _State(holder=self.holder, generation=self._generation, expires=expires, at=datetime.now(UTC).isoformat())
        data = canonical(state)
        if not self.folder.write_if(LEASE, data, expected):
            found = self._current()
            if found is None or _State.model_validate_json(found).holder != self.holder:
                return False
            if found != data and not self.folder.write_if(LEASE, data, found):
                return False
        self._written, self._expires = data, expires
        return True

    def _beat(self) -> None:
        """Renew at a third of the term, until released or lost."""
        while not self._closed.wait(self.seconds / 3):
            try:
                if not self.renew():
                    return
            except (OSError, StoreError):
                # A hiccup of the store is no loss while the term lasts; after it, another run may have begun.
                if time.time() > self._expires:
                    self._lose()
                    return

    def _lose(self) -> None:
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


class _State(Config):
    """`lease.json`."""

    holder: str
    generation: int
    expires: float
    """Seconds since 1970."""
    at: str

    @property
    def holds(self) -> bool:
        """Within its term, and its holder no dead process of this machine."""
        return self.expires > time.time() and not _is_dead(self.holder)


def _place() -> str:
    """This machine and its space of process ids: two containers may share a host name, or a host."""
    try:
        return f"{socket.gethostname()}/{Path('/proc/self/ns/pid').readlink().name[5:-1]}"
    except OSError:
        return socket.gethostname()


def _is_dead(holder: str) -> bool:
    """True when the holder was a process of this machine that no longer exists."""
    place, pid, _ = holder.rsplit(":", 2)
    if place != _place():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def lost(folder: Folder) -> LeaseLost:
    """The error a stage ends with when its lease was taken over."""
    return LeaseLost(f"another run took over {folder}: this one stops; nothing is lost, run the job again to see the other's result")
