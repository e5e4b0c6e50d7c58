"""The key sees changed sources; tars, folders, CSVs and made tars become shards."""

import threading
from pathlib import Path

import pytest
from tests.pipelines.stages.running import run_stage

from kinetok.infra.artifact import Store
from kinetok.infra.errors import DataError
from kinetok.infra.job import parse_job
from kinetok.infra.plan import plan
from kinetok.infra.stage import Ref, Resources, StageContext
from kinetok.infra.storage import Folder
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.data.pack import pack
from kinetok.pipelines.data.sources import SourcePlan
from kinetok.pipelines.stages.ingest import Ingest
from kinetok.pipelines.stages.scenes import Scenes


def _folder(path: Path, *names: str) -> str:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_bytes(name.encode())
    return str(path)


def test_the_key_follows_the_source(tmp_path: Path) -> None:
    source = _folder(tmp_path / "in", "a.mp4")
    before = Ingest(source=source).key({})
    assert Ingest(source=source).key({}) == before
    _folder(tmp_path / "in", "b.mp4")
    assert Ingest(source=source).key({}) != before


def test_the_key_follows_the_csv(tmp_path: Path) -> None:
    source, csv = _folder(tmp_path / "in", "a.mp4"), tmp_path / "m.csv"
    csv.write_text("videoid,name\na,x\n")
    before = Ingest(source=source, csv=str(csv)).key({})
    csv.write_text("videoid,name\na,longer\n")
    assert Ingest(source=source, csv=str(csv)).key({}) != before


def test_folder_with_csv(tmp_path: Path) -> None:
    source = _folder(tmp_path / "in", "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "m.csv").write_text("videoid,name\nb,two\nzz,none\n")
    made = run_stage(Store(Folder(str(tmp_path / "store"))), Ingest(source=source, csv=str(tmp_path / "m.csv")), "videos", {})
    videos = SourcePlan(made.folder).videos(0)
    assert [(video.video, video.bytes, video.caption) for video in videos] == [("b", 5, "two"), ("zz", None, "none")]
    assert made.record.metrics == {"shards": 1.0, "files": 3.0, "bytes": 15.0}
    assert "listing" in made.record.facts


def test_a_source_that_changes_after_the_plan_is_refused(tmp_path: Path) -> None:
    stage = Ingest(source=_folder(tmp_path / "in", "a.mp4"))
    planned = stage.key({})
    _folder(tmp_path / "in", "b.mp4")
    out = Folder(str(tmp_path / "out"))
    with pytest.raises(DataError, match="changed while this run was under way"):
        stage.run(StageContext("videos", planned, {}, out, Resources(), lambda **told: None, threading.Event()))


def test_tars_refuse_a_csv(tmp_path: Path) -> None:
    pack(_folder(tmp_path / "in", "a.mp4"), str(tmp_path / "tars"))
    (tmp_path / "m.csv").write_text("videoid\na\n")
    with pytest.raises(DataError, match="kinetok pack --csv"):
        run_stage(Store(Folder(str(tmp_path / "s"))), Ingest(source=str(tmp_path / "tars"), csv=str(tmp_path / "m.csv")), "videos", {})


def test_made_by_an_earlier_stage(tmp_path: Path) -> None:
    store = Store(Folder(str(tmp_path)))
    scenes = run_stage(store, Scenes(count=2, size=32, seconds=1, fps=8, real=False, shard_videos=1), "scenes", {})
    made = run_stage(store, Ingest(made_by=Ref("scenes")), "videos", {"made_by": scenes})
    assert [shard.name for shard in SourcePlan(made.folder).shards()] == ["scenes-000000", "scenes-000001"]
    assert Ingest(made_by=Ref("scenes")).facts() == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of source and made_by"),
        ({"source": "x", "made_by": "y"}, "exactly one of source and made_by"),
        ({"made_by": "y", "csv": "z"}, "csv goes with source"),
        ({"source": "x", "split_csv": "z"}, "split_csv goes with csv"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ingest.model_validate(fields)


def test_nothing_there_is_said_at_plan_time(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Ingest(source=f"{tmp_path}/none/*.tar").facts()


def test_a_plan_without_the_source_names_the_remedy(tmp_path: Path) -> None:
    """Neither the videos nor the tables beside them."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "1.mp4").write_bytes(b"video")
    for fields in ({"source": f"{tmp_path}/none/*.tar"}, {"source": f"{tmp_path}/there", "csv": f"{tmp_path}/none.csv"}):
        job = parse_job({"name": "j", "stages": {"videos": {"kind": "ingest", **fields}}}, STAGES)
        with pytest.raises(DataError, match="none"):
            plan(job, Store(Folder(str(tmp_path / "store"))))
        (step,) = plan(job, Store(Folder(str(tmp_path / "store"))), outline=True)
        named = " and ".join(f"--set videos.{field}=..." for field in fields)
        assert "none" in step.reason and step.reason.endswith(f"; {named} names another")
