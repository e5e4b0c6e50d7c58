"""`Board`: what each stage of a run is doing, shown live on a terminal and as plain lines elsewhere.

Stages report from their threads through `Row.report`; showing happens in one thread of its own, so that a stage never waits for a
terminal. Rates count from a stage's first report, so samples finished by an earlier attempt do not flatter them.
Not covered: what is written to the store and to MLflow (`run.py`, `tracking.py`).
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from kinetok.infra import meters
from kinetok.infra.plan import human_seconds
from kinetok.infra.secrets import redact

INTERVAL_SECONDS = 10.0
"""Between two plain lines of one stage."""
_COLOURS = {"cached": "green", "done": "green", "running": "cyan", "failed": "red", "skipped": "yellow"}


@dataclass
class Row:
    """State of one stage, as last reported."""

    name: str
    status: str = "planned"
    done: int | None = None
    total: int | None = None
    unit: str = "samples"
    quarantined: int = 0
    note: str = ""
    began: float | None = None
    """Seconds (monotonic) of the start."""
    ended: float | None = None
    _first: tuple[float, int] | None = None
    """Time and count of the first report of `done`."""

    def report(self, *, done: int | None, total: int | None, unit: str | None, quarantined: int | None, note: str | None) -> None:
        """Take over what is given, and tell Prometheus; None keeps what was there."""
        if done is not None and self._first is None:
            self._first = time.monotonic(), done
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.unit = self.unit if unit is None else unit
        self.quarantined = self.quarantined if quarantined is None else quarantined
        self.note = self.note if note is None else note
        meters.progress(self.name, self.unit, done=self.done, total=self.total, quarantined=self.quarantined)

    @property
    def seconds(self) -> float | None:
        """Since the start, until the end where it has ended."""
        return None if self.began is None else (self.ended or time.monotonic()) - self.began

    @property
    def rate(self) -> float | None:
        """Units per second since the first report."""
        if self._first is None or self.done is None:
            return None
        since, before = self._first
        elapsed = (self.ended or time.monotonic()) - since
        return (self.done - before) / elapsed if elapsed > 0 and self.done > before else None

    @property
    def eta(self) -> float | None:
        """Seconds until `total` at the present rate."""
        if self.status != "running" or not self.rate or self.total is None or self.done is None:
            return None
        return max(self.total - self.done, 0) / self.rate

    def cells(self) -> tuple[str, ...]:
        """name, status, progress, rate, time left, quarantined, note; empty where nothing is known."""
        of = f"/{self.total}" if self.total is not None else ""
        return (
            self.name,
            self.status,
            f"{self.done}{of} {self.unit}" if self.done is not None else "",
            f"{self.rate:.3g}/s" if self.rate else "",
            human_seconds(self.eta) if self.eta is not None else "",
            str(self.quarantined or ""),
            redact(self.note),
        )

    def line(self) -> str:
        """The row as one plain line."""
        name, status, progress, rate, eta, quarantined, note = self.cells()
        after = f"after {human_seconds(self.seconds)}" if self.seconds is not None and (self.ended or self.seconds > 1) else ""
        parts = [progress, rate, eta and f"{eta} left", quarantined and f"{quarantined} quarantined", note, after]
        return f"{name}: {status}" + "".join(f", {part}" for part in parts if part)


@dataclass
class Board:
    """All rows of a run; a context manager that shows them while it is open."""

    console: Console
    rows: dict[str, Row]
    _closed: threading.Event = field(default_factory=threading.Event)
    _live: Live | None = None
    _thread: threading.Thread | None = None

    @classmethod
    def of(cls, names: Iterable[str], console: Console) -> Self:
        return cls(console, {name: Row(name) for name in names})

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        else:
            self._thread = threading.Thread(target=self._print_at_intervals, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._live is not None:
            self._live.stop()
        if self._thread is not None:
            self._thread.join()

    def set(self, name: str, status: str, note: str = "") -> None:
        """Change a stage's status, which without a terminal prints a line."""
        row = self.rows[name]
        row.status, row.note = status, note
        if status == "running":
            row.began = time.monotonic()
        elif row.began is not None:
            row.ended = time.monotonic()
        if self._live is None:
            self.say(row.line())

    def say(self, text: str) -> None:
        """One line of text beside the table."""
        self.console.print(redact(text), markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """The live display."""
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column in ("stage", "state", "done", "rate", "left", "quarantined", "note", "time"):
            table.add_column(column, justify="right" if column in ("done", "rate", "left", "quarantined", "time") else "left")
        for row in self.rows.values():
            time_spent = human_seconds(row.seconds) if row.seconds is not None else ""
            table.add_row(*map(escape, row.cells()), time_spent, style=_COLOURS.get(row.status, "dim"))
        return table

    def _print_at_intervals(self) -> None:
        while not self._closed.wait(INTERVAL_SECONDS):
            for row in self.rows.values():
                if row.status == "running":
                    self.say(row.line())
