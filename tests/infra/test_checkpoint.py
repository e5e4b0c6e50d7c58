"""Which checkpoints count, and which can be continued; saving and restoring engines is tested with the loop."""

import json
from pathlib import Path

import pytest

from kinetok.infra.checkpoint import SNAPSHOT, STATE, Saved, claim, needs_conversion
from kinetok.infra.errors import TrainingError
from kinetok.infra.storage import Folder


def make_run(runs: Folder, name: str, checkpoints: list[str], latest: str | None) -> None:
    for checkpoint in checkpoints:
        (runs / name / checkpoint).write_text(STATE, f"{name} {checkpoint}")
    if latest is not None:
        (runs / name).write_text(SNAPSHOT, json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": latest}}))


def test_the_newest_committed_checkpoint_is_claimed_and_nothing_else_kept(tmp_path: Path) -> None:
    runs, starts = Folder(str(tmp_path / "ray")), Folder(str(tmp_path / "start"))
    make_run(runs, "0001-aa", ["checkpoint_a"], "checkpoint_a")
    make_run(runs, "0002-bb", ["checkpoint_b", "checkpoint_c", "checkpoint_torn"], "checkpoint_c")
    make_run(runs, "0003-cc", ["checkpoint_torn"], None)
    make_run(runs, "0004-dd", [], "checkpoint_deleted")
    assert claim(runs, starts, "0005-ee") == starts / "0005-ee"
    assert (starts / "0005-ee").read_text(STATE) == "0002-bb checkpoint_c"
    assert runs.folders() == []


def test_a_claim_outlives_a_turn_without_checkpoints_and_gives_way_to_newer_ones(tmp_path: Path) -> None:
    runs, starts = Folder(str(tmp_path / "ray")), Folder(str(tmp_path / "start"))
    assert claim(runs, starts, "0001-aa") is None
    make_run(runs, "0001-aa", ["checkpoint_a"], "checkpoint_a")
    assert claim(runs, starts, "0002-bb") == starts / "0002-bb"
    assert claim(runs, starts, "0003-cc") == starts / "0002-bb"
    make_run(runs, "0003-cc", ["checkpoint_d"], "checkpoint_d")
    assert claim(runs, starts, "0004-dd") == starts / "0004-dd"
    assert starts.folders() == ["0004-dd"]


@pytest.mark.parametrize(("zero", "workers", "expected"), [(0, 2, False), (0, 1, False), (1, 2, False), (1, 1, True), (3, 1, True)])
def test_only_shards_of_another_worker_count_need_conversion(zero: int, workers: int, expected: bool) -> None:
    assert needs_conversion(Saved(step=1, workers=2, zero=zero), workers=workers, zero=zero) is expected


def test_another_zero_stage_names_the_remedy() -> None:
    with pytest.raises(TrainingError, match="set zero: 2"):
        needs_conversion(Saved(step=1, workers=2, zero=2), workers=2, zero=3)
