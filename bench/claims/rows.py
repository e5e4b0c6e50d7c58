"""One row for each claim: what was measured, what is aimed at, and whether it holds, written to docs/results.md and promag.json.

The page keeps its prose: only what stands between the two markers is written anew.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"


@dataclass(frozen=True)
class Row:
    """A claim and its figures: dB where nothing else is said, means over seeds, rounded."""

    claim: str
    values: dict[str, float | list[float]]
    aim: str
    holds: bool
    command: str
    seeds: list[int]
    minutes: float
    """Of training that the row rests on, on the cores it had."""


def mean(values: Sequence[float]) -> float:
    """Rounded to hundredths, which is more than such runs repeat to."""
    return round(sum(values) / len(values), 2)


def write(rows: Sequence[Row], page: Path, figures: Path) -> None:
    """Put the rows into the page, between its markers, and into the JSON file."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must hold {BEGIN} and {END} once each: the table goes between them")
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")
    figures.parent.mkdir(parents=True, exist_ok=True)
    figures.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| claim | measured | aim | holds | seeds |", "|---|---|---|---|---|"]
    for row in rows:
        measured = ", ".join(f"{name} {_shown(value)}" for name, value in row.values.items())
        lines.append(f"| {row.claim} | {measured} | {row.aim} | {'yes' if row.holds else 'no'} | {len(row.seeds)} |")
    return "\n".join(lines)


def _shown(value: float | list[float]) -> str:
    return " ".join(f"{number:g}" for number in value) if isinstance(value, list) else f"{value:g}"
