"""A stage that is stopped in the middle of its work: no actor, task or placement group of it lives on, and nothing is half written."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.pipelines.data.videos import encode, moving
from tests.pipelines.stages.running import run_stage

from kinetok.infra.artifact import RECORD, Store
from kinetok.infra.errors import Cancelled
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.tars import TarWriter
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.ingest import Ingest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def once_done(told: dict[str, Any]) -> None:
    """Progress that stops its stage at the first finished piece."""
    if told.get("done"):
        raise Cancelled("enough")


@pytest.mark.usefixtures("nothing_left")
def test_encode(tiny: ModuleType, make_clips: Any, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        tiny.run_encode(make_clips(12, windows=2, shard_clips=2), tmp_path / "out", progress=lambda **told: once_done(told))
    indices, shards = ({path.stem for path in (tmp_path / "out" / sub).iterdir()} for sub in ("index", "shards"))
    assert indices and len(indices) < 12 and indices <= shards


@pytest.mark.usefixtures("nothing_left")
def test_clips(tmp_path: Path) -> None:
    for number in range(6):
        with (tmp_path / f"s{number}.tar").open("wb") as file:
            writer = TarWriter(file)
            writer.add("a.mp4", encode(moving(12, seed=number), rate=8))
            writer.close()
    store = Store(Folder(str(tmp_path / "store")))
    videos = run_stage(store, Ingest(source=f"{tmp_path}/*.tar"), "videos", {})
    stage = Clips.model_validate({"videos": "videos", "fps": 8, "frames": 5, "height": 16, "width": 16})
    with pytest.raises(Cancelled):
        run_stage(store, stage, "clips", {"videos": videos}, once_done)
    assert not list((tmp_path / "store" / "clips").rglob(RECORD))
