"""Rates, time left and the two ways of showing them."""

import time
from io import StringIO

import pytest
from rich.console import Console

from kinetok.infra import progress
from kinetok.infra.progress import Board, Row


class Clock:
    """Seconds that only tests move."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


def report(row: Row, done: int | None = None, total: int | None = None, quarantined: int | None = None, note: str | None = None) -> None:
    row.report(done=done, total=total, unit=None, quarantined=quarantined, note=note)


def board(console: Console, *names: str) -> Board:
    return Board.of(names, console)


def test_the_rate_counts_from_the_first_report(clock: Clock) -> None:
    """What an earlier attempt finished was not done now."""
    shown = board(Console(file=StringIO()), "encode")
    row = shown.rows["encode"]
    shown.set("encode", "running")
    report(row, done=1000, total=1500)
    assert row.rate is None and row.eta is None
    clock.now += 10
    report(row, done=1100, quarantined=3)
    assert row.rate == 10 and row.eta == 40
    assert row.line() == "encode: running, 1100/1500 samples, 10/s, 40 s left, 3 quarantined, after 10 s"
    clock.now += 10
    shown.set("encode", "done")
    clock.now += 1000
    assert row.seconds == 20 and row.eta is None and row.rate == 5


def test_an_unknown_total_leaves_the_end_open(clock: Clock) -> None:
    row = Row("clips", status="running")
    report(row, done=0)
    clock.now += 2
    report(row, done=5, note="busy")
    assert row.eta is None and row.cells() == ("clips", "running", "5 samples", "2.5/s", "", "", "busy")


def test_without_a_terminal_each_change_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.01)
    text = StringIO()
    with board(Console(file=text), "few", "many") as shown:
        shown.set("few", "running")
        report(shown.rows["few"], done=1, total=3)
        while text.getvalue().count("few: running, 1/3 samples") < 2:
            pass
        shown.set("few", "failed", "[no] data")
    assert text.getvalue().splitlines()[0] == "few: running"
    assert "few: failed, 1/3 samples, [no] data" in text.getvalue()
    assert "many" not in text.getvalue() and "\x1b" not in text.getvalue()


def test_brackets_in_notes_are_no_markup() -> None:
    console = Console(file=StringIO(), width=200)
    board = Board.of(["base"], console)
    board.rows["base"].note = "cannot read [/data/x] of s3://b/[a-z]*.tar"
    console.print(board.table())
    assert board.rows["base"].note in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_shows_one_table() -> None:
    text = StringIO()
    with board(Console(file=text, force_terminal=True, width=100), "few", "many") as shown:
        shown.set("few", "running")
        report(shown.rows["few"], done=1, total=3, quarantined=1, note="busy")
        shown.say("a line beside the table")
    assert "a line beside the table" in text.getvalue()
    assert shown.table().row_count == 2
