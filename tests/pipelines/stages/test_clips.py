"""The clip index of real shards: counts balance, bad samples become rows, killed and cancelled runs end in the same bytes."""

import io
import os
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from tests.pipelines.data.videos import encode, moving
from tests.pipelines.stages.running import run_stage

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.errors import Cancelled, DataError, QuarantineLimit
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import ClipIndex, read_parts
from kinetok.pipelines.data.quarantine import report
from kinetok.pipelines.data.tars import TarWriter
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.ingest import Ingest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
FIELDS: dict[str, Any] = {"videos": "videos", "fps": 8, "frames": 5, "height": 16, "width": 16, "max_bad_fraction": 0.5}


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> Store:
    return Store(Folder(str(tmp_path / "store")))


def _tar(path: Path, members: dict[str, bytes], keep: int | None = None) -> None:
    file = io.BytesIO()
    writer = TarWriter(file)
    for name, data in members.items():
        writer.add(name, data)
    writer.close()
    path.write_bytes(file.getvalue()[:keep])


def _video(seed: int, frames: int = 12) -> bytes:
    return encode(moving(frames, seed=seed), rate=8)


def _shards(folder: Path, count: int = 4, frames: int = 12) -> str:
    folder.mkdir()
    for shard in range(count):
        members = {}
        for i in range(3):
            members[f"{shard}-{i}.mp4"] = _video(10 * shard + i, frames)
            members[f"{shard}-{i}.txt"] = f"video {i} of {shard}".encode()
        _tar(folder / f"s{shard}.tar", members)
    return f"{folder}/s{{0..{count - 1}}}.tar"


def _clips(store: Store, source: str, on_progress: Any = lambda told: None, **fields: object) -> Artifact:
    videos = run_stage(store, Ingest(source=source), "videos", {})
    return run_stage(store, Clips.model_validate(FIELDS | fields), "clips", {"videos": videos}, on_progress)


def _table(artifact: Artifact) -> pa.Table:
    return read_parts(artifact.folder)


def test_index_of_sound_tars(tmp_path: Path, store: Store) -> None:
    told: list[dict[str, Any]] = []
    made = _clips(store, _shards(tmp_path / "in"), told.append, stride=7)
    rows = _table(made).to_pylist()
    assert [row["id"] for row in rows[:4]] == ["s0/0-0/0", "s0/0-0/875", "s0/0-1/0", "s0/0-1/875"]
    assert len({row["id"] for row in rows}) == len(rows) == 24
    assert (rows[0]["caption"], rows[0]["group"], rows[0]["member"]) == ("video 0 of 0", "0-0", "0-0.mp4")
    assert (made.record.counts.input, made.record.counts.written) == (24, 24)
    assert list(made.problems()) == [] and len(made.manifest()) == 4
    assert told[-1] == {"done": 4, "total": 4, "unit": "shards", "quarantined": 0, "note": "24 clips"}
    index = ClipIndex.open(made)
    assert index.read_clip(23).shape == (5, 16, 16, 3)


def test_no_group_is_in_both_splits(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    data = _video(0)
    members = {}
    for i in range(40):
        members |= {f"{i:02d}.mp4": data, f"{i:02d}.json": b'{"group": "room %d"}' % (i % 20), f"{i:02d}.txt": b"caption"}
    members["40.mp4"], members["40.json"] = data, b'{"group": "room 0", "split": "val", "caption": "given"}'
    _tar(folder / "a.tar", members)
    rows = _table(_clips(store, f"{folder}/a.tar", val_fraction=0.3)).to_pylist()
    of_group: dict[str, set[str]] = {}
    for row in rows:
        of_group.setdefault(row["group"], set()).add(row["split"])
    assert len(of_group) == 20 and all(len(splits) == 1 for splits in of_group.values())
    assert 2 <= sum(splits == {"val"} for splits in of_group.values()) <= 10 and of_group["room 0"] == {"val"}
    assert [(row["split"], row["caption"]) for row in rows if row["video"] == "a/40"] == [("val", "given")] * 2


def _hostile(folder: Path) -> str:
    """One tar with every kind of trouble that is not the end of it, one cut in half, one that is no tar at all."""
    folder.mkdir()
    good = _video(1)
    members = {
        "good.mp4": good,
        "empty.mp4": b"",
        "html.mp4": b"<html>not found</html>",
        "half.mp4": encode(moving(96), rate=24)[:-9000],
        "short.mp4": _video(2, frames=3),
        "alone.txt": b"a caption without a video",
        "../../x.mp4": good,
        "nest.mp4": good,
        "nest.json": b"[" * 100_000,
        "twice.mp4": good,
        "other.txt": b"",
        "twice.gif": good,
    }
    _tar(folder / "s0.tar", members)
    with tarfile.open(folder / "s0.tar", "a") as tar:
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    _tar(folder / "s1.tar", {f"{i}.mp4": good for i in range(4)}, keep=2 * (512 + -(-len(good) // 512) * 512) + 700)
    (folder / "s2.tar").write_bytes(b"this is not a tar" * 100)
    return f"{folder}/*.tar"


def test_bad_samples_become_rows(tmp_path: Path, store: Store) -> None:
    made = _clips(store, _hostile(tmp_path / "in"), max_bad_fraction=0.9)
    rows = _table(made).to_pylist()
    outcome = {row["id"]: (row["decision"], row["reason"]) for row in rows if row["start"] is None}
    end = next(name for name in outcome if name.startswith("s1@"))
    double = next(name for name in outcome if name.startswith("s0/twice@"))
    assert outcome == {
        "s0/empty": ("quarantined", "unreadable"),
        "s0/html": ("quarantined", "unreadable"),
        "s0/half": ("quarantined", "unreadable"),
        "s0/short": ("filtered", "too_short"),
        "s0/alone": ("filtered", "no_video"),
        "s0/other": ("filtered", "no_video"),
        "s0/../../x": ("quarantined", "unsafe_member"),
        "s0/link": ("quarantined", "unsafe_member"),
        double: ("quarantined", "duplicate"),
        end: ("quarantined", "damaged_shard"),
        "s2@0": ("quarantined", "damaged_shard"),
    }
    kept = [row["id"] for row in rows if row["decision"] == "kept"]
    assert kept == [f"{video}/{start}" for video in ("s0/good", "s0/nest", "s0/twice", "s1/0", "s1/1") for start in (0, 625)]
    counts = made.record.counts
    assert counts.balanced and (counts.input, counts.written, counts.filtered) == (len(rows), len(kept), 3)
    assert {entry.reason: entry.count for entry in report(made.folder)}["damaged_shard"] == 2
    assert next(row for row in rows if row["id"] == end)["position"] > 1000
    assert list(made.problems()) == []
    assert not (tmp_path / "x.mp4").exists()


def test_too_much_bad_fails_with_a_summary(tmp_path: Path, store: Store) -> None:
    with pytest.raises(QuarantineLimit, match=r"(?s)more than max_bad_fraction 0\.1 allows.*3 unreadable: no container") as caught:
        _clips(store, _hostile(tmp_path / "in"), max_bad_fraction=0.1)
    assert "first s0/empty" in str(caught.value)
    assert list(store.all()) and all(artifact.kind != "clips" for artifact in store.all())


def test_an_index_without_clips_fails_with_its_reasons(tmp_path: Path, store: Store) -> None:
    source = _shards(tmp_path / "in", frames=3)
    for _ in range(2):  # the second time of the parts that the first has left
        with pytest.raises(
            DataError, match=r"none of 12 samples gives a clip\n +12 too_short: .*first s0/0-0: 3 frames at 8 fps.*\nWhat would"
        ):
            _clips(store, source)
    assert all(artifact.kind != "clips" for artifact in store.all())


def test_folder_with_csv(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("7", "8"):
        (folder / f"{name}.mp4").write_bytes(_video(int(name)))
    (tmp_path / "m.csv").write_text("videoid,name,split\n8,a dog,val\n7,a cat,train\n9,gone,\n")
    videos = run_stage(store, Ingest(source=str(folder), csv=str(tmp_path / "m.csv")), "videos", {})
    made = run_stage(store, Clips.model_validate(FIELDS), "clips", {"videos": videos})
    rows = _table(made).to_pylist()
    assert [(row["id"], row["caption"], row["split"], row["reason"]) for row in rows] == [
        ("8/0", "a dog", "val", None),
        ("8/625", "a dog", "val", None),
        ("7/0", "a cat", "train", None),
        ("7/625", "a cat", "train", None),
        ("9", "gone", "train", "missing_file"),
    ]
    assert ClipIndex.open(made).read_clip(2).shape == (5, 16, 16, 3)


def test_a_source_that_changed_meanwhile_is_an_error(tmp_path: Path, store: Store) -> None:
    videos = run_stage(store, Ingest(source=_shards(tmp_path / "in", 2)), "videos", {})
    os.utime(tmp_path / "in" / "s1.tar", (1, 1))
    with pytest.raises(DataError, match=r"s1\.tar changed since it was listed"):
        run_stage(store, Clips.model_validate(FIELDS), "clips", {"videos": videos})


def test_a_cancelled_run_is_continued(tmp_path: Path, store: Store) -> None:
    source = _shards(tmp_path / "in")
    whole = _clips(Store(Folder(str(tmp_path / "other"))), source)

    def stop(told: dict[str, Any]) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        _clips(store, source, stop)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "clips").rglob("*.parquet")}
    assert finished
    again = _clips(store, source)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert again.digest == whole.digest and again.manifest() == whole.manifest()
    assert again.record.counts == whole.record.counts


def _killed_tasks(stop: threading.Event) -> Iterator[int]:
    """Kill -9 the first process seen at work on a shard."""
    while not stop.wait(0.002):
        for process in psutil.Process().children(recursive=True):
            try:
                if "ray::Map" in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    yield process.pid
                    return
            except psutil.NoSuchProcess:
                continue


def test_a_killed_task_is_run_again(tmp_path: Path, store: Store) -> None:
    source = _shards(tmp_path / "in", frames=1500)
    whole = _clips(Store(Folder(str(tmp_path / "other"))), source)
    stop, killed = threading.Event(), list[int]()
    killer = threading.Thread(target=lambda: killed.extend(_killed_tasks(stop)))
    killer.start()
    made = _clips(store, source)
    stop.set()
    killer.join()
    assert len(killed) == 1
    assert made.manifest() == whole.manifest() and made.digest == whole.digest
    assert list(made.problems()) == []


def test_every_odd_file_becomes_rows(shared_data: Path, store: Store) -> None:
    made = _clips(store, str(shared_data / "odd"), max_bad_fraction=0.6)
    rows = _table(made).to_pylist()
    decided = Counter(row["decision"] for row in rows)
    videos = {row["video"] for row in rows}
    assert decided["quarantined"] == 33 and len(videos) == 103
    assert all(row["reason"] and row["message"] for row in rows if row["decision"] != "kept")
    assert made.record.counts.balanced
