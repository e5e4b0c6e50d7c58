"""Segments of the metrics log: whole, in order, and trimmed."""

import math
from pathlib import Path

import pytest

from kinetok.infra import metrics_log
from kinetok.infra.metrics_log import MetricsLog, last_line, read_metrics
from kinetok.infra.storage import Folder


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A folder whose log is flushed at every line and cut after three."""
    monkeypatch.setattr(metrics_log, "FLUSH_LINES", 1)
    monkeypatch.setattr(metrics_log, "SEGMENT_LINES", 3)
    return Folder(str(tmp_path))


def write(out: Folder, steps: range, after: int = 0) -> None:
    log = MetricsLog(out, after=after)
    for step in steps:
        log.write(step, {"train/loss": 1 / step})
    log.flush()


def test_lines_come_back_in_order_over_several_segments(out: Folder) -> None:
    assert last_line(out) is None
    write(out, range(1, 9))
    assert sorted(out.files("metrics")) == [f"metrics/{step:09d}.jsonl" for step in (1, 4, 7)]
    assert [line["step"] for line in read_metrics(out)] == list(range(1, 9))
    assert last_line(out) == read_metrics(out)[-1]


@pytest.mark.parametrize("after", [0, 1, 3, 4, 8])
def test_resuming_leaves_no_step_twice(out: Folder, after: int) -> None:
    write(out, range(1, 9))
    write(out, range(after + 1, 11), after=after)
    assert [line["step"] for line in read_metrics(out)] == list(range(1, 11))


def test_a_segment_removed_meanwhile_is_no_error(out: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_log, "_segments", lambda out: ["metrics/000000001.jsonl"])
    assert last_line(out) is None


def test_what_is_not_finite_is_null(out: Folder) -> None:
    MetricsLog(out, after=0).write(1, {"val/psnr": math.inf, "val/l1": 0.5})
    assert {name: value for name, value in (last_line(out) or {}).items() if name.startswith("val/")} == {"val/psnr": None, "val/l1": 0.5}
