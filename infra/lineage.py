"""Lineage from records alone: from any artifact up to the source shards, and down to everything made from it.

`graph` walks the records of a store; `tree`, `to_json` and `to_html` show the result in a terminal, to programs, and as one
self-contained page. An input whose artifact is gone stays in the graph as missing. Not covered: drawing order (`lineage_layout.py`).
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kinetok.infra.artifact import Artifact, InputInfo, Store
from kinetok.infra.fingerprint import Plain, plain
from kinetok.infra.lineage_layout import Drawing, arrange
from kinetok.infra.plan import human_bytes

if TYPE_CHECKING:
    from rich.tree import Tree

SHARDS = "shards.parquet"
"""Listing of source shards that an artifact may hold: columns `url` and `bytes`."""
TEMPLATE = "lineage.html"
Step: TypeAlias = Callable[[str], list[str]]
"""From a node to its neighbours in one direction."""


@dataclass(frozen=True)
class Node:
    """One artifact, one missing artifact, or (kind `source`) the shards that an artifact lists."""

    id: str
    name: str
    kind: str
    key: str = ""
    digest: str = ""
    state: str = "whole"
    """whole, missing, changed (its digest is not the one that was used), or source."""
    folder: str = ""
    commit: str = ""
    started: str = ""
    seconds: float | None = None
    bytes: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    config: Mapping[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True)
class Edge:
    """`child` was made from `parent`, which stood behind `field`."""

    parent: str
    child: str
    field: str


@dataclass(frozen=True)
class Lineage:
    """The ancestors and descendants of the artifact `root`."""

    root: str
    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]

    def parents(self, node: str) -> list[str]:
        return list(dict.fromkeys(edge.parent for edge in self.edges if edge.child == node))

    def children(self, node: str) -> list[str]:
        return list(dict.fromkeys(edge.child for edge in self.edges if edge.parent == node))

    @cached_property
    def drawing(self) -> Drawing:
        return arrange(list(self.nodes), [(edge.parent, edge.child) for edge in self.edges])


def graph(store: Store, artifact: Artifact) -> Lineage:
    """Everything `artifact` was made of and everything made of it, with sources at the top."""
    known = {_id(found.kind, found.key): found for found in store.all()} | {_id(artifact.kind, artifact.key): artifact}
    made_of = {name: [(field, info) for field, infos in found.record.inputs.items() for info in infos] for name, found in known.items()}
    up = {name: [_id(info.kind, info.key) for _, info in inputs] for name, inputs in made_of.items()}
    down: dict[str, list[str]] = {}
    for child, parents in up.items():
        for parent in parents:
            down.setdefault(parent, []).append(child)
    root = _id(artifact.kind, artifact.key)
    below = _reach(root, down)
    members = _reach(root, up) | below
    edges = [
        Edge(_id(info.kind, info.key), child, field)
        for child in members & made_of.keys()
        for field, info in made_of[child]
        if _id(info.kind, info.key) in members
    ]
    used = {_id(info.kind, info.key): info for child in sorted(members & made_of.keys()) for _, info in made_of[child]}
    nodes = {name: _node(name, known.get(name), used.get(name)) for name in members}
    for name in members & known.keys():
        source = _source(known[name])
        if source is not None:
            nodes[source.id] = source
            edges.append(Edge(source.id, name, "source"))
    order = sorted(nodes, key=lambda name: (nodes[name].started, name))
    return Lineage(
        root, {name: nodes[name] for name in order}, tuple(sorted(edges, key=lambda edge: (edge.child, edge.field, edge.parent)))
    )


def to_json(lineage: Lineage) -> str:
    """Nodes and edges as JSON text."""
    body = {
        "root": lineage.root,
        "nodes": [asdict(node) for node in lineage.nodes.values()],
        "edges": [asdict(edge) for edge in lineage.edges],
    }
    return json.dumps(body, indent=1)


def to_html(lineage: Lineage) -> str:
    """One page without outside resources; every text from records is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["size"] = human_bytes
    return environment.get_template(TEMPLATE).render(lineage=lineage, drawing=lineage.drawing, root=lineage.nodes[lineage.root])


def tree(lineage: Lineage) -> "Tree":
    """For a terminal: what it was made of above, what was made of it below; repeated branches are shown once."""
    from rich.tree import Tree

    whole = Tree(_label(lineage.nodes[lineage.root]), guide_style="dim")
    for title, step in (("made of", lineage.parents), ("made into", lineage.children)):
        if step(lineage.root):
            _grow(whole.add(f"[dim]{title}[/dim]"), lineage, lineage.root, step, set())
    return whole


def _grow(branch: "Tree", lineage: Lineage, name: str, step: Step, seen: set[str]) -> None:
    for other in step(name):
        again = other in seen and bool(step(other))
        grown = branch.add(_label(lineage.nodes[other]) + (" [dim](see above)[/dim]" if again else ""))
        if not again:
            seen.add(other)
            _grow(grown, lineage, other, step, seen)


def _label(node: Node) -> str:
    from rich.markup import escape

    counts = f"  {node.counts['written']:,} samples" if node.counts.get("written") else ""
    size = f"  {human_bytes(node.bytes)}" if node.bytes is not None else ""
    remark = f"  [red]{node.state}[/red]" if node.state in ("missing", "changed") else ""
    return f"[bold]{escape(node.name)}[/bold] [dim]{escape(node.kind)} {node.key[:8]}[/dim]{counts}{size}{remark}"


def _id(kind: str, key: str) -> str:
    return f"{kind}-{key}"


def _reach(start: str, steps: Mapping[str, Iterable[str]]) -> set[str]:
    found, todo = {start}, [start]
    while todo:
        for other in steps.get(todo.pop(), ()):
            if other not in found:
                found.add(other)
                todo.append(other)
    return found


def _node(name: str, artifact: Artifact | None, used: InputInfo | None) -> Node:
    """The artifact as a node; `used` is how one of its readers recorded it."""
    if artifact is None:
        assert used is not None, "a node without artifact is somebody's input"
        return Node(name, used.name, used.kind, used.key, used.digest, state="missing")
    record = artifact.record
    return Node(
        id=name,
        name=record.name,
        kind=record.kind,
        key=record.key,
        digest=record.digest,
        state="changed" if used is not None and used.digest != record.digest else "whole",
        folder=artifact.folder.url,
        commit=record.commit or "",
        started=record.started,
        seconds=record.seconds,
        bytes=record.bytes,
        counts=record.counts.model_dump() if record.counts.input else {},
        metrics=record.metrics,
        config={name: plain(value) for name, value in record.config.items()},
    )


def _source(artifact: Artifact) -> Node | None:
    """The source shards an artifact lists, summed up; None where it lists none."""
    if SHARDS not in artifact.record.files:
        return None
    import io

    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(artifact.folder.read_bytes(SHARDS)), columns=["url", "bytes"])
    urls, sizes = table["url"].to_pylist(), table["bytes"].to_pylist()
    ends = {"first": urls[0], "last": urls[-1]} if urls else {}
    name = f"{len(urls):,} source shard{'' if len(urls) == 1 else 's'}"
    return Node(f"source-{artifact.key}", name, "source", state="source", bytes=sum(sizes), config={"shards": len(urls), **ends})
