"""The wheel that clusters are sent."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kinetok
from kinetok.infra import wheel


def test_holds_the_package_and_a_valid_record(tmp_path: Path) -> None:
    path = wheel.build_wheel(tmp_path)
    assert path.name.startswith(f"kinetok-{kinetok.__version__}+d")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        record = next(name for name in names if name.endswith("RECORD"))
        recorded = {line.split(",")[0] for line in archive.read(record).decode().splitlines()}
    assert {"kinetok/__init__.py", "kinetok/infra/wheel.py", "kinetok/tokenizers/base.py", "kinetok/py.typed"} <= names
    assert recorded == names
    assert not any(name.endswith(".pyc") or name == "kinetok/tokenizers/__init__.py" for name in names)


def test_the_name_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = wheel.build_wheel(tmp_path)
    assert wheel.build_wheel(tmp_path) == first
    files = dict(wheel.package_files()) | {"kinetok/infra/wheel.py": b"changed"}
    monkeypatch.setattr(wheel, "package_files", lambda: iter(files.items()))
    assert wheel.build_wheel(tmp_path) != first


def test_unpacks_to_what_it_was_made_of(tmp_path: Path) -> None:
    path = wheel.build_wheel(tmp_path)
    folder = wheel.unpacked(path)
    assert wheel.unpacked(path) == folder and {path, folder.parent} == set(tmp_path.iterdir())
    found = {f"kinetok/{file.relative_to(folder)}": file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert found == dict(wheel.package_files())


def test_two_that_unpack_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wheel.build_wheel(tmp_path)
    extract = zipfile.ZipFile.extractall

    def slowly(archive: zipfile.ZipFile, folder: str, names: list[str]) -> None:
        extract(archive, folder, names)
        monkeypatch.undo()
        wheel.unpacked(path)

    monkeypatch.setattr(zipfile.ZipFile, "extractall", slowly)
    folder = wheel.unpacked(path)
    assert (folder / "infra" / "wheel.py").is_file() and {path, folder.parent} == set(tmp_path.iterdir())


def test_pip_installs_it(tmp_path: Path) -> None:
    path = wheel.build_wheel(tmp_path)
    command = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(path)]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    assert (tmp_path / "site" / "kinetok" / "infra" / "wheel.py").is_file()
