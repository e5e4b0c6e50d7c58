"""encode: what comes out is what the model says, whatever was killed on the way."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load
from tests.tokenizers.causal.test_tiling import LargestConvolution

from kinetok.infra.artifact import RECORD, Artifact, Counts, Record
from kinetok.infra.errors import ContractError, DataError, QuarantineLimit, StoreError
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.decode_task import decode_unit
from kinetok.pipelines.data.retry import reopen
from kinetok.pipelines.data.token_shards import TokenShards
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer

SCRIPT = Path(__file__).with_name("tiny.py")
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def contents(folder: Path) -> dict[str, bytes]:
    """What readers of `folder` see: a worker that outlived its driver may die in the middle of a temporary file, at any time."""
    return {name: (folder / name).read_bytes() for name in Folder(str(folder)).files()}


def opened_artifact(folder: Path) -> Artifact:
    record = Record(kind="encode", name="tokens", key="0" * 16, version=1, config={}, digest="", started="", seconds=0)
    return Artifact(Folder(str(folder)), record)


def opened(folder: Path) -> TokenShards:
    return TokenShards.open(opened_artifact(folder))


def test_tokens_are_what_the_model_says_of_the_clips(tiny: ModuleType, make_clips: Any, tmp_path: Path) -> None:
    clips = make_clips(5, windows=3, shard_clips=4, bad=(2,))
    result = tiny.run_encode(clips, tmp_path / "out")
    assert result.counts == Counts(input=15, written=12, quarantined=3)
    assert set(result.metrics) == {"clips_per_second", "decode_clips_per_second_per_core", "model_clips_per_second_per_actor"}
    index, shards = ClipIndex.open(clips), opened(tmp_path / "out")
    assert shards.spec.recipe == index.recipe and shards.spec.content == "tokens" and shards.spec.dtype == "float32"
    model = tiny.Tiny().eval()
    for row, clip in enumerate(index.rows["id"].to_pylist()):
        if clip.startswith("video-002"):
            assert clip not in shards.rows["id"].to_pylist()
            continue
        video_BCTHW = torch.from_numpy(index.read_clip(row)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.inference_mode():
            torch.testing.assert_close(shards.get(clip)["tokens"], model.encode(video_BCTHW).values[0])


def test_features_are_stored_in_the_type_asked_for(tiny: ModuleType, make_clips: Any, tmp_path: Path) -> None:
    clips = make_clips(2)
    tiny.run_encode(clips, tmp_path / "out", content="features", dtype="bf16")
    shards = opened(tmp_path / "out")
    sample = shards.read(0)
    assert shards.spec.channels == 6 and shards.spec.dtype == "bfloat16"
    assert {name: tensor.dtype for name, tensor in sample.items()} == {"full": torch.bfloat16, "key": torch.bfloat16}


def test_decoding_is_not_fused_into_the_model_actors(tiny: ModuleType, make_clips: Any) -> None:
    from kinetok.pipelines.data.decode_task import cut_units
    from kinetok.pipelines.data.encoding import Encoding, plan

    index = ClipIndex.open(make_clips(4))
    resources = Resources(workers=1, cpus=1, decoders=1, batch_size=2)
    encoding = Encoding(tiny.Tiny, "tokens", "fp32", index.recipe, resources, stage="small")
    dataset = plan(index, cut_units(index, 0, 2), encoding)
    assert [bundle.num_rows() for bundle in dataset.iter_internal_ref_bundles()] == [2, 2]
    ran = re.findall(r"Operator \d+ (\S.*?): \d", dataset.stats())
    assert ran == ["FromItems", "MapBatches(small: decode_unit)", "MapBatches(small: Encoder)"]


def deadly(driver: int, marker: Path) -> Callable[..., pa.Table]:
    """`decode_unit`, but the first worker that is asked dies."""

    def call(unit: pa.Table, **options: Any) -> pa.Table:
        if os.getpid() != driver and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return decode_unit(unit, **options)

    return call


def test_killing_an_actor_or_a_decode_task_changes_nothing(
    tiny: ModuleType, make_clips: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import cloudpickle

    from kinetok.pipelines.data import encoding

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    clips = make_clips(6, windows=2, shard_clips=3)
    tiny.run_encode(clips, tmp_path / "calm")
    tiny.run_encode(clips, tmp_path / "actor", fault=tiny.Fault(tmp_path / "passes", at=2))
    assert len(list((tmp_path / "passes").iterdir())) > 6, "the actor was not killed"
    monkeypatch.setattr(encoding, "decode_unit", deadly(os.getpid(), tmp_path / "killed"))
    tiny.run_encode(clips, tmp_path / "decoder")
    assert (tmp_path / "killed").exists()
    calm = contents(tmp_path / "calm")
    assert contents(tmp_path / "actor") == calm
    assert contents(tmp_path / "decoder") == calm


def test_a_killed_driver_loses_nothing(tiny: ModuleType, make_clips: Any, tmp_path: Path) -> None:
    clips = make_clips(12, windows=2, shard_clips=4)
    tiny.run_encode(clips, tmp_path / "calm")
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(clips.folder), str(out)]
    assert subprocess.run(command, check=False, env={**os.environ, "RAY_ADDRESS": ""}).returncode == -signal.SIGKILL
    committed = {name: data for name, data in contents(out).items() if name.startswith("index/") and name.endswith(".parquet")}
    assert 0 < len(committed) < 6 and not (out / "manifest.jsonl").exists()
    times = {name: (out / name).stat().st_mtime_ns for name in committed}
    (out / "shards" / "000005.tar").write_bytes(b"half a shard")
    result = tiny.run_encode(clips, out)
    assert result.counts == Counts(input=24, written=24)
    assert contents(out) == contents(tmp_path / "calm")
    assert times == {name: (out / name).stat().st_mtime_ns for name in committed}, "committed shards were written again"


def test_shards_opened_again_are_encoded_alone(tiny: ModuleType, make_clips: Any, tmp_path: Path) -> None:
    clips, out = make_clips(6, windows=2, shard_clips=4, bad=(2,)), tmp_path / "out"
    tiny.run_encode(clips, out)
    before, times = contents(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    (out / RECORD).touch()
    assert reopen(opened_artifact(out)) == 1 and not (out / RECORD).exists()
    tiny.run_encode(clips, out)
    assert contents(out) == before
    assert [path.name for path, time in times.items() if path.stat().st_mtime_ns != time] == ["000001.tar"]


def test_too_many_bad_clips_fail_the_stage_with_their_reasons(tiny: ModuleType, make_clips: Any, tmp_path: Path) -> None:
    clips = make_clips(4, bad=(1, 2))
    with pytest.raises(QuarantineLimit, match=r"(?s)of 8 clips could not be encoded.*unreadable"):
        tiny.run_encode(clips, tmp_path / "out", bad=0.3)


def test_no_clip_that_could_be_encoded_fails_whatever_the_limit(tiny: ModuleType, make_clips: Any, tmp_path: Path) -> None:
    clips = make_clips(2, bad=(0, 1))
    with pytest.raises(DataError, match=r"(?s)none of 4 clips could be encoded; repair the source\n.*4 unreadable"):
        tiny.run_encode(clips, tmp_path / "out", bad=1.0)


def test_a_source_that_is_gone_and_a_store_that_refuses_are_named(tiny: ModuleType, make_clips: Any, tmp_path: Path) -> None:
    clips = make_clips(2)
    (tmp_path / "full" / "shards" / "000000.tar").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"^cannot write \S*/full/shards/000000\.tar"):
        tiny.run_encode(clips, tmp_path / "full")
    (tmp_path / "source.tar").unlink()
    with pytest.raises(DataError, match=r"^the source of shard 0 cannot be read: .*source\.tar"):
        tiny.run_encode(clips, tmp_path / "out")


def test_an_attempt_with_another_model_is_refused(tiny: ModuleType, make_clips: Any, tmp_path: Path) -> None:
    clips = make_clips(2)
    tiny.run_encode(clips, tmp_path / "out")
    with pytest.raises(ContractError, match="dtype: float32, float16"):
        tiny.run_encode(clips, tmp_path / "out", dtype="fp16")


@pytest.mark.parametrize("content", ["tokens", "features"])
def test_tiles_change_what_a_convolution_yields_at_a_time_and_nothing_else(content: Any, make_clips: Any) -> None:
    """To the rounding of the type that numbers are stored in."""
    from kinetok.pipelines.data.encoding import Encoder, Encoding

    torch.manual_seed(0)
    model = CausalTokenizer(CausalConfig(channels=8, mult=(1, 1), strides=((2, 2),), blocks=1, z=4, groups=4))
    index, found, largest = ClipIndex.open(make_clips(1)), [], []
    for tile in (None, 3):
        encoder = Encoder(Encoding(lambda: model, content, "fp32", index.recipe, Resources(batch_size=1, tile=tile)))
        with LargestConvolution() as seen:
            found.append(load(encoder.encode(index.read_clip(0)[None])[0]))
        largest.append(seen.positions)
    assert largest[0] > 9 >= largest[1]
    assert all(torch.allclose(whole, found[1][name], atol=1e-5) for name, whole in found[0].items())


def test_not_finite_output_is_quarantined(tiny: ModuleType, make_clips: Any, tmp_path: Path) -> None:
    class Broken(tiny.Tiny):  # type: ignore[misc,name-defined]
        def encode(self, video_BCTHW: torch.Tensor) -> Any:
            tokens = super().encode(video_BCTHW)
            tokens.values[0] = torch.nan
            return tokens

    from kinetok.pipelines.data.encoding import Encoder, Encoding

    index = ClipIndex.open(make_clips(1))
    encoder = Encoder(Encoding(Broken, "tokens", "fp32", index.recipe, Resources(batch_size=2)))
    bad, good = encoder.encode(np.stack([index.read_clip(0), index.read_clip(1)]))
    assert bad.reason == "model_failed" and isinstance(good, bytes)
