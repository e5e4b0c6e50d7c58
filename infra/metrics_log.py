"""The metrics of a training run as JSON lines in `metrics/{first step}.jsonl`, one line per logged step.

Object stores cannot append, so the newest segment is rewritten whole every few seconds and a new one begun when it grows long.
A line holds `step`, `time` (seconds since the epoch) and figures named `train/...` or `val/...`, null where not finite. On resuming,
lines past the checkpoint are dropped: no step ever appears twice. Not covered: MLflow, which mirrors these files.
"""

import json
import math
import time
from collections.abc import Mapping
from typing import TypeAlias

from kinetok.infra.storage import Folder

METRICS = "metrics"
FLUSH_SECONDS = 2.0
FLUSH_LINES = 50
SEGMENT_LINES = 1000

Line: TypeAlias = dict[str, float | None]


class MetricsLog:
    """Writes the lines of one attempt, after removing those later than step `after` that an earlier attempt left."""

    def __init__(self, out: Folder, *, after: int) -> None:
        self.out = out
        self._segment: list[Line] = []
        self._unwritten = 0
        self._flushed = time.monotonic()
        _trim(out, after)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the line of one step; steps must rise."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._segment.append({"step": step, "time": time.time(), **finite})
        self._unwritten += 1
        if self._unwritten >= FLUSH_LINES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring every line so far to the store."""
        if not self._unwritten:
            return
        _write(self.out, self._segment)
        self._unwritten, self._flushed = 0, time.monotonic()
        if len(self._segment) >= SEGMENT_LINES:
            self._segment = []


def read_metrics(out: Folder) -> list[Line]:
    """Every line in order of steps."""
    return [line for name in _segments(out) for line in _read(out, name)]


def last_line(out: Folder) -> Line | None:
    """The newest line, None before the first; may be called while another process writes."""
    names = _segments(out)
    try:
        return _read(out, names[-1])[-1] if names else None
    except FileNotFoundError:
        # A worker that resumes has just removed the segment.
        return None


def step_of(line: Line) -> int:
    """The step a line is about."""
    step = line["step"]
    assert step is not None
    return int(step)


def _trim(out: Folder, after: int) -> None:
    for name in _segments(out):
        lines = _read(out, name)
        kept = [line for line in lines if step_of(line) <= after]
        if not kept:
            out.remove(name)
        elif len(kept) < len(lines):
            _write(out, kept)


def _write(out: Folder, lines: list[Line]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    out.write_text(f"{METRICS}/{step_of(lines[0]):09d}.jsonl", text)


def _read(out: Folder, name: str) -> list[Line]:
    return [json.loads(line) for line in out.read_text(name).splitlines()]


def _segments(out: Folder) -> list[str]:
    return sorted(out.files(METRICS)) if out.exists(METRICS) else []
