"""Commit and versions: those of this very code, and none where there is no checkout."""

import subprocess
from pathlib import Path

import pytest

import kinetok
from kinetok.infra.provenance import commit, environment


def git(folder: Path, *arguments: str) -> str:
    words = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_checkout_with_and_without_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "kinetok"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(kinetok, "__path__", [str(package)])
    assert commit() is None, "no repository"
    git(tmp_path, "init", "-q")
    assert commit() is None, "a repository that happens to lie around the package"
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit() == head
    (package / "__init__.py").write_text("x = 1\n")
    assert commit() == f"{head}+dirty"


def test_versions_that_can_change_a_result_are_told() -> None:
    found = environment()
    assert {"python", "platform", "torch", "ray", "kinetok"} <= found.keys()
