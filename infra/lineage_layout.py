"""Drawing order of a lineage graph: layers from top to bottom, few crossings, coordinates in pixels (Sugiyama's method, small).

A node's layer is its longest way from a source. An edge that skips layers gets a waypoint in each one it passes; edges of one parent
share waypoints. Nodes of a layer are ordered by the mean place of their neighbours in a few sweeps. Not covered: colours and text.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

NODE_WIDTH, NODE_HEIGHT = 176, 52
LANE_WIDTH = 18
GAP_X, GAP_Y = 20, 38
MARGIN = 8
SWEEPS = 6


@dataclass(frozen=True)
class Box:
    """Top left corner of a node."""

    id: str
    x: float
    y: float
    width: int = NODE_WIDTH
    height: int = NODE_HEIGHT


@dataclass(frozen=True)
class Drawing:
    """Boxes and the `d` of one SVG path per edge."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    paths: tuple[str, ...]


def arrange(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> Drawing:
    """Lay out a graph without cycles; `edges` are (parent, child)."""
    layer = _layers(nodes, edges)
    links, routes = _with_waypoints(layer, edges)
    rows = _order(layer, links)
    place = _coordinates(rows)
    width = max(x + _width(name) for name, (x, _) in place.items()) + MARGIN
    paths = tuple(_path([place[name] for name in route], [_width(name) for name in route]) for route in routes)
    boxes = tuple(Box(name, *place[name]) for name in nodes)
    return Drawing(width, len(rows) * (NODE_HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN, boxes, paths)


def _layers(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Longest way from a node without parents; waypoints are added later."""
    parents: dict[str, list[str]] = {name: [] for name in nodes}
    for parent, child in edges:
        parents[child].append(parent)
    layer: dict[str, int] = {}
    for name in TopologicalSorter(parents).static_order():
        layer[name] = max((layer[parent] + 1 for parent in parents[name]), default=0)
    children: dict[str, list[str]] = {name: [child for parent, child in edges if parent == name] for name in nodes}
    for name in nodes:
        if not parents[name] and children[name]:
            layer[name] = min(layer[child] for child in children[name]) - 1
    return layer


def _with_waypoints(layer: dict[str, int], edges: Sequence[tuple[str, str]]) -> tuple[set[tuple[str, str]], list[list[str]]]:
    """Links between neighbouring layers, and each edge as its row of names; adds the waypoints to `layer`."""
    links: set[tuple[str, str]] = set()
    routes = []
    for parent, child in edges:
        between = [f"{parent}\n{number}" for number in range(layer[parent] + 1, layer[child])]
        for number, name in enumerate(between, start=layer[parent] + 1):
            layer[name] = number
        route = [parent, *between, child]
        links |= set(itertools.pairwise(route))
        routes.append(route)
    return links, routes


def _order(layer: Mapping[str, int], links: set[tuple[str, str]]) -> list[list[str]]:
    """Names of each layer from left to right, by the mean place of their neighbours above, then below, and again."""
    rows: list[list[str]] = [[] for _ in range(max(layer.values()) + 1)]
    for name, number in layer.items():
        rows[number].append(name)
    around: dict[str, list[list[str]]] = {name: [[], []] for name in layer}
    for parent, child in sorted(links):
        around[child][0].append(parent)
        around[parent][1].append(child)
    for sweep in range(SWEEPS):
        side = sweep % 2
        for row in rows if side == 0 else reversed(rows):
            middle = _middles(rows)
            wanted = {
                name: sum(middle[other] for other in around[name][side]) / len(around[name][side]) if around[name][side] else middle[name]
                for name in row
            }
            row.sort(key=lambda name: (wanted[name], name))
    return rows


def _middles(rows: Sequence[Sequence[str]]) -> dict[str, float]:
    """Middle of each name when every row is centred on 0."""
    found = {}
    for row in rows:
        at = -(sum(map(_width, row)) + GAP_X * (len(row) - 1)) / 2
        for name in row:
            found[name] = at + _width(name) / 2
            at += _width(name) + GAP_X
    return found


def _coordinates(rows: Sequence[Sequence[str]]) -> dict[str, tuple[float, float]]:
    """Top left corner of every name; rows are centred on the widest."""
    middles = _middles(rows)
    left = min(middle - _width(name) / 2 for name, middle in middles.items())
    return {
        name: (round(middles[name] - _width(name) / 2 - left + MARGIN, 1), MARGIN + number * (NODE_HEIGHT + GAP_Y))
        for number, row in enumerate(rows)
        for name in row
    }


def _path(corners: Sequence[tuple[float, float]], widths: Sequence[int]) -> str:
    """From the foot of the first box, straight through waypoints, to the head of the last; smooth in between."""
    middles = [(round(x + width / 2, 1), y) for (x, y), width in zip(corners, widths, strict=True)]
    x, y = middles[0][0], middles[0][1] + NODE_HEIGHT
    path = f"M{x} {y}"
    for number, (to_x, to_y) in enumerate(middles[1:], start=2):
        half = (y + to_y) / 2
        path += f"C{x} {half} {to_x} {half} {to_x} {to_y}"
        x, y = to_x, to_y
        if number < len(middles):
            y += NODE_HEIGHT
            path += f"V{y}"
    return path


def _width(name: str) -> int:
    return LANE_WIDTH if "\n" in name else NODE_WIDTH
