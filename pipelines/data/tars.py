"""WebDataset tars as streams: a strict reader that never loses a member in silence, and a writer with reproducible bytes.

Python's tarfile takes any unreadable header for the end of the archive and stops without a word (cpython issue 120740), so this
reader walks the blocks itself: damage raises `DamagedShard` with the shard and byte offset, after everything before it was yielded.
Nothing is extracted; a member's name is only a label, and links, devices and names that point outside are yielded as problems.
Each member carries the offset of its data, so that later stages read single videos by range. Not covered: compressed tars
(no range reads), sparse members.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import IO

from kinetok.infra.errors import DataError
from kinetok.pipelines.data.reasons import Reason
from kinetok.pipelines.data.strangers import label

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENSION_BYTES = 1 << 20
"""Of a long name or a pax header."""
MAX_PADDING_BYTES = 64 << 10
"""Zeros that may follow the last member; more of them mean that members were overwritten."""
_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class TarLimits:
    """Larger members are skipped with a problem, and so is what a sample holds beyond its own limits; more members than `members` end the
    shard as damaged."""

    member_bytes: int = 1 << 30
    members: int = 200_000
    sample_bytes: int = 2 << 30
    sample_members: int = 1000


LIMITS = TarLimits()


class DamagedShard(DataError):
    """The tar is broken from byte `offset` on; what came before it was yielded."""

    def __init__(self, shard: str, offset: int, what: str) -> None:
        super().__init__(f"{shard}, byte {offset}: {what}; everything before it was read. Copy or pack the shard again")
        self.shard = shard
        self.offset = offset
        self.what = what

    def __reduce__(self) -> tuple[type["DamagedShard"], tuple[str, int, str]]:
        return type(self), (self.shard, self.offset, self.what)


@dataclass(frozen=True)
class Member:
    """One file of a tar. `offset` is where its data begins; with a `problem` (reason, message) the data is empty."""

    name: str
    offset: int
    size: int
    data: bytes
    problem: tuple[Reason, str] | None = None

    @property
    def key(self) -> str:
        """Name without `./` and without everything from the first dot of the last component: what WebDataset calls the key."""
        folder, slash, base = self.name.removeprefix("./").rpartition("/")
        return folder + slash + base.split(".", 1)[0]

    @property
    def extension(self) -> str:
        """Everything after the first dot of the last component, lower case."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


@dataclass
class Sample:
    """Consecutive members of one key."""

    key: str
    members: list[Member] = field(default_factory=list)
    size: int = 0
    """Bytes that the members hold."""

    def add(self, member: Member, limits: TarLimits) -> None:
        """Append a member; without its data where the sample is full, and not at all where it has far too many."""
        if self.size + len(member.data) > limits.sample_bytes:
            member = replace(member, data=b"", problem=(Reason.TOO_LARGE, f"its sample holds more than {limits.sample_bytes} bytes"))
        if len(self.members) == limits.sample_members:
            member = replace(member, data=b"", problem=(Reason.TOO_LARGE, f"its sample has more than {limits.sample_members} members"))
        if len(self.members) <= limits.sample_members:
            self.members.append(member)
            self.size += len(member.data)


def read_members(file: IO[bytes], shard: str, limits: TarLimits = LIMITS) -> Iterator[Member]:
    """Every file of the tar in `file` (read forwards only); directories are passed over.

    Raises DamagedShard, naming `shard`, on a bad header, a cut member, a missing end of archive, or data behind the end.
    """
    tape = _Tape(file, shard)
    overrides: dict[str, str] = {}
    count = 0
    while (header := _next_header(tape)) is not None:
        if header.type in _EXTENSIONS:
            overrides |= _read_extension(tape, header)
            continue
        if header.type == tarfile.XGLTYPE:
            tape.skip(header.size)
            continue
        name = overrides.pop("path", header.name)
        size = _size(tape, overrides.pop("size", None), header)
        overrides.clear()
        count += 1
        if count > limits.members:
            raise DamagedShard(shard, tape.offset, f"more than {limits.members} members")
        if header.type != tarfile.DIRTYPE:
            yield _read_member(tape, header, name, size, limits)


def read_samples(file: IO[bytes], shard: str, limits: TarLimits = LIMITS) -> Iterator[Sample]:
    """Consecutive members of the same key, together; what was complete before damage is yielded before DamagedShard is raised."""
    sample: Sample | None = None
    try:
        for member in read_members(file, shard, limits):
            if sample is None or member.key != sample.key:
                if sample is not None:
                    yield sample
                sample = Sample(member.key)
            sample.add(member, limits)
    except DamagedShard:
        if sample is not None:
            yield sample
        raise
    if sample is not None:
        yield sample


class TarWriter:
    """Writes a tar whose bytes depend on names and contents alone (no times, owners or modes). Close it, or the end is missing."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        header = info.tobuf(tarfile.GNU_FORMAT)
        offset = self.size + len(header)
        self._write(header)
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return offset

    def close(self) -> None:
        """Write the end of the archive, padded to tar's record size; the file stays open."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.size += len(data)


_EXTENSIONS = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class _Tape:
    """A forward-only file that knows its offset and refuses short reads."""

    def __init__(self, file: IO[bytes], shard: str) -> None:
        self._file = file
        self.shard = shard
        self.offset = 0

    def some(self, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file."""
        parts = []
        while length and (part := self._file.read(length)):
            parts.append(part)
            length -= len(part)
            self.offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def padded(self, length: int) -> bytes:
        """`length` bytes of a member, leaving the tape at the next block."""
        start = self.offset
        data = self.some(length)
        if len(data) < length or len(self.some(-length % BLOCK)) < -length % BLOCK:
            raise DamagedShard(self.shard, self.offset, f"the file ends inside a member of {length} bytes that begins at byte {start}")
        return data

    def skip(self, length: int) -> None:
        """Pass over a member without keeping it."""
        start, left = self.offset, length + -length % BLOCK
        while left:
            part = self.some(min(left, _COPY_BYTES))
            if not part:
                raise DamagedShard(self.shard, self.offset, f"the file ends inside a member of {length} bytes that begins at byte {start}")
            left -= len(part)


def _next_header(tape: _Tape) -> tarfile.TarInfo | None:
    """The next header, None at a sound end of the archive."""
    at = tape.offset
    block = tape.some(BLOCK)
    if len(block) < BLOCK:
        raise DamagedShard(tape.shard, at, "the end of the archive is missing: the file is cut short")
    if not any(block):
        _check_end(tape, at)
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DamagedShard(tape.shard, at, f"no tar header ({error})") from error
    if header.size < 0:
        raise DamagedShard(tape.shard, at, f"a member of {header.size} bytes")
    return header


def _check_end(tape: _Tape, at: int) -> None:
    """After one zero block only a limited number of zeros may follow."""
    rest = tape.some(MAX_PADDING_BYTES + 1)
    if len(rest) < BLOCK:
        raise DamagedShard(tape.shard, at, "the second block of the end of the archive is missing")
    if any(rest) or len(rest) > MAX_PADDING_BYTES:
        raise DamagedShard(tape.shard, at, "zeros where a header should be, and more data behind them")


def _read_extension(tape: _Tape, header: tarfile.TarInfo) -> dict[str, str]:
    """`path` and `size` that a long-name or pax header sets for the next member."""
    at = tape.offset
    if header.size > MAX_EXTENSION_BYTES:
        raise DamagedShard(tape.shard, at, f"an extended header of {header.size} bytes")
    body = tape.padded(header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": body.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    return _pax(body, tape, at) if header.type == tarfile.XHDTYPE else {}


def _pax(body: bytes, tape: _Tape, at: int) -> dict[str, str]:
    """Records `length key=value newline`, where length counts the whole record."""
    found: dict[str, str] = {}
    while body.rstrip(b"\0"):
        digits, _, _ = body.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = body[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if not equals or not len(digits) < length <= len(body):
            raise DamagedShard(tape.shard, at, "an unreadable pax header")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        body = body[length:]
    return found


def _size(tape: _Tape, pax: str | None, header: tarfile.TarInfo) -> int:
    if header.type not in _FILES:
        return header.size if header.type == tarfile.GNUTYPE_SPARSE else 0
    if pax is None:
        return header.size
    if not (pax.isascii() and pax.isdigit() and len(pax) < 16):
        raise DamagedShard(tape.shard, tape.offset, f"a pax header with the size {pax[:20]!r}")
    return int(pax)


def _read_member(tape: _Tape, header: tarfile.TarInfo, name: str, size: int, limits: TarLimits) -> Member:
    problem = _problem(header, name)
    if problem is None and size > limits.member_bytes:
        problem = (Reason.TOO_LARGE, f"a member of {size} bytes; the limit is {limits.member_bytes}")
    offset = tape.offset
    if problem is not None:
        tape.skip(size)
        return Member(label(name), offset, size, b"", problem)
    return Member(label(name), offset, size, tape.padded(size))


def _problem(header: tarfile.TarInfo, name: str) -> tuple[Reason, str] | None:
    if header.type not in _FILES:
        return Reason.UNSAFE_MEMBER, f"not a plain file (tar type {header.type!r})"
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        return Reason.UNSAFE_MEMBER, "its name points outside the archive"
    return None
