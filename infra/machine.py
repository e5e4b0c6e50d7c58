"""Figures of this machine, and of each node of a Ray cluster, while a job runs: sampled into small files beside the job run.

Names are those of MLflow's own monitor, so its "System metrics" tab shows them, one group for each node. Nodes are asked through the
exporter that Ray runs on each. Not covered: clusters of more than `NODES` nodes and single processes (Prometheus, `meters.py`).
"""

import http.client
import json
import re
import sys
import time
import urllib.request
from collections.abc import Iterator

import psutil

from kinetok.infra.metrics_log import Line
from kinetok.infra.storage import Folder

PART_SECONDS = 600
"""One file per ten minutes: object stores cannot append, so a part is rewritten with each sample."""
INTERVAL_SECONDS = 5
CPU_SECONDS = 0.2
MEGABYTE = 1e6
SYSTEM = "system"
NODES = 32
ANSWER_SECONDS = 2.0
_SAMPLE = re.compile(r"^(ray_node_\w+)\{[^}]*\} (\S+)$", re.MULTILINE)
_OF_NODE = {
    "ray_node_cpu_utilization": ("cpu_utilization_percentage", 1.0),
    "ray_node_mem_used": ("system_memory_usage_megabytes", 1 / MEGABYTE),
    "ray_node_gpus_utilization": ("gpu_utilization_percentage", 1.0),
    "ray_node_gram_used": ("gpu_memory_usage_megabytes", 1.0),
    "ray_node_network_receive_speed": ("network_receive_megabytes_per_second", 1 / MEGABYTE),
    "ray_node_disk_io_read_speed": ("disk_read_megabytes_per_second", 1 / MEGABYTE),
}
"""What Ray exports of a node, the name it gets here, and the factor; several GPUs are averaged."""


def sample(folder: Folder, *, now: float | None = None) -> None:
    """Add one line to `system/` in `folder`, unless the last is less than `INTERVAL_SECONDS` old."""
    at = time.time() if now is None else now
    name = f"{SYSTEM}/{int(at) // PART_SECONDS:010d}.jsonl"
    old = folder.read_text(name) if folder.exists(name) else ""
    if old and at - float(json.loads(old.splitlines()[-1])["time"]) < INTERVAL_SECONDS:
        return
    folder.write_text(name, old + json.dumps({"time": at, **_figures(), **_nodes()}) + "\n")


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


def _nodes() -> Line:
    """Figures of each node of the cluster that this process is connected to; nothing for a cluster of this machine alone."""
    # A stage may be importing it just now: its module is there, and still empty.
    started = getattr(sys.modules.get("ray"), "is_initialized", None)
    nodes = [node for node in sys.modules["ray"].nodes() if node["Alive"]] if started and started() else []
    if not 1 < len(nodes) <= NODES:
        return {}
    found: Line = {}
    for node in nodes:
        place = f"{SYSTEM}/{node['NodeManagerAddress']}-{node['NodeID'][:6]}"
        found |= {
            f"{place}/{name}": value for name, value in node_figures(_exported(node["NodeManagerAddress"], node["MetricsExportPort"]))
        }
    return found


def node_figures(exported: str) -> Iterator[tuple[str, float]]:
    """(name, value) of what a node's exporter says in Prometheus' text format."""
    values: dict[str, list[float]] = {}
    for name, value in _SAMPLE.findall(exported):
        values.setdefault(name, []).append(float(value))
    for name, (ours, factor) in _OF_NODE.items():
        if name in values:
            yield ours, factor * sum(values[name]) / len(values[name])


def _exported(address: str, port: int) -> str:
    """The page of a node's exporter; empty where it does not answer now."""
    try:
        with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=ANSWER_SECONDS) as answer:
            return str(answer.read().decode())
    except (OSError, http.client.HTTPException):
        return ""
