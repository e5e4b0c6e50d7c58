"""Captions, groups and splits of tar samples; a part on S3 is the same as one on disk."""

import io
import json
from pathlib import Path

import pytest
from tests.pipelines.data.videos import encode, moving, picture

from kinetok.infra.artifact import MANIFEST
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import read_parts
from kinetok.pipelines.data.clip_parts import MAX_CAPTION, MAX_JSON_BYTES, cut_shard, finish_index, finished_parts, split_of, write_part
from kinetok.pipelines.data.recipe import CutRecipe, IndexRecipe
from kinetok.pipelines.data.sources import SourcePlan, list_source, write_plan
from kinetok.pipelines.data.tars import TarWriter

RECIPE = CutRecipe(fps=8, frames=5, height=16, width=16)
STILL = RECIPE.model_copy(update={"frames": 1})
VIDEO, PICTURE = encode(moving(6), rate=8), picture(moving(1)[0])


def _rows(tmp_path: Path, members: dict[str, bytes], recipe: CutRecipe = RECIPE) -> list[dict[str, object]]:
    file = io.BytesIO()
    writer = TarWriter(file)
    for name, data in members.items():
        writer.add(name, data)
    writer.close()
    (tmp_path / "s.tar").write_bytes(file.getvalue())
    plan = SourcePlan(Folder(str(tmp_path / "plan")))
    write_plan(plan.folder, list_source(f"{tmp_path}/s.tar"))
    out = Folder(str(tmp_path / "out"))
    (shard,) = plan.shards()
    part = cut_shard(shard, plan, recipe, out)
    assert finished_parts(out) == {0: part}
    rows: list[dict[str, object]] = read_parts(out).to_pylist()
    return rows


@pytest.mark.parametrize(
    ("members", "caption", "group"),
    [
        ({}, "", "v"),
        ({"v.txt": b" from text \n"}, "from text", "v"),
        ({"v.json": b'{"caption": "from json", "group": "g"}'}, "from json", "g"),
        ({"v.json": b'{"text": "other name"}'}, "other name", "v"),
        ({"v.json": b'{"caption": "from json"}', "v.txt": b"from text"}, "from text", "v"),
        ({"v.json": b'{"caption": 7, "group": ["x"], "split": "test"}'}, "", "v"),
        ({"v.json": b"not json \xff"}, "", "v"),
        ({"v.json": b"[1]"}, "", "v"),
        ({"v.txt": b"caf\xe9"}, "caf\ufffd", "v"),
        ({"v.txt": b"x" * 100_000}, "x" * MAX_CAPTION, "v"),
        ({"v.json": b'{"caption": "half \\ud800 pair", "group": "\\udfff"}'}, "half   pair", "\\udfff"),
        ({"v.json": b'{"caption": "\\u0000a\\u001b[2J", "group": "g\\u0000"}'}, "a [2J", "g\\x00"),
        ({"v.json": b'{"caption": "huge", "x": "' + b"x" * MAX_JSON_BYTES + b'"}'}, "", "v"),
        ({"v.json": b"[" * 100_000}, "", "v"),
    ],
)
def test_facts_beside_a_video(tmp_path: Path, members: dict[str, bytes], caption: str, group: str) -> None:
    (row,) = _rows(tmp_path, {"v.mp4": VIDEO, **members})
    assert (row["decision"], row["caption"], row["group"], row["id"]) == ("kept", caption, group, "s/v/0")


def test_several_videos_of_one_key(tmp_path: Path) -> None:
    rows = _rows(tmp_path, {"v.left.mp4": VIDEO, "v.right.mp4": VIDEO, "v.txt": b"both"})
    assert [(row["id"], row["caption"], row["group"]) for row in rows] == [("s/v.left/0", "both", "v"), ("s/v.right/0", "both", "v")]


def test_pictures_are_samples_of_one_frame_where_there_is_no_video(tmp_path: Path) -> None:
    rows = _rows(tmp_path, {"a.jpg": PICTURE, "a.txt": b"a cat", "b.png": picture(moving(1, seed=1)[0], "png")}, STILL)
    assert [(row["id"], row["caption"], row["decision"]) for row in rows] == [("s/a/0", "a cat", "kept"), ("s/b/0", "", "kept")]
    assert (rows[0]["start"], rows[0]["end"], rows[0]["width"], rows[0]["height"]) == (0, 1 / 8, 64, 48)


def test_a_picture_beside_a_video_is_none(tmp_path: Path) -> None:
    """Previews were never samples: what jobs make of tars that hold some stays as it was."""
    beside = _rows(tmp_path, {"a.mp4": VIDEO, "a.jpg": PICTURE}, STILL.model_copy(update={"max_clips_per_video": 1}))
    assert [(row["member"], row["decision"]) for row in beside] == [("a.mp4", "kept")]


def test_a_picture_is_no_sample_of_a_window_of_several_frames(tmp_path: Path) -> None:
    (row,) = _rows(tmp_path, {"a.jpg": PICTURE, "a.txt": b"a cat"})
    assert (row["decision"], row["reason"]) == ("filtered", "no_video")


def test_nothing_need_move_in_a_window_of_one_frame(tmp_path: Path) -> None:
    still = _rows(tmp_path, {"a.mp4": encode([moving(1)[0]] * 6, rate=8)}, STILL)
    assert [row["decision"] for row in still] == ["kept"] * 6 and {row["motion"] for row in still} == {0.0}


def test_the_other_filters_judge_pictures(tmp_path: Path) -> None:
    (row,) = _rows(tmp_path, {"a.jpg": picture(moving(1)[0] // 200)}, STILL)
    assert (row["decision"], row["reason"]) == ("filtered", "dark")


def test_split_is_a_stable_share_of_groups() -> None:
    splits = [split_of(f"group {i}", 0.2) for i in range(2000)]
    assert 0.17 < splits.count("val") / 2000 < 0.23
    assert all(split_of(f"group {i}", 0.5) == "val" for i in range(2000) if splits[i] == "val")
    assert {split_of(f"{i}", 0.0) for i in range(100)} == {"train"}


def test_a_split_that_the_source_gives_goes_for_the_group_in_every_part(tmp_path: Path) -> None:
    recipe = IndexRecipe(fps=8, frames=5, height=16, width=16, val_fraction=0.5)
    hashed = {f"g{i}": split_of(f"g{i}", 0.5) for i in range(12)}
    assert set(hashed.values()) == {"train", "val"}
    other = {"train": "val", "val": "train"}
    out, given = Folder(str(tmp_path)), {group: other[split] for group, split in list(hashed.items())[:5]}
    for shard, splits in enumerate((hashed, given)):
        rows = [{"id": f"{shard}/{g}", "shard": shard, "group": g, "split": split, "decision": "kept"} for g, split in splits.items()]
        write_part(shard, rows, out)
    before = finished_parts(out)
    finish_index(out, before.values(), recipe)
    found = read_parts(out).to_pylist()
    assert [row["id"] for row in found] == [*(f"0/{g}" for g in hashed), *(f"1/{g}" for g in given)]
    assert all(row["split"] == (hashed | given)[row["group"]] for row in found)
    after = finished_parts(out)
    assert before[0] != after[0] and before[1] == after[1]
    assert [json.loads(line)["sha256"] for line in out.read_text(MANIFEST).splitlines()] == [after[0]["sha256"], after[1]["sha256"]]
    finish_index(out, after.values(), recipe)
    assert finished_parts(out) == after
