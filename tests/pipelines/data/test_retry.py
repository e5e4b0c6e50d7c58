"""Retrying reads only what was quarantined, keeps the rest and the key, and publishes a new digest."""

import shutil
from pathlib import Path

import pytest
from tests.pipelines.data.videos import encode, moving
from tests.pipelines.stages.running import run_stage

from kinetok.infra.artifact import RECORD, Artifact, Lease, Store
from kinetok.infra.errors import DataError, StoreError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import read_parts
from kinetok.pipelines.data.retry import retry
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.ingest import Ingest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> Store:
    return Store(Folder(str(tmp_path / "store")))


@pytest.fixture(name="made")
def _made(tmp_path: Path, store: Store) -> Artifact:
    """Clips of a folder in which b.mp4 is cut short."""
    folder = tmp_path / "in"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        (folder / f"{name}.mp4").write_bytes(encode(moving(12, seed=seed), rate=8))
    shutil.copy(folder / "b.mp4", tmp_path / "b.mp4")
    (folder / "b.mp4").write_bytes((folder / "b.mp4").read_bytes()[:200])
    videos = run_stage(store, Ingest(source=str(folder)), "videos", {})
    stage = Clips.model_validate({"videos": "videos", "fps": 8, "frames": 5, "height": 16, "width": 16, "max_bad_fraction": 0.5})
    return run_stage(store, stage, "clips", {"videos": videos})


def test_repaired_samples_come_in(tmp_path: Path, store: Store, made: Artifact) -> None:
    assert read_parts(made.folder)["id"].to_pylist() == ["a/0", "a/625", "b", "c/0", "c/625"]
    shutil.copy(tmp_path / "b.mp4", tmp_path / "in" / "b.mp4")
    done = retry(store, made)
    assert (done.before, done.after) == (1, 0)
    assert read_parts(made.folder)["id"].to_pylist() == ["a/0", "a/625", "b/0", "b/625", "c/0", "c/625"]
    again = store.get("clips", "clips", made.key)
    assert again is not None and again.digest == done.artifact.digest != made.digest
    assert (again.record.counts.input, again.record.counts.written) == (6, 6)
    assert again.record.metrics["retries"] == 1 and again.record.metrics["clips"] == 6
    assert list(again.problems()) == []


def test_what_is_still_bad_stays(store: Store, made: Artifact) -> None:
    done = retry(store, made)
    assert (done.before, done.after) == (1, 1)
    assert done.artifact.digest == made.digest
    assert list(done.artifact.problems()) == []


def test_refused_while_in_use_and_for_other_kinds(store: Store, made: Artifact) -> None:
    lease = Lease(made.folder)
    assert lease.acquire()
    with pytest.raises(StoreError, match="is being built by"):
        retry(store, made)
    lease.release()
    ingest = next(artifact for artifact in store.all() if artifact.kind == "ingest")
    with pytest.raises(DataError, match="cannot be tried again in part"):
        retry(store, ingest)
    assert made.folder.exists(RECORD)


def test_refused_without_the_listing(store: Store, made: Artifact) -> None:
    store.root.remove("ingest")
    with pytest.raises(StoreError, match="the listing videos-"):
        retry(store, made)
    assert made.folder.exists(RECORD)
