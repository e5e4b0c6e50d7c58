"""Lineage of a synthetic store: complete up and down, nothing beside it, and drawable."""

import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from kinetok.infra import lineage
from kinetok.infra.artifact import Artifact, Counts, InputInfo, Record, Store, publish
from kinetok.infra.lineage_layout import NODE_HEIGHT, NODE_WIDTH, arrange
from kinetok.infra.storage import Folder

HOSTILE = "<script>alert(1)</script>"


def _make(store: Store, kind: str, name: str, inputs: dict[str, Artifact], note: str = "") -> Artifact:
    key = (name * 16)[:16]
    infos = {field: (InputInfo(kind=a.kind, name=a.name, key=a.key, digest=a.digest),) for field, a in inputs.items()}
    record = Record(
        kind=kind, name=name, key=key, version=1, config={"note": note, "nested": {"lr": 0.1}}, inputs=infos, digest="",
        counts=Counts(input=2, written=2), metrics={"psnr": 20.0, "bad": None}, started=f"2026-01-0{len(name)}", seconds=1.0, commit="abc",
    )  # fmt: skip
    folder = store.folder(kind, name, key)
    folder.write_text("data.txt", name)
    return publish(folder, record)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """a (with source shards) -> bb -> ccc -> dddd, bb -> dddd directly, and `other`, made of a alone."""
    store = Store(Folder(str(tmp_path)))
    listing = io.BytesIO()
    pq.write_table(pa.table({"shard": [0, 1], "url": ["s3://b/0.tar", "s3://b/1.tar"], "bytes": [100, 200]}), listing)
    store.folder("ingest", "a", "a" * 16).write_bytes("shards.parquet", listing.getvalue())
    a = _make(store, "ingest", "a", {})
    bb = _make(store, "clips", "bb", {"videos": a}, HOSTILE)
    ccc = _make(store, "train", "ccc", {"data": bb})
    _make(store, "encode", "dddd", {"model": ccc, "data": bb})
    _make(store, "clips", "other", {"videos": a})
    return store


def _names(found: lineage.Lineage) -> set[str]:
    return {node.name for node in found.nodes.values()}


def test_up_to_the_source_and_down_to_everything(store: Store) -> None:
    found = lineage.graph(store, store.find("ccc"))
    assert _names(found) == {"2 source shards", "a", "bb", "ccc", "dddd"}, "a cousin is no relative"
    assert _names(lineage.graph(store, store.find("a"))) == {"2 source shards", "a", "bb", "ccc", "dddd", "other"}
    assert {(edge.parent.split("-")[0], edge.child.split("-")[0], edge.field) for edge in found.edges} == {
        ("source", "ingest", "source"),
        ("ingest", "clips", "videos"),
        ("clips", "train", "data"),
        ("clips", "encode", "data"),
        ("train", "encode", "model"),
    }
    source = next(node for node in found.nodes.values() if node.kind == "source")
    assert source.bytes == 300 and source.config["last"] == "s3://b/1.tar"


def test_a_missing_and_a_changed_input_are_told(store: Store) -> None:
    store.root.remove("ingest")
    assert {node.name: node.state for node in lineage.graph(store, store.find("bb")).nodes.values()}["a"] == "missing"
    bb = store.find("bb")
    bb.folder.write_text("data.txt", "something else")
    publish(bb.folder, bb.record)
    assert {node.name: node.state for node in lineage.graph(store, store.find("ccc")).nodes.values()}["bb"] == "changed"


def test_json_and_tree_hold_the_same_nodes(store: Store) -> None:
    found = lineage.graph(store, store.find("ccc"))
    body = json.loads(lineage.to_json(found))
    assert {node["name"] for node in body["nodes"]} == _names(found) and len(body["edges"]) == len(found.edges)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(lineage.tree(found))
    text = console.export_text()
    assert all(name in text for name in _names(found)) and "other" not in text


def test_the_page_is_self_contained_and_escapes_hostile_text(store: Store) -> None:
    page = lineage.to_html(lineage.graph(store, store.find("ccc")))
    assert "alert(1)" in page and HOSTILE not in page and page.count("<script>") == 1
    assert not re.search(r"(src|href)=\"(?!#)", page) and "url(" not in page
    ids = set(re.findall(r"<details id=\"([^\"]+)\"", page))
    assert len(ids) == 5 and set(re.findall(r"href=\"#([^\"]+)\"", page)) == ids


@pytest.mark.parametrize("wide", [1, 4])
def test_boxes_never_overlap_and_children_stand_below(wide: int) -> None:
    edges = [("a", f"b{n}") for n in range(wide)] + [(f"b{n}", "c") for n in range(wide)] + [("a", "c"), ("c", "d"), ("a", "d"), ("e", "d")]
    nodes = sorted({name for edge in edges for name in edge})
    drawing = arrange(nodes, edges)
    boxes = {box.id: box for box in drawing.boxes}
    assert len(drawing.paths) == len(edges)
    assert all(boxes[parent].y < boxes[child].y for parent, child in edges)
    apart = [
        abs(boxes[one].x - boxes[two].x) >= NODE_WIDTH or abs(boxes[one].y - boxes[two].y) >= NODE_HEIGHT
        for one in nodes for two in nodes if one < two
    ]  # fmt: skip
    assert all(apart)
    assert all(box.x >= 0 and box.x + box.width <= drawing.width and box.y + box.height <= drawing.height for box in drawing.boxes)


def test_a_single_artifact_is_a_graph_too(tmp_path: Path) -> None:
    store = Store(Folder(str(tmp_path)))
    alone = lineage.graph(store, _make(store, "scenes", "x", {}))
    assert len(alone.nodes) == 1 and not alone.edges and "<svg" in lineage.to_html(alone)
