"""verify: a sound artifact has no problems; each kind of damage is found and its file named, also when every digest was forged to match."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from kinetok.infra.artifact import MANIFEST, Artifact, Counts
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.token_shards import BadSample, Sample, write_shard
from kinetok.pipelines.data.verify import problems

Finish = Callable[[Folder, str, Counts], Artifact]


def sample(name: str, place: int) -> Sample:
    return Sample(place, save({"tokens": np.full(3, place, np.float32)}), {"id": name, "split": "train"})


def encoded(folder: Folder, finish: Finish, ids: tuple[str, ...] = ("a", "b", "c"), counts: Counts | None = None) -> Artifact:
    lines = write_shard(folder, 0, [sample(ids[0], 0), sample(ids[1], 2)], [BadSample("bad", "corrupt", "cut", 1.0)])
    lines += write_shard(folder, 1, [sample(ids[2], 0)], [])
    folder.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for line in lines))
    return finish(folder, "encode", counts or Counts(input=4, written=3, quarantined=1))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "encode"))


def test_a_sound_artifact_has_no_problems(folder: Folder, finish: Finish) -> None:
    assert list(problems(encoded(folder, finish))) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_shard_is_named(folder: Folder, finish: Finish, damage: str) -> None:
    artifact = encoded(folder, finish)
    path = folder.local / "shards" / "000000.tar"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[150] ^= 0xFF
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    found = list(problems(artifact))
    assert found and all(sentence.startswith("shards/000000.tar") for sentence in found)


def test_lost_and_doubled_samples_are_found_though_all_digests_match(folder: Folder, finish: Finish) -> None:
    doubled = list(problems(encoded(folder / "x", finish, ids=("a", "b", "a"))))
    assert len(doubled) == 1 and "'a'" in doubled[0]
    lost = list(problems(encoded(folder / "y", finish, counts=Counts(input=5, written=4, quarantined=1))))
    assert lost == ["the parts add up to 4 input, the record says 5", "the parts add up to 3 written, the record says 4"]


def test_an_index_of_another_shard_is_found(folder: Folder, finish: Finish) -> None:
    write_shard(folder / "other", 0, [sample("x", 0), sample("y", 1)], [])
    artifact = encoded(folder, finish)
    folder.write_bytes("index/000000.parquet", (folder / "other").read_bytes("index/000000.parquet"))
    assert any("not the 2 of its index" in sentence for sentence in problems(artifact))


def test_statistics_that_are_not_those_of_the_latents_are_found(folder: Folder, finish: Finish) -> None:
    tokens = save({"tokens": np.ones((1, 1, 2, 2), np.float32)})
    (tar, index) = write_shard(folder, 0, [Sample(0, tokens, {"id": "a", "split": "train"})], [])
    for numbers, found in ((4, []), (5, ["shards/000000.tar: the sums of its latents are not those of the manifest"])):
        tar["moments"] = tar["train_moments"] = {"numbers": numbers, "sums": [4.0], "squares": [4.0]}
        folder.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for line in (tar, index)))
        assert list(problems(finish(folder, "encode", Counts(input=1, written=1)))) == found


def test_a_missing_shard_number_is_named(folder: Folder, finish: Finish) -> None:
    lines = write_shard(folder, 1, [sample("a", 0)], [])
    folder.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for line in lines))
    assert list(problems(finish(folder, "encode", Counts(input=1, written=1)))) == ["shards/000000.tar: missing"]


def test_a_clip_index_is_counted_again(make_clips: Any, finish: Finish) -> None:
    clips = make_clips(3)
    part = clips.folder.read_bytes("index/000000.parquet")
    rows = pq.read_table(io.BytesIO(part)).num_rows
    folder = Folder(f"{clips.folder}-again")
    folder.write_bytes("index/000000.parquet", part)
    line = {"path": "index/000000.parquet", "bytes": len(part), "sha256": clips.record.files["index/000000.parquet"].sha256}
    folder.write_text(MANIFEST, json.dumps({**line, "count": rows}) + "\n")
    assert list(problems(finish(folder, "clips", Counts(input=rows, written=rows)))) == []
    wrong = finish(folder, "clips", Counts(input=rows, written=rows - 1, filtered=1))
    assert list(problems(wrong)) == [
        "the parts add up to 6 written, the record says 5",
        "the parts add up to 0 filtered, the record says 1",
    ]
    folder.write_bytes("index/000000.parquet", part[:100])
    assert all("index/000000.parquet" in sentence or "add up" in sentence for sentence in problems(wrong))
