"""Figures of a running job for Prometheus, through the exporter that Ray runs on every node. Names: `METERS`; Prometheus adds `ray_` before
and, to counters, `_total` behind them.

Workers tell what they did and how long they were busy with it (`did`), so that the speed of light, the rate of workers that never wait,
stands beside each rate in the same series: `rate(samples) / rate(busy_seconds) * processes`. The driver tells how far each stage is
(`progress`). Outside of Ray nothing is told. The dashboard that shows them is `cluster/grafana.json`. Not covered: CPU, GPU and memory of
nodes and processes, which Ray exports by itself.
"""

import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from kinetok.infra.storage import Folder

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge


@dataclass(frozen=True)
class Meter:
    """One figure and the labels it has; each combination of labels, and each process, is a series of its own."""

    kind: Literal["counter", "gauge"]
    about: str
    labels: tuple[str, ...]


METERS = {
    "kinetok_samples": Meter("counter", "Samples that one sort of work has been done on.", ("stage", "work")),
    "kinetok_busy_seconds": Meter("counter", "Seconds that processes spent on it, waiting for input left out.", ("stage", "work")),
    "kinetok_bytes": Meter("counter", "Bytes read (decode) or written (write).", ("stage", "work")),
    "kinetok_processes": Meter("gauge", "1 for each process that has done such work.", ("stage", "work")),
    "kinetok_done": Meter("gauge", "Progress of a stage, in its own unit.", ("stage", "unit")),
    "kinetok_planned": Meter("gauge", "What `kinetok_done` will be at the end.", ("stage", "unit")),
    "kinetok_quarantined": Meter("gauge", "Samples in quarantine.", ("stage",)),
    "kinetok_queue": Meter("gauge", "Blocks encoded and waiting for the rest of their shard, or being written.", ("stage",)),
}


def did(stage: str, work: str, *, samples: int, seconds: float, size: int = 0) -> None:
    """This process did `work` on `samples` samples in `seconds` busy seconds, on `size` bytes."""
    tell("kinetok_processes", 1, stage=stage, work=work)
    for name, amount in (("samples", samples), ("busy_seconds", seconds), ("bytes", size)):
        if amount > 0:
            tell(f"kinetok_{name}", amount, stage=stage, work=work)


def stage_of(out: Folder) -> str:
    """The name of the stage that fills the folder `out`."""
    return out.url.rpartition("/")[2].rpartition("-")[0]


def progress(stage: str, unit: str, *, done: int | None, total: int | None, quarantined: int) -> None:
    """How far a stage is; None where it has not said."""
    if done is not None:
        tell("kinetok_done", done, stage=stage, unit=unit)
    if total is not None:
        tell("kinetok_planned", total, stage=stage, unit=unit)
    tell("kinetok_quarantined", quarantined, stage=stage)


def tell(name: str, amount: float, **labels: str) -> None:
    """Set a gauge, or add to a counter."""
    # Absent too while another thread is in the middle of importing it.
    started = getattr(sys.modules.get("ray"), "is_initialized", None)
    if started is None or not started():
        return
    meter = _meter(name)
    (meter.set if METERS[name].kind == "gauge" else meter.inc)(amount, tags=labels)  # type: ignore[union-attr]


@cache
def _meter(name: str) -> "Counter | Gauge":
    from ray.util.metrics import Counter, Gauge

    known = METERS[name]
    return (Counter if known.kind == "counter" else Gauge)(name, description=known.about, tag_keys=known.labels)
