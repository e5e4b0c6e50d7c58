"""Clips to generated videos in one small job: every artifact verifies, lineage leads from the videos to the clips, seeds decide all."""

import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from tests.pipelines.stages.test_train import Alone

from kinetok.infra.artifact import RECORD, Store
from kinetok.infra.errors import ConfigError, ContractError
from kinetok.infra.fit import SUMMARY, TURN
from kinetok.infra.job import parse_job
from kinetok.infra.lineage import graph
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.registry import holds_model
from kinetok.infra.run import Selection, run
from kinetok.infra.stage import Resources, StageContext
from kinetok.infra.storage import Folder
from kinetok.infra.training import Loop, Work
from kinetok.llm import text as llm_text
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.latent_feed import GENERATOR_FILE, GeneratorSpec
from kinetok.pipelines.data.token_shards import TokenShards
from kinetok.pipelines.data.verify import problems
from kinetok.pipelines.models import open_generator
from kinetok.pipelines.report.tables import Generation
from kinetok.pipelines.stages import diffusion, train
from kinetok.pipelines.stages.generate import Generate

FIT = {"global_batch": 2, "log_every": 1, "eval_every": 2}
CAUSAL = {"kind": "causal", "channels": 8, "mult": [1, 1, 1], "strides": [[2, 2], [2, 2]], "blocks": 1, "z": 4, "groups": 4}
JOB: dict[str, dict[str, Any]] = {
    "scenes": {"kind": "scenes", "count": 6, "size": 32, "seconds": 2.0, "real": False},
    "videos": {"kind": "ingest", "made_by": "scenes"},
    "clips": {"kind": "clips", "videos": "videos", "fps": 8, "frames": 10, "height": 16, "width": 16, "val_fraction": 0.4},
    "base": {"kind": "train", "data": "clips", "model": CAUSAL, "steps": 1, "optimizers": {"autoencoder": {"lr": 1e-3}}, **FIT},
    "tokens": {"kind": "encode", "data": "clips", "model": "base", "chunks": {"frames": 5}},
    "text": {"kind": "text", "data": "clips", "text": {"max_tokens": 16}},
    "diffusion": {
        "kind": "diffusion",
        "latents": "tokens",
        "text": "text",
        "model": {"z": 4, "width": 24, "depth": 1, "heads": 2, "text_width": 64, "chunk": 2},
        "steps": 3,
        "ema": 0.5,
        "optimizers": {"dit": {"lr": 1e-3}},
        **FIT,
    },
    "generated": {
        "kind": "generate",
        "model": "diffusion",
        "tokenizer": "base",
        "text": "text",
        "prompts": ["a red disc", "a blue square"],
        "frames": 13,
        "beyond": True,
        "steps": 2,
    },
}


def fit(build: Any, feed: Any, validation: Any, config: Any, *, out: Folder, resources: Resources, **_: object) -> dict[str, float]:
    """`fit` without the workers of Ray Train."""
    out.write_text(TURN, "mine")
    Loop(Work(build, feed, validation, config, out, resources, "mine"), Alone()).run()
    out.write_text(SUMMARY, "{}")
    return {}


@pytest.fixture(scope="module")
def store(ray_cluster: None, process_group: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The finished job; only `clips`, `encode` and `text` are on Ray."""
    made = Store(Folder(str(tmp_path_factory.mktemp("store"))))
    job = parse_job({"name": "j", "tracking": None, "stages": JOB, "resources": {"default": {"batch_size": 2}}}, STAGES)
    with pytest.MonkeyPatch.context() as patch:
        for stage in (train, diffusion):
            patch.setattr(stage, "fit", fit)
        state = run(job, made, Selection())
    assert state.succeeded, {name: stage.error for name, stage in state.stages.items()}
    yield made


def context(store: Store, out: Path, **inputs: str) -> StageContext:
    """Of one more attempt at a stage of the finished job."""
    found = {field: store.find(name) for field, name in inputs.items()}
    return StageContext("again", "0" * 16, found, Folder(str(out)), Resources(batch_size=2), lambda **_: None, threading.Event())


def generate(store: Store, out: Path, **changes: Any) -> dict[str, bytes]:
    """The files that `generate` writes with changed fields."""
    fields = JOB["generated"] | changes
    ctx = context(store, out, model=fields["model"], tokenizer=fields["tokenizer"], text=fields["text"])
    Generate.model_validate(fields).run(ctx)
    return {name: ctx.out.read_bytes(name) for name in ctx.out.files()}


@pytest.mark.ray
@pytest.mark.slow
def test_every_artifact_verifies_and_leads_back_to_the_clips(store: Store) -> None:
    assert {name: list(problems(store.find(name))) for name in JOB} == {name: [] for name in JOB}
    found = graph(store, store.find("generated"))
    assert {"clips", "text", "encode", "train", "diffusion", "generate"} <= {node.kind for node in found.nodes.values()}


@pytest.mark.ray
@pytest.mark.slow
def test_the_generator_is_a_model_that_knows_its_latents(store: Store) -> None:
    made, tokens = store.find("diffusion"), store.find("tokens")
    assert holds_model(made)
    assert {"train/dit/loss", "val/flow_loss"} <= read_metrics(made.folder)[-1].keys()
    spec = GeneratorSpec.model_validate_json(made.folder.read_bytes(GENERATOR_FILE))
    assert (spec.shape, spec.chunk, spec.plan.frames, spec.latents.chunk_frames) == ((4, 4, 4, 4), 2, 5, 5)
    card = made.folder.read_text("model/README.md")
    assert spec.latents.weights in card and spec.text.weights in card and "| text encoder | untrained: " in card
    assert f"`{tokens.name}-{tokens.key}`, 6 samples" in card and "| `optimizers.dit.lr` | `0.001` |" in card
    shards = TokenShards.open(tokens)
    learned = [row for row, split in enumerate(shards.rows["split"].to_pylist()) if split == "train"]
    assert 0 < len(learned) < len(shards)
    latents = torch.stack([shards.read(row)["tokens"].double() for row in learned])
    torch.testing.assert_close(open_generator(made).mean_Z, latents.mean((0, 2, 3, 4)).float())


@pytest.mark.ray
@pytest.mark.slow
def test_seeds_decide_all_and_videos_have_the_length_asked_for(store: Store, tmp_path: Path) -> None:
    """13 frames are three chunks of 5."""
    made, files = store.find("generated").folder, generate(store, tmp_path / "again")
    assert files == {name: made.read_bytes(name) for name in made.files() if name != RECORD}
    assert files["videos/000.mp4"] != generate(store, tmp_path / "other", seed=1)["videos/000.mp4"]
    about = Generation.model_validate_json(files["prompts.json"])
    assert [video.prompt for video in about.videos] == ["a red disc", "a blue square"] and about.tokens == 6 * 4 * 4
    with av.open(io.BytesIO(files[about.videos[0].file])) as video:
        assert sum(1 for _ in video.decode(video=0)) == 13
    with av.open(io.BytesIO(files["contact.png"])) as sheet:
        (picture,) = sheet.decode(video=0)
    assert (picture.height, picture.width) == (2 * 100, 6 * 100)


@pytest.mark.ray
@pytest.mark.slow
def test_chunks_that_overlap_are_learned_sampled_and_blended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of 10 frames are two chunks of 6 that share 2; 14 frames are three."""
    monkeypatch.setattr(diffusion, "fit", fit)
    more = {
        "over_tokens": JOB["tokens"] | {"chunks": {"frames": 6, "overlap": 2}},
        "over_film": JOB["diffusion"] | {"latents": "over_tokens", "model": JOB["diffusion"]["model"] | {"chunk": 3}, "steps": 1},
        "over": JOB["generated"] | {"model": "over_film", "prompts": ["a red disc"], "frames": 14},
    }
    job = parse_job({"name": "j", "tracking": None, "stages": JOB | more, "resources": {"default": {"batch_size": 2}}}, STAGES)
    state = run(job, store, Selection(only=tuple(more)))
    assert state.succeeded, {name: stage.error for name, stage in state.stages.items()}
    spec = GeneratorSpec.model_validate_json(store.find("over_film").folder.read_bytes(GENERATOR_FILE))
    assert (spec.shape, spec.chunk, spec.plan.frames, spec.plan.overlap) == ((4, 6, 4, 4), 3, 6, 2)
    about = Generation.model_validate_json(store.find("over").folder.read_bytes("prompts.json"))
    assert about.tokens == 3 * 3 * 4 * 4
    with av.open(io.BytesIO(store.find("over").folder.read_bytes(about.videos[0].file))) as video:
        assert sum(1 for _ in video.decode(video=0)) == 14


@pytest.mark.ray
@pytest.mark.slow
def test_captions_of_the_val_split_are_prompts(store: Store, tmp_path: Path) -> None:
    rows = ClipIndex.open(store.find("clips")).rows.to_pylist()
    expected = list(dict.fromkeys(row["caption"] for row in rows if row["split"] == "val"))
    about = Generation.model_validate_json(generate(store, tmp_path / "out", prompts=9, guidance=1)["prompts.json"])
    assert len(expected) > 0 and [video.prompt for video in about.videos] == expected


@pytest.mark.ray
@pytest.mark.slow
def test_what_does_not_belong_together_is_refused(store: Store, tmp_path: Path) -> None:
    wrong = diffusion.Diffusion.model_validate(JOB["diffusion"] | {"model": JOB["diffusion"]["model"] | {"z": 3, "chunk": 4}})
    with pytest.raises(ContractError, match="z is 3, the data have 4; chunk is 4, the data have 2; change `model`"):
        wrong.run(context(store, tmp_path / "a", latents="tokens", text="text"))
    ctx = context(store, tmp_path / "b", model="diffusion", tokenizer="base", text="text")
    text = store.find("text")
    other = Folder(str(tmp_path / "text"))
    other.write_text("spec.json", text.folder.read_text("spec.json").replace('_tokens": 16', '_tokens": 17'))
    ctx.inputs = {**ctx.inputs, "text": replace(text, folder=other)}
    with pytest.raises(ContractError, match=r"diffusion learned from text of untrained .16 tokens.*text is of untrained .17 tokens"):
        Generate.model_validate(JOB["generated"]).run(ctx)


@pytest.mark.ray
@pytest.mark.slow
def test_a_text_encoder_whose_weights_became_others_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_text, "UNTRAINED_SEED", 1)
    with pytest.raises(ContractError, match=r"text: untrained is another encoder now than .*: weights: [0-9a-f]{64}, [0-9a-f]{64} "):
        generate(store, tmp_path / "out")


def told(**changes: dict[str, Any]) -> list[str]:
    """Every problem of the job with some stages changed."""
    stages = {name: {**JOB.get(name, {}), **changes.get(name, {})} for name in JOB | changes}
    try:
        parse_job({"name": "j", "stages": stages, "resources": {"default": {"batch_size": 2}}}, STAGES)
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines()]
    return []


MODEL = JOB["diffusion"]["model"]


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({}, []),
        (
            {"diffusion": {"optimizers": {"autoencoder": {"lr": 1e-3}}}},
            ["stages.diffusion.optimizers: they name autoencoder; the model trains dit"],
        ),
        ({"diffusion": {"global_batch": 3}}, ["stages.diffusion.global_batch: global_batch 3 is not a multiple of"]),
        ({"diffusion": {"model": MODEL | {"text_width": 32}}}, ["stages.diffusion.model.text_width: is 32; the latents and the text"]),
        ({"diffusion": {"model": MODEL | {"z": 8}}}, ["stages.diffusion.model.z: is 8; the latents"]),
        ({"tokens": {"chunks": None}}, ["stages.diffusion.model.chunk: is 2; the latents and the text it learns from make it 4"]),
        ({"tokens": {"chunks": {"frames": 4}}}, ["stages.tokens.chunks: the clips of clips have 10 frames, not so many chunks of 4"]),
        (
            {"tokens": {"content": "features"}},
            ["stages.tokens.chunks: features are of whole clips", "stages.diffusion.latents: tokens holds features"],
        ),
        ({"text": {"data": "others"}, "others": JOB["clips"]}, ["stages.diffusion.text: text is of others, the latents are of clips"]),
        (
            {"generated": {"tokenizer": "other"}, "other": JOB["base"]},
            ["stages.generated.tokenizer: is other; diffusion learned the latents of base"],
        ),
        ({"generated": {"text": "other"}, "other": JOB["text"]}, ["stages.generated.text: is other; diffusion learned from text"]),
        (
            {"generated": {"beyond": False}},
            ["stages.generated.frames: 13 are 3 chunks of 5; diffusion learned from clips of 2, 10 frames: ask for that many at most"],
        ),
        ({"generated": {"beyond": False, "frames": 10}}, []),
    ],
)
def test_what_cannot_work_is_refused_when_the_job_is_read(changes: dict[str, dict[str, Any]], starts: list[str]) -> None:
    found = told(**changes)
    assert len(found) == len(starts) and all(map(str.startswith, found, starts)), found
