"""`train`: a base model on real workers, then a grown one on it in this process, with features cached or computed (contract 5)."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from kinetok.infra.artifact import Artifact, Counts
from kinetok.infra.errors import ConfigError, ContractError
from kinetok.infra.fit import SUMMARY, TURN
from kinetok.infra.job import parse_job
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.plan import input_info
from kinetok.infra.stage import Resources, StageContext, StageResult
from kinetok.infra.storage import Folder
from kinetok.infra.training import Loop, Work
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.token_shards import SPEC_FILE, Sample, write_shard
from kinetok.pipelines.models import load, open_model
from kinetok.pipelines.stages import train
from kinetok.pipelines.stages.train import Train

BASE: dict[str, Any] = {
    "data": "clips",
    "model": {"kind": "causal", "channels": 8, "mult": [1, 1, 1], "strides": [[2, 2], [2, 2]], "blocks": 1, "z": 4, "groups": 4},
    "steps": 4,
    "global_batch": 4,
    "optimizers": {"autoencoder": {"lr": 1e-3}},
    "ema": 0.9,
    "log_every": 1,
}
GROWN = BASE | {"lower": "base", "model": {"kind": "grown", "blocks": 1, "groups": 4}}
CLIPS = {"kind": "clips", "videos": "videos", "fps": 8, "frames": 5, "height": 16, "width": 16}
WITH_CLIPS = ("base", "trunk", "grown", "quality")
Finish = Callable[[Folder, str, Counts], Artifact]


class Alone:
    """The `Session` of a run in this process that never checkpoints."""

    rank, local_rank, world, device = 0, 0, 1, torch.device("cpu")

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        yield None

    def report(self, step: int, folder: Path) -> None:
        raise NotImplementedError

    def preempted(self) -> bool:
        return False


@pytest.fixture
def in_process(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` without Ray."""

    def fit(build: Any, feed: Any, validation: Any, config: Any, *, out: Folder, resources: Resources, **_: object) -> dict[str, float]:
        out.write_text(TURN, "mine")
        Loop(Work(build, feed, validation, config, out, resources, "mine"), Alone()).run()
        out.write_text(SUMMARY, "{}")
        return {name: value for name, value in read_metrics(out)[-1].items() if name.startswith("val/")}

    monkeypatch.setattr(train, "fit", fit)


def run(fields: dict[str, Any], out: Folder, **inputs: Artifact) -> StageResult:
    stage = Train.model_validate(fields)
    ctx = StageContext("stage", "0" * 16, inputs, out, Resources(batch_size=2, cpus=1), lambda **_: None, threading.Event())
    return stage.run(ctx)


def untrained(out: Folder, finish: Finish) -> Artifact:
    """A base model as `train` leaves it, without the training."""
    torch.manual_seed(0)
    stage = Train.model_validate(BASE)
    train.build_trainable(train.Source(stage.model, None, None), stage.objective).export(out.local / "model")
    return finish(out, "train", Counts())


def cached(clips: Artifact, base: Artifact, finish: Finish) -> Artifact:
    """Features of every clip, as `encode` would store them in float32."""
    index, out, model = ClipIndex.open(clips), Folder(f"{clips.folder}-features"), open_model(base.folder / "model")
    changes = {"content": "features", "recipe": index.recipe, "channels": model.feature_channels}
    out.write_text(SPEC_FILE, model.spec().model_copy(update=changes).model_dump_json())
    for shard, rows in enumerate(index.shards):
        samples = []
        for place, row in enumerate(rows):
            video = torch.from_numpy(index.read_clip(int(row))).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            with torch.no_grad():
                rates = model.growth_features(video)
            tensors = {"full": rates.full_BDthw[0].contiguous(), "key": rates.key_BDthw[0].contiguous()}
            samples.append(Sample(place, save(tensors), {"id": index.rows["id"][int(row)].as_py(), "split": "train"}))
        write_shard(out, shard, samples, [])
    made = finish(out, "encode", Counts())
    return replace(made, record=made.record.model_copy(update={"inputs": {"data": (input_info(clips),)}}))


@pytest.mark.ray
@pytest.mark.slow
def test_a_base_model_trains_on_real_workers(ray_cluster: None, make_clips: Any, tmp_path: Path) -> None:
    out = Folder(str(tmp_path / "out"))
    result = run(BASE, out, data=make_clips(6, val=(1, 4)))
    assert set(result.metrics) >= {"train/autoencoder/loss", "train/l1", "val/psnr", "val/l1", "train/samples_per_second"}
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4]
    assert load(out.local / "model").spec().temporal == 4
    assert out.exists("training.json")


def test_cached_features_give_the_same_losses(in_process: None, make_clips: Any, finish: Finish, tmp_path: Path) -> None:
    clips, base = make_clips(6, val=(1, 4)), untrained(Folder(str(tmp_path / "base")), finish)
    features = cached(clips, base, finish)
    one, other = Folder(str(tmp_path / "one")), Folder(str(tmp_path / "other"))
    run(GROWN, one, data=clips, lower=base)
    run(GROWN | {"features": "trunk"}, other, data=clips, lower=base, features=features)
    for mine, theirs in zip(read_metrics(one), read_metrics(other), strict=True):
        for name in ("train/autoencoder/loss", "train/l1", "train/kl"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)
    assert read_metrics(one)[-1]["val/psnr"] == pytest.approx(read_metrics(other)[-1]["val/psnr"], rel=1e-5)
    frozen = load_file(other.local / "model" / "lower" / "model.safetensors")
    torch.testing.assert_close(frozen, load_file(base.folder.local / "model" / "model.safetensors"), rtol=0, atol=0)


def test_clips_without_a_val_split_train_without_evaluation(in_process: None, make_clips: Any, tmp_path: Path) -> None:
    out = Folder(str(tmp_path / "out"))
    run(BASE | {"steps": 1}, out, data=make_clips(4))
    (line,) = read_metrics(out)
    assert "train/l1" in line and not [name for name in line if name.startswith("val/")]
    assert out.exists("model/config.json")


def test_a_run_says_what_its_loss_lacks_and_its_figures_reach_the_card(in_process: None, make_clips: Any, tmp_path: Path) -> None:
    out = Folder(str(tmp_path / "out"))
    metrics = run(BASE | {"steps": 1}, out, data=make_clips(4, val=(1,))).metrics
    assert json.loads(out.read_text(SUMMARY))["notes"] == ["trains without LPIPS: objective.perceptual names no weights"]
    card = out.read_text("model/README.md")
    assert f"| psnr | {metrics['val/psnr']:.6g} |" in card and "| `kl` | `1e-06` |" in card


def test_the_card_says_what_the_weights_were_fitted_to_and_how(in_process: None, make_clips: Any, tmp_path: Path) -> None:
    out, clips = Folder(str(tmp_path / "out")), make_clips(4)
    run(BASE | {"steps": 1}, out, data=clips)
    section = out.read_text("model/README.md").split("## How it was trained")[1]
    assert f"| data | `{clips.name}-{clips.key}`" in section
    index = ClipIndex.open(clips)
    assert f"| a clip | {index.frames} frames of {index.height} x {index.width} pixels at {index.fps:g} frames per second |" in section
    rows = {"steps": 1, "global_batch": 4, "ema": 0.9, "optimizers.autoencoder.lr": 0.001, "optimizers.autoencoder.eps": 1e-08}
    assert [name for name, value in rows.items() if f"| `{name}` | `{value}` |" not in section] == []


def test_perceptual_weights_that_are_not_there_end_the_run_before_workers_start(make_clips: Any, tmp_path: Path) -> None:
    fields = BASE | {"objective": {"perceptual": {"weights": str(tmp_path / "vgg.pth")}}}
    with pytest.raises(ConfigError, match=r"objective: .*vgg\.pth is no file here"):
        run(fields, Folder(str(tmp_path / "out")), data=make_clips(4))


def test_features_of_another_model_or_other_clips_are_refused(make_clips: Any, finish: Finish, tmp_path: Path) -> None:
    clips, base = make_clips(3, val=(1,)), untrained(Folder(str(tmp_path / "base")), finish)
    features = cached(clips, base, finish)
    with pytest.raises(ConfigError, match="name it as lower"):
        run(BASE | {"features": "trunk"}, Folder(str(tmp_path / "out")), data=clips, features=features)
    changed = replace(clips, record=clips.record.model_copy(update={"digest": "1" * 64}))
    with pytest.raises(ContractError, match="encode was not made of clips-0000000000000000 as it is now"):
        run(GROWN | {"features": "trunk"}, Folder(str(tmp_path / "out")), data=changed, lower=base, features=features)
    spec = features.folder.read_text(SPEC_FILE)
    features.folder.write_text(SPEC_FILE, spec.replace(open_model(base.folder / "model").spec().weights, "0" * 64))
    with pytest.raises(ContractError, match="weights"):
        run(GROWN | {"features": "trunk"}, Folder(str(tmp_path / "out")), data=clips, lower=base, features=features)


def test_how_the_clips_are_fed_and_fitted_is_the_identity_and_resources_are_not() -> None:
    literals = Train.model_validate(BASE).literals()
    assert {"steps", "global_batch", "optimizers", "seed", "model", "objective", "ema", "precision"} <= set(literals)
    assert not set(literals) & set(Resources.model_fields)


def told(base: dict[str, Any], grown: dict[str, Any], clips: dict[str, Any], resources: dict[str, Any]) -> list[str]:
    """Every problem of a job with a base model and one grown on it."""
    stages = {
        "videos": {"kind": "ingest", "source": "a.tar"},
        "clips": CLIPS | clips,
        "base": BASE | {"kind": "train"} | base,
        "trunk": {"kind": "encode", "data": "clips", "model": "base", "content": "features"},
        "grown": GROWN | {"kind": "train", "features": "trunk"} | grown,
        "quality": {"kind": "evaluate", "data": "clips", "models": ["base", "grown"]},
    }
    try:
        parse_job({"name": "j", "stages": stages, "resources": resources}, STAGES)
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({}, []),
        ({"resources": {"base": {"workers": 3}}}, ["stages.base.global_batch: global_batch 4 is not a multiple of"]),
        (
            {"base": {"optimizers": {"encoder": {"lr": 1e-3}}}},
            ["stages.base.optimizers: they name encoder; the model trains autoencoder"],
        ),
        (
            {"base": {"objective": {"adversarial": {"start": 5}}}},
            [
                "stages.base.optimizers: they name autoencoder; the model trains autoencoder, discriminator",
                "stages.base.objective.adversarial.start: the discriminator would start at step 5, after the last, 4",
            ],
        ),
        (
            {
                "base": {"objective": {"adversarial": {"start": 4}}, "optimizers": {"autoencoder": {"lr": 1}, "discriminator": {"lr": 1}}},
                "resources": {"base": {"zero": 3}},
            },
            ["stages.base.objective.adversarial: its weight is found by a backward pass of its own"],
        ),
        ({"grown": {"lower": None, "features": None}}, ["stages.grown.lower: is missing; a grown model"]),
        ({"grown": {"lower": None}}, ["stages.grown.lower: is missing", "stages.grown.features: they are of a lower model"]),
        (
            {"grown": {"model": BASE["model"]}},
            ["stages.grown.lower: a causal model stands on its own", "stages.grown.features: a causal model is not trained from features"],
        ),
        (
            {"clips": {"width": 18}},
            [f"stages.{name}.data: clips has clips of 16 x 18 pixels; the model needs multiples of 4" for name in WITH_CLIPS],
        ),
    ],
)
def test_what_cannot_train_is_refused_when_the_job_is_read(changes: dict[str, dict[str, Any]], starts: list[str]) -> None:
    found = told(**{"base": {}, "grown": {}, "clips": {}, "resources": {}, **changes})
    assert len(found) == len(starts) and all(map(str.startswith, found, starts)), found


def test_objectives_name_what_they_train() -> None:
    stage = Train.model_validate(BASE)
    assert tuple(train.build_trainable(train.Source(stage.model, None, None), stage.objective).players) == stage.objective.players
