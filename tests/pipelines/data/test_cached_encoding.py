"""Tokens of cached features: those of the pixels, with the quarantine of what the features are of, and of no other model's or clips'."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kinetok.infra.artifact import Artifact, Counts
from kinetok.infra.errors import ContractError
from kinetok.infra.plan import input_info
from kinetok.infra.stage import Resources, StageContext, StageResult
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.quarantine import summary
from kinetok.pipelines.data.token_shards import TokenShards
from kinetok.pipelines.stages.encode import Encode
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def rungs(tmp_path: Path, finish: Any) -> dict[str, Artifact]:
    """A base and what grows on it, neither trained, both as artifacts of a training."""
    torch.manual_seed(0)
    base = CausalTokenizer(CausalConfig(channels=8, mult=(1, 2), strides=((2, 2),), blocks=1, z=4, patch=2, groups=4))
    models = {"base": base, "grown": GrownTokenizer(GrownConfig(blocks=1, groups=4), base)}
    made = {}
    for name, model in models.items():
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        model.save_pretrained(tmp_path / name / "model")
        made[name] = finish(Folder(str(tmp_path / name)), "train", Counts())
    return made


def encoded(out: Path, inputs: dict[str, Artifact], finish: Any, **fields: Any) -> tuple[StageResult, Artifact]:
    stage = Encode.model_validate({name: name for name in inputs} | {"dtype": "fp32", "max_bad_fraction": 0.5, **fields})
    folder = Folder(str(out))
    ctx = StageContext(out.name, "0" * 16, inputs, folder, Resources(batch_size=3), lambda **_: None, threading.Event())
    result = stage.run(ctx)
    made = finish(folder, "encode", result.counts)
    return result, replace(made, record=made.record.model_copy(update={"inputs": {"data": (input_info(inputs["data"]),)}}))


def test_tokens_of_features_are_those_of_the_clips(rungs: dict[str, Artifact], make_clips: Any, finish: Any, tmp_path: Path) -> None:
    clips = make_clips(5, shard_clips=4, bad=(2,))
    _, features = encoded(tmp_path / "features", {"data": clips, "model": rungs["base"]}, finish, content="features")
    _, pixels = encoded(tmp_path / "pixels", {"data": clips, "model": rungs["grown"]}, finish)
    result, cached = encoded(tmp_path / "cached", {"data": clips, "model": rungs["grown"], "features": features}, finish)
    assert result.counts == Counts(input=10, written=8, quarantined=2)
    assert summary(cached.folder) == summary(pixels.folder)
    read, wanted = TokenShards.open(cached), TokenShards.open(pixels)
    assert read.spec == wanted.spec and read.rows.select(["id", "place", "shard"]) == wanted.rows.select(["id", "place", "shard"])
    for row in range(len(read)):
        torch.testing.assert_close(read.read(row)["tokens"], wanted.read(row)["tokens"], rtol=0, atol=1e-5)
        assert read.about(row) == wanted.about(row)


def test_features_of_another_model_or_of_other_clips_are_refused(
    rungs: dict[str, Artifact], make_clips: Any, finish: Any, tmp_path: Path
) -> None:
    clips = make_clips(2)
    assert len(ClipIndex.open(clips)) == 4
    _, features = encoded(tmp_path / "features", {"data": clips, "model": rungs["grown"]}, finish, content="features")
    with pytest.raises(ContractError, match="not written by this tokenizer"):
        encoded(tmp_path / "other", {"data": clips, "model": rungs["grown"], "features": features}, finish)
    with pytest.raises(ContractError, match="train makes tokens of pixels alone"):
        encoded(tmp_path / "none", {"data": clips, "model": rungs["base"], "features": features}, finish)
    _, features = encoded(tmp_path / "right", {"data": clips, "model": rungs["base"]}, finish, content="features")
    strange = replace(features, record=features.record.model_copy(update={"inputs": {"data": (input_info(rungs["base"]),)}}))
    with pytest.raises(ContractError, match="was not made of"):
        encoded(tmp_path / "strange", {"data": clips, "model": rungs["grown"], "features": strange}, finish)
