"""`text`: captions become embeddings by clip id, once each; killed attempts and strange captions change nothing."""

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kinetok.infra.artifact import Artifact, Counts, Record, publish
from kinetok.infra.errors import ConfigError, ContractError, DataError
from kinetok.infra.stage import Resources, StageContext, StageResult
from kinetok.infra.storage import Folder
from kinetok.llm.text import TextConfig, TextEncoder
from kinetok.pipelines.data import text_shards
from kinetok.pipelines.data.clip_index import part_name
from kinetok.pipelines.data.ray_tasks import Item
from kinetok.pipelines.data.text_shards import TextShards, open_encoder
from kinetok.pipelines.data.verify import problems
from kinetok.pipelines.stages.text import Text

TEXT = TextConfig(max_tokens=24)
LONG = "a caption of many more bytes than there are tokens"


def run_text(clips: Artifact, out: Path, **fields: Any) -> StageResult:
    stage = Text.model_validate({"data": "clips", "text": TEXT, "dtype": "fp32", **fields})
    resources = Resources(workers=1, cpus=1, batch_size=2)
    ctx = StageContext("text", "0" * 16, {"data": clips}, Folder(str(out)), resources, lambda **_: None, threading.Event())
    return stage.run(ctx)


def finished(out: Path, result: StageResult) -> Artifact:
    record = Record(kind="text", name="text", key="0" * 16, version=1, config={}, digest="", counts=result.counts, started="", seconds=0)
    return publish(Folder(str(out)), record)


def with_captions(clips: Artifact, captions: list[str | None]) -> Artifact:
    """The same clips under other captions."""
    path = clips.folder.local / part_name(0)
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("caption"), "caption", pa.array(captions, pa.string())), path)
    return clips


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actors' work in this process, without Ray."""

    def each(stage: str, open_function: Any, items: list[Item], *, resources: Resources, stop: threading.Event) -> Any:
        return map(open_function(), items) if items else ()

    monkeypatch.setattr(text_shards, "each_on_actors", each)


def test_captions_come_back_by_clip(in_process: None, make_clips: Any, tmp_path: Path) -> None:
    clips = with_captions(make_clips(3, shard_clips=4, val=(2,)), ["a cat", "a dog", "a cat", "", LONG, None])
    made = finished(tmp_path / "out", run_text(clips, tmp_path / "out"))
    assert made.record.counts == Counts(input=6, written=6) and list(problems(made)) == []
    shards, (direct_BLE, mask_BL) = TextShards.open(made), TextEncoder(TEXT).encode(["a cat", "a dog", "a cat", "", LONG, ""])
    for row in range(6):
        text_LE, mask_L = shards.embeddings(row)
        torch.testing.assert_close(text_LE, direct_BLE[row])
        assert torch.equal(mask_L, mask_BL[row])
    assert not shards.embeddings(3)[0].isnan().any() and shards.embeddings(4)[1].all()
    assert list(shards.captions("val")) == [LONG] and list(shards.captions("train")) == ["a cat", "a dog"]


def test_repeated_captions_are_encoded_once_a_shard(in_process: None, make_clips: Any, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[str] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, captions: (seen.extend(captions), encode(self, captions))[1])
    run_text(make_clips(4, windows=3, shard_clips=6), tmp_path / "out")
    assert seen == [f"caption {number}" for number in range(4)]


def test_a_killed_attempt_goes_on_with_the_same_bytes(in_process: None, make_clips: Any, tmp_path: Path) -> None:
    clips = make_clips(6, shard_clips=4)
    run_text(clips, tmp_path / "calm")
    calm, out = Folder(str(tmp_path / "calm")), Folder(str(tmp_path / "out"))
    for name in ("spec.json", "shards/000001.tar", "index/000001.parquet"):
        out.write_bytes(name, calm.read_bytes(name))
    out.write_bytes("shards/000002.tar", b"half")
    kept = (out.local / "shards/000001.tar").stat().st_mtime_ns
    assert run_text(clips, tmp_path / "out").counts == Counts(input=12, written=12)
    assert {name: out.read_bytes(name) for name in out.files()} == {name: calm.read_bytes(name) for name in calm.files()}
    assert (out.local / "shards/000001.tar").stat().st_mtime_ns == kept, "a committed shard was written again"
    with pytest.raises(ContractError, match="shards of another model: text: "):
        run_text(clips, tmp_path / "out", text=TextConfig(max_tokens=30))


def test_embeddings_that_do_not_fit_their_type_are_refused(in_process: None, make_clips: Any, tmp_path: Path, monkeypatch: Any) -> None:
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, captions: tuple(part * 1e6 for part in encode(self, captions)))
    with pytest.raises(DataError, match="'caption 0' are not finite as fp16: store them as bf16"):
        run_text(make_clips(1), tmp_path / "out", dtype="fp16")


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text: .*nowhere"):
        open_encoder(TextConfig(encoder="t5", path=str(tmp_path / "nowhere")))
