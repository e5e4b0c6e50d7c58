"""What a stage will take on a cluster: seconds, CPU and GPU hours and money, from the record of an earlier run of its kind.

A record that says what one process of each sort does in a second (`Stage.rates`) is sized by the slowest sort: so many samples, over so
many processes. Any other is taken to go as many times faster as it has more processes. Both assume the machines that were measured, and
neither knows of start-up, stragglers or a store that is too slow (`bench/simulate.py`). Training at a fixed global batch counts as linear
in its workers. Prices are of the job and never part of a key.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from kinetok.infra.artifact import Record
from kinetok.infra.config import Config
from kinetok.infra.stage import Resources, Stage

CPUS = "cpus"
"""Name in a record's environment: CPUs of the machine that the stage was run from."""
DECODES = "decode task"
Amount = Annotated[float, Field(ge=0)]


class Prices(Config):
    """What a cluster costs, in any one currency."""

    cpu_hour: Amount = 0.0
    """Of one CPU that a worker or a decode task holds."""
    gpu_hour: Amount = 0.0
    storage_gb_month: Amount = 0.0


@dataclass(frozen=True)
class Size:
    """What one stage takes."""

    seconds: float
    cpu_hours: float
    gpu_hours: float
    money: float | None = None
    """Of CPUs and GPUs; None without prices."""
    storage: float | None = None
    """Of the output, for a month."""


def size(stage: Stage, resources: Resources, record: Record, *, samples: int, scale: float, prices: Prices | None) -> Size:
    """`stage` over `samples` samples, which is `scale` times the work of `record`."""
    now = processes(stage, resources, os.cpu_count() or 1)
    then = processes(stage, Resources.model_validate(record.resources), int(record.environment.get(CPUS, os.cpu_count() or 1)))
    seconds = _by_rates(stage, record, now, samples) or record.seconds * scale * max(then[what] / now[what] for what in now)
    hours = seconds / 3600
    cpus, gpus = (_held(stage, resources, now, name) for name in ("CPU", "GPU"))
    if prices is None:
        return Size(seconds, hours * cpus, hours * gpus)
    money = hours * (cpus * prices.cpu_hour + gpus * prices.gpu_hour)
    return Size(seconds, hours * cpus, hours * gpus, money, record.bytes * scale / 1e9 * prices.storage_gb_month)


def processes(stage: Stage, resources: Resources, cpus: int) -> dict[str, int]:
    """How many of each sort of process a stage has; decode tasks that the job does not count take what is left of `cpus`."""
    found = {}
    for ask in stage.asks(resources):
        spare = max(1, int(cpus - resources.workers * resources.cpus))
        found[ask.what] = (resources.decoders or spare) if ask.what == DECODES else resources.workers
    return found or {"process": 1}


def _by_rates(stage: Stage, record: Record, now: Mapping[str, int], samples: int) -> float | None:
    """Seconds by the slowest sort of process; None where the record does not say what each does."""
    rates = {what: record.metrics.get(name) for what, name in stage.rates.items() if what in now}
    known = [rate * now[what] for what, rate in rates.items() if rate]
    return samples / min(known) if known and len(known) == len(now) else None


def _held(stage: Stage, resources: Resources, now: Mapping[str, int], name: str) -> float:
    """CPUs or GPUs that all processes of a stage hold at once."""
    asks = stage.asks(resources)
    if not asks:
        return resources.cpus if name == "CPU" else resources.gpus
    return sum(ask.each.get(name, 0.0) * now[ask.what] for ask in asks)
