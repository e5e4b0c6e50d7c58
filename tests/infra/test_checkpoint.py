"""Which checkpoints count, and which can be continued; saving and restoring engines is tested with the loop."""

import json
from pathlib import Path

import pytest

from kinetok.infra.checkpoint import SNAPSHOT, Saved, needs_conversion, sweep
from kinetok.infra.errors import TrainingError
from kinetok.infra.storage import Folder


def test_sweep_keeps_what_the_snapshot_lists(tmp_path: Path) -> None:
    for name in ("checkpoint_a", "checkpoint_b", "checkpoint_torn", "other"):
        (tmp_path / name).mkdir()
    listed = [{"checkpoint_dir_name": "checkpoint_a"}, {"checkpoint_dir_name": "checkpoint_b"}]
    (tmp_path / SNAPSHOT).write_text(json.dumps({"checkpoint_results": listed}))
    assert sweep(Folder(str(tmp_path))) == ["checkpoint_torn"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint_a", "checkpoint_b", "other"]


def test_without_a_snapshot_nothing_was_committed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_a").mkdir()
    assert sweep(Folder(str(tmp_path))) == ["checkpoint_a"]
    assert sweep(Folder(str(tmp_path / "never"))) == []


@pytest.mark.parametrize(("zero", "workers", "expected"), [(0, 2, False), (0, 1, False), (1, 2, False), (1, 1, True), (3, 1, True)])
def test_only_shards_of_another_worker_count_need_conversion(zero: int, workers: int, expected: bool) -> None:
    assert needs_conversion(Saved(step=1, workers=2, zero=zero), workers=workers, zero=zero) is expected


def test_another_zero_stage_names_the_remedy() -> None:
    with pytest.raises(TrainingError, match="set zero: 2"):
        needs_conversion(Saved(step=1, workers=2, zero=2), workers=2, zero=3)
