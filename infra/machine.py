"""Figures of this machine while a job runs: CPU, memory, disk and network, sampled into small files beside the job run.

Names are those of MLflow's own monitor, so its "System metrics" tab shows them. Not covered: GPUs and other machines (Ray's dashboard).
"""

import json
import time

import psutil

from kinetok.infra.metrics_log import Line
from kinetok.infra.storage import Folder

PART_SECONDS = 600
"""One file per ten minutes: object stores cannot append, so a part is rewritten with each sample."""
INTERVAL_SECONDS = 5
CPU_SECONDS = 0.2
MEGABYTE = 1e6
SYSTEM = "system"


def sample(folder: Folder, *, now: float | None = None) -> None:
    """Add one line to `system/` in `folder`, unless the last is less than `INTERVAL_SECONDS` old."""
    at = time.time() if now is None else now
    name = f"{SYSTEM}/{int(at) // PART_SECONDS:010d}.jsonl"
    old = folder.read_text(name) if folder.exists(name) else ""
    if old and at - float(json.loads(old.splitlines()[-1])["time"]) < INTERVAL_SECONDS:
        return
    folder.write_text(name, old + json.dumps({"time": at, **_figures()}) + "\n")


def samples(folder: Folder) -> list[Line]:
    """Every line in `system/`, oldest first."""
    names = sorted(folder.files(SYSTEM)) if folder.exists(SYSTEM) else []
    return [json.loads(line) for name in names for line in folder.read_text(name).splitlines()]


def _figures() -> Line:
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(interval=CPU_SECONDS),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": disk.percent,
        "system/disk_available_megabytes": disk.free / MEGABYTE,
        "system/network_receive_megabytes": network.bytes_recv / MEGABYTE,
        "system/network_transmit_megabytes": network.bytes_sent / MEGABYTE,
    }
