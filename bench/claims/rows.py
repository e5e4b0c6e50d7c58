"""One row for each claim: what was measured, what is aimed at, and whether it holds, written to docs/results.md and a JSON file.

The page keeps its prose: only what stands between the two markers of a paper's table is written anew.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A claim and its figures, means over seeds, rounded."""

    claim: str
    values: dict[str, float | list[float]]
    aim: str
    holds: bool | None
    """None where there is nothing to hold: a figure for comparison."""
    command: str
    seeds: list[int]
    minutes: float
    """Of all training that the row rests on, that of rungs below and searches of learning rates included, on the cores it had."""


def mean(values: Sequence[float]) -> float:
    """Rounded to hundredths, which is more than such runs repeat to."""
    return round(sum(values) / len(values), 2)


def markers(paper: str) -> tuple[str, str]:
    """What a paper's table stands between on the page."""
    return f"<!-- {paper}: begin -->", f"<!-- {paper}: end -->"


def write(rows: Sequence[Row], page: Path, figures: Path) -> None:
    """Put the rows into the page, between the markers of the paper that `figures`, the JSON file they go to as well, is named after."""
    text, (begin, end) = page.read_text(), markers(figures.stem)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} must hold {begin} and {end} once each: the table goes between them")
    head, rest = text.split(begin)
    page.write_text(f"{head}{begin}\n{table(rows)}\n{end}{rest.split(end)[1]}")
    figures.parent.mkdir(parents=True, exist_ok=True)
    figures.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read(figures: Path) -> list[Row]:
    """The rows of a JSON file."""
    return [Row(**row) for row in json.loads(figures.read_text())]


def kept(figures: Path, measured: Sequence[Row]) -> list[Row]:
    """The rows of a JSON file whose claims are not among those measured now."""
    own = {row.claim for row in measured}
    return [row for row in read(figures) if row.claim not in own]


def table(rows: Sequence[Row]) -> str:
    """Markdown, with the commands that made it."""
    lines = ["| claim | measured | aim | holds | seeds |", "|---|---|---|---|---|"]
    said = {True: "yes", False: "no", None: "-"}
    for row in rows:
        measured = ", ".join(f"{name} {_shown(value)}" for name, value in row.values.items())
        lines.append(f"| {row.claim} | {measured} | {row.aim} | {said[row.holds]} | {len(row.seeds) or '-'} |")
    commands = dict.fromkeys(row.command for row in rows)
    return "\n".join([*lines, "", f"Made by {', '.join(f'`{command}`' for command in commands)}."])


def _shown(value: float | list[float]) -> str:
    return " ".join(f"{number:g}" for number in value) if isinstance(value, list) else f"{value:g}"
