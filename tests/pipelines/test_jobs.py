"""The job files that come with kinetok are sound, and the generator's tokenizers are those of the main job, so its artifacts serve both."""

from pathlib import Path

import pytest

from kinetok.infra.job import Job, load_job
from kinetok.llm.cost import TrainingCost, training_cost
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.estimate import _made
from kinetok.pipelines.stages.train import config_of
from kinetok.pipelines.stages.vit import Vit
from kinetok.tokenizers.divot import presets
from kinetok.tokenizers.divot.released import frame_autoencoder

JOBS = sorted((Path(__file__).parents[2] / "pipelines" / "jobs").glob("*.yaml"))


def load(name: str) -> Job:
    return load_job(next(path for path in JOBS if path.stem == name), STAGES)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_files_are_sound(path: Path) -> None:
    assert load_job(path, STAGES).name == path.stem


def test_divot_stands_on_the_main_jobs_base() -> None:
    main, divot = load("main").stages, load("divot").stages
    for name in ("scenes", "videos", "clips", "base"):
        assert divot[name] == main[name], f"{name}: change both job files"


def test_divot_is_small_and_full_in_numbers_alone() -> None:
    small, full = load("divot").stages, load("divot-7b").stages
    for job, preset in ((small, presets.SMALL), (full, presets.FULL)):
        vit = job["vit"]
        assert isinstance(vit, Vit) and vit.vit == preset.vit and vit.frames == preset.encoder.frames
        assert all(config_of(job[name], job) == preset for name in ("joint", "refined"))
    wiring = [{name: list(job[name].refs()) for name in ("latents", "vit", "tokens", "refined", "carried")} for job in (small, full)]
    assert wiring[0] == wiring[1]


@pytest.mark.long
def test_full_size_divot_is_priced_and_so_built_without_memory(tmp_path: Path) -> None:
    frame_autoencoder(32, (1, 1, 1, 1), 1).save_pretrained(tmp_path)
    path = next(path for path in JOBS if path.stem == "divot-7b")
    job = load_job(path, STAGES, [f"base.where={tmp_path}"])
    found = _costs(job, "unet", "joint", "refined")
    # What was counted in the official modules: 171.6 M of the tokenizer, 76.98 M of the Perceiver, 1438.8 M of the U-Net.
    assert found["joint"].trained == pytest.approx(1687.4e6, rel=1e-3) and found["refined"].trained == pytest.approx(1515.8e6, rel=1e-3)
    assert found["unet"].trained > 1438e6 and found["joint"].frozen > 630e6


def _costs(job: Job, *names: str) -> dict[str, TrainingCost]:
    """Of these stages alone: others would ask the hub for their models."""
    return {name: training_cost(*_made(job.stages[name], job.stages, job.resources[name])) for name in names}  # type: ignore[arg-type]


MISTRAL = "{kind: untrained, width: 4096, hidden: 14336, depth: 32, heads: 32, key_heads: 8, vocabulary: 32262, window: 4096}"


@pytest.mark.long
def test_full_size_language_models_are_priced_and_so_built_without_memory() -> None:
    """Mistral-7B in numbers: 7,241.7 M weights and 262 more rows twice, the two MLPs of 118.8 M, adapters of 83.9 M."""
    path = next(path for path in JOBS if path.stem == "divot-7b")
    job = load_job(path, STAGES, [f"language.model.language={MISTRAL}"])
    made = _costs(job, "language", "reader", "writer")
    assert [cost.trained + cost.frozen for cost in made.values()] == 3 * [pytest.approx(7446.6e6, rel=1e-4)]
    assert made["language"].trained == pytest.approx(467.3e6, rel=1e-3)
    assert made["language"].trained - made["reader"].trained == pytest.approx(101.0e6, rel=1e-3)
    assert made["language"].trained - made["writer"].trained == pytest.approx(17.8e6, rel=1e-2)


def test_the_generator_stands_on_the_main_jobs_ladder() -> None:
    main, generate = load("main").stages, load("generate").stages
    for name in ("scenes", "videos", "clips", "base", "trunk4", "grown8", "trunk8", "grown16", "quality"):
        assert generate[name] == main[name], f"{name}: change both job files"
