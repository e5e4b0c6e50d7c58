"""What the dashboard shows is what workers and driver tell: scraped from Ray's own exporter during a run of every meter."""

import json
import re
import sys
import threading
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest

from kinetok.infra import machine, meters
from kinetok.infra.machine import node_figures
from kinetok.infra.storage import Folder

DASHBOARD = Path(__file__).parents[2] / "infra" / "cluster" / "grafana.json"
WITHOUT_GPU = {"ray_node_gpus_utilization"}
"""What Ray exports on nodes with a GPU alone."""
NAME = re.compile(r"\bray_\w+")


def _expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def _tell_all() -> None:
    for work in ("cut", "decode", "model", "write", "train"):
        meters.did("tokens", work, samples=3, seconds=0.5, size=7)
    meters.progress("tokens", "clips", done=3, total=9, quarantined=1)
    meters.tell("kinetok_queue", 2, stage="tokens")


def test_nothing_is_told_outside_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "ray", raising=False)
    _tell_all()
    assert meters.stage_of(Folder("s3://bucket/encode/tokens-0123456789abcdef")) == "tokens"


@pytest.mark.ray
def test_every_figure_of_the_dashboard_is_exported(ray_cluster: None) -> None:
    import ray

    _tell_all()
    ray.get(ray.remote(_tell_all).remote())
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    wanted = {name for expression in _expressions() for name in NAME.findall(expression)} - WITHOUT_GPU
    exported, page = set[str](), ""
    for _ in range(60):
        with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=5) as answer:
            page = answer.read().decode()
        exported = set(NAME.findall(page))
        if wanted <= exported:
            break
        threading.Event().wait(0.5)
    assert wanted <= exported, wanted - exported
    told = {f"ray_{name}" + ("_total" if meter.kind == "counter" else "") for name, meter in meters.METERS.items()}
    assert told <= exported and told <= wanted, "each meter is exported, and shown"
    figures = dict(node_figures(page))
    assert 0 <= figures["cpu_utilization_percentage"] <= 100 * 128 and figures["system_memory_usage_megabytes"] > 100


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """No Grafana here: what its schema asks of a dashboard of version 39, and that panels neither overlap nor share an id."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert {"uid", "title", "schemaVersion", "templating", "time", "panels"} <= dashboard.keys()
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert {"id", "type", "title", "gridPos", "targets", "fieldConfig", "options", "datasource"} <= panel.keys()
        place = panel["gridPos"]
        own = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not own & cells and place["x"] + place["w"] <= 24
        cells |= own
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")") and target["refId"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    used = set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) - {"__rate_interval", "__all"}
    assert used == names
    assert sum(expression.count("busy_seconds") for expression in _expressions()) >= 2, "rates stand beside their floor"


def test_a_library_that_is_just_being_imported_has_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    assert machine._nodes() == {}
