"""The stage writes drawn and real tars, the same again for the same fields, and another key for another seed."""

from pathlib import Path

import pytest
from tests.pipelines.stages.running import run_stage

from kinetok.infra.artifact import Store
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.sources import list_source
from kinetok.pipelines.data.tars import read_samples
from kinetok.pipelines.stages.scenes import Scenes

KEY = "9d4b978dc1873338"


def test_drawn_and_real(tmp_path: Path) -> None:
    told = []
    stage = Scenes(count=5, size=32, seconds=1, fps=8, shard_videos=4)
    made = run_stage(Store(Folder(str(tmp_path))), stage, "scenes", {}, told.append)
    files = list_source(f"{made.folder}/shards/*.tar").files
    assert [file.name for file in files][-2:] == ["scenes-000000.tar", "scenes-000001.tar"]
    videos = 0
    for file in files:
        with (made.folder / "shards").open(file.name) as tar:
            videos += sum(1 for _ in read_samples(tar, file.name))
    assert videos == made.record.counts.written == 5 + 54
    assert told[-1] == {"done": 5, "total": 5, "unit": "videos"}
    assert list(made.problems()) == []


def test_same_fields_same_digest(tmp_path: Path) -> None:
    stage = Scenes(count=3, size=32, seconds=1, fps=8, real=False)
    one, two = (run_stage(Store(Folder(str(tmp_path / name))), stage, "scenes", {}) for name in ("one", "two"))
    assert one.digest == two.digest
    assert stage.key({}) != Scenes(count=3, size=32, seconds=1, fps=8, real=False, seed=1).key({})


@pytest.mark.parametrize("fields", [{"count": 0}, {"size": 33}, {"seconds": 0.1}, {"seed": -1}])
def test_impossible_fields_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Scenes.model_validate(fields)


def test_a_field_that_came_later_leaves_old_keys_alone_and_is_read_back() -> None:
    assert Scenes().key({}) == KEY != Scenes(most_shapes=1).key({})
    assert Scenes.model_validate(Scenes(plain=True, most_shapes=1).literals()) == Scenes(plain=True, most_shapes=1)
