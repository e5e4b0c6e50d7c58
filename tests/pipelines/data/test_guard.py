"""Calls that hang, crash or fail cost what they are about, here and in a process apart; a poisoned source does not take its shard along."""

import importlib
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.pipelines.data.videos import encode, moving
from tests.pipelines.stages.running import run_stage

from kinetok.infra.artifact import Counts, Store
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import read_parts
from kinetok.pipelines.data.guard import TRIES, guard
from kinetok.pipelines.data.quarantine import rows as quarantined
from kinetok.pipelines.data.reasons import BadVideo, Reason
from kinetok.pipelines.data.tars import TarWriter
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.ingest import Ingest


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """Neither a process apart nor a Ray worker can import this module, so its functions travel whole."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def process(notes: str) -> int:
    """The process it is called in, which it notes."""
    with open(notes, "a") as file:
        file.write(f"{os.getpid()}\n")
    return os.getpid()


def crash(notes: str) -> None:
    process(notes)
    os.kill(os.getpid(), signal.SIGSEGV)


def test_one_process_apart_serves_until_it_dies(tmp_path: Path) -> None:
    notes = str(tmp_path / "notes")
    with guard(30.0, apart=True) as guarded:
        first = guarded(process, notes)
        assert guarded(process, notes) == first != os.getpid()
        with pytest.raises(BadVideo, match=f"killed {TRIES} processes.*signal {signal.SIGSEGV}") as crashed:
            guarded(crash, notes)
        assert guarded(process, notes) not in (first, os.getpid())
    assert crashed.value.reason is Reason.CRASHED
    pids = [int(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert len(pids) == 3 + TRIES and len(set(pids)) == 1 + TRIES
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_takes_too_long_apart_is_ended() -> None:
    with guard(1.0, apart=True) as guarded, pytest.raises(BadVideo, match="longer than 1 s") as late:
        guarded(hang)
    assert late.value.reason is Reason.TIMED_OUT


def hang() -> None:
    threading.Event().wait()


def fail() -> None:
    raise BadVideo(Reason.CORRUPT, "frame 3", 0.5)


@pytest.mark.parametrize("apart", [False, True])
def test_errors_pass_as_they_are(apart: bool) -> None:
    with guard(30.0, apart=apart) as guarded:
        with pytest.raises(BadVideo, match="frame 3") as error:
            guarded(fail)
        assert (error.value.reason, error.value.position) == (Reason.CORRUPT, 0.5)
        assert guarded(sum, [1, 2]) == 3


def test_what_takes_too_long_here_ends_the_process() -> None:
    script = """
        import threading
        from kinetok.pipelines.data.guard import guard
        with guard(0.2, apart=False) as guarded:
            guarded(sum, [1])
            threading.Event().wait(0.5)
            print("a call in time leaves no watchdog", flush=True)
            guarded(threading.Event().wait)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "no watchdog" in ended.stdout and "Timeout" in ended.stderr


POISON = {"crash": b"it crashes its codec", "hang": b"its codec never returns"}


def poisoned(video: bytes, how: str) -> bytes:
    """A sound video in a box of which stands what `meeting_poison` does on decoding it."""
    return video + struct.pack(">I4s", 8 + len(POISON[how]), b"free") + POISON[how]


def meeting_poison(decode: Callable[..., object]) -> Callable[..., object]:
    """`decode`, as a codec with faults would do it."""

    def call(data: bytes, *arguments: object, **options: object) -> object:
        if data.endswith(POISON["crash"]):
            os.kill(os.getpid(), signal.SIGSEGV)
        if data.endswith(POISON["hang"]):
            threading.Event().wait()
        return decode(data, *arguments, **options)

    return call


def with_faulty_codec(task: Callable[..., object], module: str, decode: str) -> Callable[..., object]:
    """`task` in a worker whose codec has faults; the worker keeps none of it."""

    def run(*arguments: object, **options: object) -> object:
        home = importlib.import_module(module)
        sound = getattr(home, decode)
        setattr(home, decode, meeting_poison(sound))
        try:
            return task(*arguments, **options)
        finally:
            setattr(home, decode, sound)

    return run


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("how", "reason"), [("crash", "crashed"), pytest.param("hang", "timed_out", marks=pytest.mark.long)])
def test_a_poisoned_video_does_not_take_its_shard_along(how: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kinetok.pipelines.data import clip_parts

    videos = {f"{name}.mp4": encode(moving(12, seed=seed), rate=8) for seed, name in enumerate("abcd")}
    whole = clips_of(tmp_path / "sound", videos)
    videos |= {name: poisoned(videos[name], how) for name in ("b.mp4", "c.mp4")}
    monkeypatch.setattr(clip_parts, "cut_shard", with_faulty_codec(clip_parts.cut_shard, "kinetok.pipelines.data.clip_parts", "cut_video"))
    found = clips_of(tmp_path / "poisoned", videos)
    reasons = {row["id"]: row["reason"] for row in found if row["decision"] == "quarantined"}
    assert reasons == {"s/b": reason, "s/c": reason}
    sound = [{**row, "url": None, "offset": None} for row in whole if row["video"] in ("s/a", "s/d")]
    assert [{**row, "url": None, "offset": None} for row in found if row["decision"] != "quarantined"] == sound != []


def clips_of(folder: Path, videos: dict[str, bytes]) -> list[dict[str, Any]]:
    """The index that `clips` makes of one tar of `videos`; counts balance, or it is not published."""
    folder.mkdir()
    with (folder / "s.tar").open("wb") as file:
        writer = TarWriter(file)
        for name, data in videos.items():
            writer.add(name, data)
        writer.close()
    store = Store(Folder(str(folder / "store")))
    ingest = run_stage(store, Ingest(source=str(folder / "s.tar")), "videos", {})
    stage = Clips.model_validate({"videos": "videos", "fps": 8, "frames": 5, "height": 16, "width": 16, "max_bad_fraction": 0.5})
    made = run_stage(store, stage, "clips", {"videos": ingest}, resources=Resources(decode_seconds=5.0))
    assert list(made.problems()) == []
    found: list[dict[str, Any]] = read_parts(made.folder).to_pylist()
    return found


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_clip_that_kills_its_decoder_is_left_out_of_its_token_shard(
    tiny: ModuleType, make_clips: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kinetok.pipelines.data import encoding

    resources = Resources(workers=1, cpus=1, batch_size=2, decode_seconds=5.0)
    clips = make_clips(4, windows=2, shard_clips=8, bad=(1, 2))
    assert tiny.run_encode(clips, tmp_path / "bad").counts.quarantined == 4
    clips = make_clips(4, windows=2, shard_clips=8, change={1: partial(poisoned, how="crash"), 2: partial(poisoned, how="hang")})
    faulty = with_faulty_codec(encoding.decode_unit, "kinetok.pipelines.data.decode_task", "decode_windows")
    monkeypatch.setattr(encoding, "decode_unit", faulty)
    result = tiny.run_encode(clips, tmp_path / "out", resources=resources)
    assert result.counts == Counts(input=8, written=4, quarantined=4)
    found = quarantined(Folder(str(tmp_path / "out")))
    assert [(row["id"], row["reason"]) for row in found] == [
        ("video-001/0", "crashed"),
        ("video-001/625", "crashed"),
        ("video-002/0", "timed_out"),
        ("video-002/625", "timed_out"),
    ]
    shard = "shards/000000.tar"
    assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "bad" / shard).read_bytes(), (
        "sound clips are stored as beside any bad one"
    )
