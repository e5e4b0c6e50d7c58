"""The job files that come with kinetok are sound, and the generator's tokenizers are those of the main job, so its artifacts serve both."""

from pathlib import Path

import pytest

from kinetok.infra.job import Job, load_job
from kinetok.pipelines.catalog import STAGES

JOBS = sorted((Path(__file__).parents[2] / "pipelines" / "jobs").glob("*.yaml"))


def load(name: str) -> Job:
    return load_job(next(path for path in JOBS if path.stem == name), STAGES)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_files_are_sound(path: Path) -> None:
    assert load_job(path, STAGES).name == path.stem


def test_the_generator_stands_on_the_main_jobs_ladder() -> None:
    main, generate = load("main").stages, load("generate").stages
    for name in ("scenes", "videos", "clips", "base", "trunk4", "grown8", "trunk8", "grown16", "quality"):
        assert generate[name] == main[name], f"{name}: change both job files"
