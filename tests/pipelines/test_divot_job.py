"""The whole of `jobs/divot.yaml` with few scenes and steps: what its stages hand each other fits, from films to the report."""

from pathlib import Path

import pytest

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.job import load_job
from kinetok.infra.run import run
from kinetok.infra.storage import Folder
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.divot import VideoLM

JOB = Path(__file__).parents[2] / "pipelines" / "jobs" / "divot.yaml"
TRAINED = {
    **{"base": "autoencoder", "grown8": "autoencoder", "grown16": "autoencoder"},
    **dict.fromkeys(("unet", "joint", "refined", "adapted"), "divot"),
    **dict.fromkeys(("language", "reader", "writer", "storyteller"), "divot_lm"),
    "judge": "judge",
}
"""What is optimized in each training."""
FEWER = (
    "scenes.count=8",
    "scenes.real=false",
    "scenes.size=64",
    "shapes.count=24",
    "shapes.shard_videos=8",
    "windows.shard_clips=8",
    "stills.shard_clips=8",
    "unet.model.sampler.steps=2",
    "carried.max_clips=2",
    "answers.questions=4",
    "before.videos=2",
    "generated.videos=2",
    *(f"{stage}.{field}=2" for stage in TRAINED for field in ("steps", "eval_every", "checkpoint_every", "global_batch")),
    *(f"{stage}.eval_batches=1" for stage in TRAINED),
    *(f"resources.{stage}.{field}" for stage in TRAINED for field in ("batch_size=2", "workers=1")),
    *(f"{stage}.optimizers.{player}.warmup=0" for stage, player in TRAINED.items()),
)
SECTIONS = ("The ladder", "What the tokens carry", "Asked and answered", "What generated clips show", "Generated", "Training")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_stage_takes_what_the_one_before_it_made(ray_cluster: None, tmp_path: Path) -> None:
    store = Store(Folder(str(tmp_path)))
    job = load_job(JOB, STAGES, FEWER)
    ended = run(job, store)
    assert ended.succeeded, {name: stage.error for name, stage in ended.stages.items() if stage.error}

    made = {artifact.record.name: artifact for artifact in store.all()}
    assert set(made) == set(job.stages)
    assert _clips(made["written"]) == _clips(made["tokens"]) == _clips(made["latents"]) > 16
    page = made["report"].folder.read_text("report.html")
    assert all(section in page for section in SECTIONS)

    writer, reader, teller = (VideoLM.open(name, store=str(tmp_path)) for name in ("writer", "reader", "storyteller"))
    assert writer.chosen is not None and made["adapted"].key in writer.chosen
    assert writer.generate(["a red disc falls"], seeds=[0]).shape == (1, 3, 9, 64, 64)
    assert writer.generate(["a red disc"], seeds=[0], media="image").shape == (1, 3, 1, 64, 64)
    assert reader.spec.instructed and [len(part) for part in teller.tell("a story", clips=2)] == [2, 2]


def _clips(artifact: Artifact) -> int:
    assert artifact.record.counts is not None
    return artifact.record.counts.written
