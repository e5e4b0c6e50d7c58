"""`kept_digest`: sha256 of a local file; a large one is read once, not at every plan of a job that names it.

What was found is kept in the user's cache folder, a file for each path, with the state that the file was in: inode, size and times. It
counts while that state is the same. An entry is written whole, so that processes need no lock, and one that cannot be read, or not be
written, costs nothing but time. Not covered: files of a store (`artifact.py`), and a disk that changes files without a change of times.
"""

import hashlib
import os
import re
import time
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from kinetok.infra.errors import StoreError
from kinetok.infra.storage import Folder

WORTH_BYTES = 16 << 20
"""A smaller file is read in hundredths of a second."""
SETTLED_SECONDS = 10.0
"""A younger file may change once more and keep its times: some file systems count them in steps of two seconds, and servers have clocks of
their own."""


def kept_digest(file: Path) -> str:
    """sha256 of a file's content, in hex digits; OSError where it cannot be read."""
    with file.open("rb") as stream:
        found = os.fstat(stream.fileno())
        if found.st_size < WORTH_BYTES:
            return _read(stream)
        cache, name, state = _cache(), hashlib.sha256(os.fsencode(file.resolve())).hexdigest(), _state(found)
        if known := _known(cache, name, state):
            return known
        settled = time.time() - max(found.st_mtime, found.st_ctime) > SETTLED_SECONDS
        digest = _read(stream)
        unchanged = _state(os.fstat(stream.fileno())) == state
    if settled and unchanged:
        # Where the folder is full, or not ours to write, the next plan reads the file again.
        with suppress(StoreError):
            cache.write_text(name, f"{state} {digest}\n")
    return digest


def _read(stream: BufferedReader) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _state(found: os.stat_result) -> str:
    """A copy may bring the time of its content (mtime) along; that of the file itself (ctime) is the kernel's."""
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _cache() -> Folder:
    """By the XDG base directory specification, under which a relative path does not count."""
    told = os.environ.get("XDG_CACHE_HOME", "")
    return Folder(told if Path(told).is_absolute() else "~/.cache") / "kinetok" / "digests"


def _known(cache: Folder, name: str, state: str) -> str | None:
    """What was found of the file in this state."""
    try:
        text = cache.read_text(name)
    except (OSError, UnicodeDecodeError):
        return None
    entry = re.fullmatch(f"{state} ([0-9a-f]{{64}})\n", text)
    return entry[1] if entry else None
