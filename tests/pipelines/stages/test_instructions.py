"""The `instructions` stage: a user's file, as it is and beside the clips that it is about."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.pipelines.stages.running import run_stage

from kinetok.infra.artifact import Artifact, Counts, Store
from kinetok.infra.errors import ContractError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.instructions import questions_of
from kinetok.pipelines.stages.instructions import Instructions

LINES: list[dict[str, object]] = [
    {"video": "video-000", "question": "Q?", "answer": "a", "options": ["a", "b"]},
    {"video": "video-002", "questions": ["Q?", "R?"], "answers": ["a", "b"]},
    {"video": "000003", "question": "Q?", "answer": "a"},
    {"request": "R", "clips": ["video-000", "000003"], "texts": ["x", "y"]},
]


def made(folder: Path, lines: list[dict[str, object]], clips: Artifact | None) -> Artifact:
    """Of a file of these lines."""
    source = folder / "asked.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields: dict[str, Any] = {"source": str(source)} | ({} if clips is None else {"data": "clips"})
    inputs: dict[str, Any] = {} if clips is None else {"data": clips}
    return run_stage(Store(Folder(str(folder / "store"))), Instructions.model_validate(fields), "asked", inputs)


def test_lines_about_other_videos_are_counted_and_stay(make_clips: Any, tmp_path: Path) -> None:
    compared, alone = (made(tmp_path, LINES, clips) for clips in (make_clips(3), None))
    assert compared.record.metrics == {"questions": 4.0, "stories": 1.0, "unknown_questions": 1.0, "unknown_stories": 1.0}
    assert alone.record.metrics == {"questions": 4.0, "stories": 1.0} and alone.key != compared.key
    assert alone.record.counts == compared.record.counts == Counts(input=4, written=4)
    assert questions_of(compared) == questions_of(alone) and questions_of(alone)["video-000"][0].options == ("a", "b")


def test_names_that_fit_no_clip_are_refused_with_both_namings(make_clips: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ContractError, match="asked names no video that clips holds: it names '000003', clips 'video-000', 'video-001', 'video"
    ):
        made(tmp_path, LINES[2:3], make_clips(3))
