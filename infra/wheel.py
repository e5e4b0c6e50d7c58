"""This package as a wheel, made from its own files, and unpacked: what a Ray cluster elsewhere is sent.

Written directly (a wheel is a zip), so that it works from a checkout and from an installed package without any build tool. The
version ends in a digest of the content, which names the code that a run ran. Not covered: dependencies, which the cluster's image holds.
"""

import base64
import errno
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import kinetok
from kinetok.infra.errors import ConfigError

_EPOCH = (1980, 1, 1, 0, 0, 0)
_WHEEL = "Wheel-Version: 1.0\nGenerator: kinetok\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def build_wheel(folder: Path) -> Path:
    """Write `kinetok-{version}+d{digest}-py3-none-any.whl` into `folder`, unless it is there already, and return its path."""
    files = dict(package_files())
    state = hashlib.sha256()
    for name, data in files.items():
        state.update(f"{name} {len(data)}\n".encode() + data)
    version = f"{kinetok.__version__}+d{state.hexdigest()[:12]}"
    target = folder / f"kinetok-{version}-py3-none-any.whl"
    if target.exists():
        return target
    info = f"kinetok-{version}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: kinetok\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = _WHEEL.encode()
    files[f"{info}/RECORD"] = "".join([*(_record_line(name, data) for name, data in files.items()), f"{info}/RECORD,,\n"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".tmp")
    with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    aside.replace(target)
    return target


def cached_wheel() -> Path:
    """The wheel in a folder of this user's that lasts; raises ConfigError where the folder is somebody else's."""
    folder = Path(tempfile.gettempdir()) / f"kinetok-wheels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to another user, who could put code of theirs into the wheel: delete it, or set TMPDIR")
    return build_wheel(folder)


def unpacked(wheel: Path) -> Path:
    """The folder `kinetok` out of a wheel, unpacked once in a folder beside it.

    The wheel itself must not be sent: Ray lets pip install it and holds no lock meanwhile, so that two runtime environments of one node
    that name it (a job's, and the one of its training workers) delete its modules below each other's feet.
    """
    target = wheel.with_suffix("")
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=wheel.parent) as aside, zipfile.ZipFile(wheel) as archive:
            archive.extractall(f"{aside}/whole", [name for name in archive.namelist() if name.startswith("kinetok/")])
            try:
                Path(aside, "whole").rename(target)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # which says that another process was first
                    raise
    return target / "kinetok"


def package_files() -> Iterator[tuple[str, bytes]]:
    """(name inside the wheel, content) of every file of the installed or checked-out package, in order."""
    root = Path(kinetok.__path__[0])
    for path in sorted(_walk(root)):
        yield f"kinetok/{path.relative_to(root)}", path.read_bytes()


def _walk(folder: Path) -> Iterator[Path]:
    """Files below `folder`, through the links that join a checkout's folders into one package."""
    for path in folder.iterdir():
        if path.is_dir():
            if path.name != "__pycache__":
                yield from _walk(path)
        elif path.suffix != ".pyc":
            yield path


def _record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"
