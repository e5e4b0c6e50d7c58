"""A small clip index over real mp4 bytes, without the stages that would make it."""

import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, ModuleType

import av
import numpy as np
import pytest

from kinetok.infra.artifact import Artifact, Counts, Record, publish
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import part_bytes, part_name
from kinetok.pipelines.data.tars import TarWriter

FPS, FRAMES, SIZE = 8, 5, 16

MakeClips = Callable[..., Artifact]


def finish(folder: Folder, kind: str, counts: Counts) -> Artifact:
    """Publish `folder` as an artifact named after its kind."""
    return publish(
        folder,
        Record(kind=kind, name=kind, key="0" * 16, version=1, config={}, digest="", counts=counts, started="2026-01-01", seconds=1.0),
    )


@pytest.fixture(name="finish")
def finish_fixture() -> Callable[[Folder, str, Counts], Artifact]:
    return finish


def video_bytes(seed: int, windows: int) -> bytes:
    """A noisy mp4 long enough for `windows` windows of FRAMES frames."""
    pixels = np.random.default_rng(seed).integers(0, 255, (windows * FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as box:
        stream = box.add_stream("libx264", rate=FPS, options={"crf": "10", "g": "8"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, FPS)
        for image in pixels:
            box.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        box.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(name="video_bytes")
def video_bytes_fixture() -> Callable[[int, int], bytes]:
    return video_bytes


@pytest.fixture
def make_clips(tmp_path: Path) -> MakeClips:
    """make_clips(videos, windows=2, shard_clips=4, bad=(), val=(), change={}, source_fps=...): a `clips` artifact; video numbers in
    `bad` no longer decode, those in `change` are stored as it makes them, their rates are what `source_fps` says."""

    def make(
        videos: int,
        windows: int = 2,
        shard_clips: int = 4,
        bad: tuple[int, ...] = (),
        val: tuple[int, ...] = (),
        change: Mapping[int, Callable[[bytes], bytes]] = MappingProxyType({}),
        source_fps: Callable[[int], float | None] = lambda number: FPS,
    ) -> Artifact:
        source, folder = tmp_path / "source.tar", Folder(str(tmp_path / "clips"))
        rows = []
        with source.open("wb") as file:
            tar = TarWriter(file)
            for number in range(videos):
                data = video_bytes(number, windows)
                data = data[:200] if number in bad else change.get(number, bytes)(data)
                offset = tar.add(f"video-{number:03d}.mp4", data)
                for window in range(windows):
                    start = window * FRAMES / FPS
                    rows.append(
                        {
                            "id": f"video-{number:03d}/{int(start * 1000)}",
                            "video": f"video-{number:03d}",
                            "shard": 0,
                            "url": str(source),
                            "member": f"video-{number:03d}.mp4",
                            "offset": offset,
                            "bytes": len(data),
                            "start": start,
                            "end": start + FRAMES / FPS,
                            "source_fps": source_fps(number),
                            "caption": f"caption {number}",
                            "split": "val" if number in val else "train",
                            "decision": "kept",
                        }
                    )
            tar.close()
        recipe = {"fps": float(FPS), "frames": FRAMES, "height": SIZE, "width": SIZE, "shard_clips": shard_clips}
        folder.write_text("clips.json", json.dumps(recipe))
        folder.write_bytes(part_name(0), part_bytes(rows))
        return finish(folder, "clips", Counts(input=len(rows), written=len(rows)))

    return make


@pytest.fixture(scope="module")
def tiny(ray_cluster: None) -> Iterator[ModuleType]:
    """The helper module `stages/tiny.py`, pickled by value to the workers."""
    from ray import cloudpickle

    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "stages" / "tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    yield module
    cloudpickle.unregister_pickle_by_value(module)
    del sys.modules["tiny"]
