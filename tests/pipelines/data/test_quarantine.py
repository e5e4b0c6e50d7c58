"""Quarantine tables are read whichever stage wrote them, and summed up by reason."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import Row, part_bytes, part_name
from kinetok.pipelines.data.quarantine import listing, report, rows, summary
from kinetok.pipelines.data.reasons import Reason


def _bad(name: str, reason: Reason, position: float | None = None) -> Row:
    return {"id": name, "shard": 0, "decision": "quarantined", "reason": reason.value, "message": f"why {name}", "position": position}


def _folder(tmp_path: Path) -> Folder:
    folder = Folder(str(tmp_path))
    folder.write_bytes(part_name(0), part_bytes([{"id": "k", "shard": 0, "decision": "kept"}, _bad("a", Reason.CORRUPT, 1.5)]))
    filtered: Row = {"id": "f", "shard": 1, "decision": "filtered", "reason": "static"}
    more = [_bad("b", Reason.UNREADABLE), filtered, *(_bad(name, Reason.CORRUPT) for name in "cdef")]
    folder.write_bytes(part_name(1), part_bytes(more))
    return folder


def test_rows_of_a_clip_index(tmp_path: Path) -> None:
    found = rows(_folder(tmp_path))
    assert [row["id"] for row in found] == ["a", "b", "c", "d", "e", "f"]
    assert found[0] == {"id": "a", "shard": 0, "reason": "corrupt", "message": "why a", "position": 1.5}


def test_report_groups_by_reason(tmp_path: Path) -> None:
    first, second = report(_folder(tmp_path), examples=2)
    assert (first.reason, first.count, first.examples) == ("corrupt", 5, (("a", "why a"), ("c", "why c")))
    assert (second.reason, second.count, second.meaning) == ("unreadable", 1, Reason.UNREADABLE.doc)
    assert "5 corrupt: " in summary(_folder(tmp_path)) and "first a: why a" in summary(_folder(tmp_path))


def test_a_listing_holds_every_sample_and_obeys_nobody(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.write_bytes(part_name(2), part_bytes([_bad("\x1b[2Jgone\nnext", Reason.CORRUPT)]))
    lines = listing(folder).splitlines()
    assert lines[0] == "a\t0\tcorrupt\twhy a\t1.5" and len(lines) == 7
    assert lines[6].startswith(r"\x1b[2Jgone\nnext") and "\x1b" not in summary(folder)


def test_own_tables_of_other_stages(tmp_path: Path) -> None:
    (tmp_path / "quarantine").mkdir()
    table = pa.table({"id": ["x"], "shard": [3], "reason": ["model_failed"], "message": ["not finite"], "position": [0.0]})
    pyarrow.parquet.write_table(table, tmp_path / "quarantine" / "000003.parquet")
    assert [row["id"] for row in rows(Folder(str(tmp_path)))] == ["x"]


def test_nothing_quarantined(tmp_path: Path) -> None:
    assert rows(Folder(str(tmp_path))) == [] and report(Folder(str(tmp_path))) == []
    folder = Folder(str(tmp_path))
    folder.write_bytes(part_name(0), part_bytes([{"id": "k", "shard": 0, "decision": "kept"}]))
    assert rows(folder) == [] and summary(folder) == ""


def test_every_reason_has_a_line_of_its_own() -> None:
    docs = [reason.doc for reason in Reason]
    assert all(docs) and len(set(docs)) == len(docs)
    assert Reason("corrupt") is Reason.CORRUPT and f"{Reason.CORRUPT}" == "corrupt"
