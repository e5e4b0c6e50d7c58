"""Line charts as plain numbers for the page's SVG: scaled points, round tick marks. No plotting library, nothing to load.

Not covered: colours and text sizes (the page's style sheet), interaction.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from kinetok.infra.metrics_log import Line

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 28
POINTS = 240
"""A longer series is averaged down to about so many points."""
CHARTS = 4
BORING = ("lr", "samples_per_second", "tokens_per_second", "tokens", "writing", "lm_nats", "lm_labels", "head_sum")
FIRST = ("loss", "flow_loss", "psnr", "l1")

Points = Sequence[tuple[float, float]]
"""(step, value), steps rising."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in the chart's own coordinates."""

    at: float
    label: str


@dataclass(frozen=True)
class Series:
    """One line; `path` is the `d` of an SVG path, `end` its last point."""

    name: str
    path: str
    end: tuple[float, float]
    last: str


@dataclass(frozen=True)
class Chart:
    """A chart of `WIDTH` x `HEIGHT`."""

    title: str
    series: tuple[Series, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def charts(lines: Sequence[Line]) -> list[Chart]:
    """One chart per figure of a training run: `train/.../psnr` and `val/psnr` share one; the most telling first."""
    named: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "time") and value is not None:
                named.setdefault(name, []).append((line["step"] or 0.0, value))
    wanted = sorted((name for name in named if _figure(name) not in BORING), key=_rank)
    found = [chart(figure, {name: named[name] for name in names}) for figure, names in groupby(wanted, _figure)]
    return found[:CHARTS]


def chart(title: str, series: Mapping[str, Points]) -> Chart:
    """Scale some series into one chart."""
    thin = {name: _thin(points) for name, points in series.items()}
    steps = [step for points in thin.values() for step, _ in points]
    values = [value for points in thin.values() for _, value in points]
    x_marks, y_marks = ticks(0.0, max(steps)), ticks(min(values), max(values))
    x = _Scale(0.0, max(*steps, 1.0), LEFT, WIDTH - RIGHT)
    y = _Scale(y_marks[0], y_marks[-1], HEIGHT - BOTTOM, TOP)
    return Chart(
        title,
        tuple(_series(name, points, x, y) for name, points in thin.items()),
        tuple(Tick(x(mark), _label(mark)) for mark in x_marks if mark <= x.high),
        tuple(Tick(y(mark), _label(mark)) for mark in y_marks),
    )


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above `high`."""
    if high <= low:
        high = low + max(abs(low) * 0.1, 1e-6)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True)
class _Scale:
    """Linear map of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def _series(name: str, points: Points, x: _Scale, y: _Scale) -> Series:
    places = [(x(step), y(value)) for step, value in points]
    path = "M" + "L".join(f"{across} {down}" for across, down in places)
    return Series(name, path, places[-1], f"{points[-1][1]:.4g}")


def _thin(points: Points) -> Points:
    """Means of equal runs of points, the last point kept as it is."""
    run = math.ceil(len(points) / POINTS)
    if run == 1:
        return points
    groups = [points[start : start + run] for start in range(0, len(points) - 1, run)]
    means = [(math.fsum(s for s, _ in group) / len(group), math.fsum(v for _, v in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def _figure(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _rank(name: str) -> tuple[int, str, str]:
    figure = _figure(name)
    return FIRST.index(figure) if figure in FIRST else len(FIRST), figure, name


def _label(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
