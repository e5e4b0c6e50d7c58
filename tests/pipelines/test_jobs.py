"""The job files that come with kinetok are sound, and the generator's tokenizers are those of the main job, so its artifacts serve both."""

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from kinetok.infra.artifact import Store
from kinetok.infra.job import Job, load_job
from kinetok.infra.plan import UNKNOWN, plan
from kinetok.infra.storage import Folder
from kinetok.llm.cost import TrainingCost, training_cost
from kinetok.pipelines import cli
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.estimate import ASSUMED_TFLOPS, _made, outline_table, outlines, unrecorded
from kinetok.pipelines.stages.language import Language
from kinetok.pipelines.stages.train import Train, config_of
from kinetok.pipelines.stages.vit import Vit
from kinetok.tokenizers.divot import presets
from kinetok.tokenizers.divot.released import frame_autoencoder

JOBS = sorted((Path(__file__).parents[2] / "pipelines" / "jobs").glob("*.yaml"))


def load(name: str) -> Job:
    return load_job(next(path for path in JOBS if path.stem == name), STAGES)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_files_are_sound(path: Path) -> None:
    assert load_job(path, STAGES).name == path.stem


def test_divot_stands_beside_the_main_jobs_ladder() -> None:
    main, divot = load("main").stages, load("divot").stages
    for name in main.keys() - {"quality", "report"}:
        assert divot[name] == main[name], f"{name}: change both job files"
    assert divot["rungs"] == main["quality"]


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


def _tiny_divot_7b(folder: Path) -> list[str]:
    """Overrides that leave the job's wiring and resources alone, with numbers of a few thousand weights; the autoencoder is in `folder`."""
    frame_autoencoder(32, (1, 1, 1, 1), 1).save_pretrained(folder)
    small = presets.SMALL.model_dump(mode="json")
    small["detokenizer"]["unet"]["z"] = 4
    language = {"kind": "untrained", "width": 32, "hidden": 48, "depth": 1, "heads": 4, "key_heads": 2}
    changes = {
        "base.where": str(folder),
        "unet.model": small,
        "vit.vit": small["vit"],
        "vit.frames": presets.SMALL.encoder.frames,
        "windows.frames": presets.SMALL.frames,
        "windows.height": presets.SMALL.edge,
        "windows.width": presets.SMALL.edge,
        "text.text": {"encoder": "untrained", "max_tokens": 16},
        "language.model": {"language": language, "clip_tokens": 16, "token_width": 32},
    }
    return [f"{path}={json.dumps(value)}" for path, value in changes.items()]


def test_divot_7b_is_planned_and_sized_without_data_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source is not there: the plan says so, and sizes every training nevertheless."""
    monkeypatch.chdir(tmp_path)
    words = [word for override in _tiny_divot_7b(tmp_path / "vae") for word in ("--set", override)]
    answer = CliRunner().invoke(
        cli.main, ["plan", "divot-7b", "--json", *words, "--set", "videos.source=gone/*.tar", "--set", "videos.csv=null"]
    )
    assert answer.exit_code == 0, answer.stderr
    steps = {step["name"]: step for step in json.loads(answer.stdout)}
    assert "--set videos.source=... names another" in steps["videos"]["reason"] and steps["base"]["key"] != UNKNOWN
    trainings = [name for name, stage in load("divot-7b").stages.items() if isinstance(stage, Train | Language)]
    assert len(trainings) == 7 and {name for name, step in steps.items() if "outline" in step} == set(trainings)
    for name in trainings:
        outline = steps[name]["outline"]
        assert steps[name]["key"] == UNKNOWN and min(outline[each] for each in ("trained", "flops", "gpu_hours", "memory")) > 0, name
        assert outline["gpu_hours"] == pytest.approx(outline["flops"] / (ASSUMED_TFLOPS * 1e12 * 3600))


def test_a_model_that_is_nowhere_leaves_only_what_stands_on_it_unsized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = next(path for path in JOBS if path.stem == "divot-7b")
    overrides = [
        *_tiny_divot_7b(tmp_path / "vae"),
        "base.where=somebody/nothing",
        "language.model.language={kind: pretrained, path: some/body}",
    ]
    found = dict(outlines(load_job(path, STAGES, overrides), ["unet", "language"]))
    assert found["unet"] == "unknown: somebody/nothing is not on this machine yet; a run downloads it from the Hugging Face hub"
    assert str(found["language"]).startswith("unknown: some/body is not on this machine yet")
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(outline_table(found.items()))
    shown = console.export_text()
    assert f"at {ASSUMED_TFLOPS:g} TFLOP/s a GPU" in shown and "somebody/nothing" in shown


def test_trainings_on_cpus_are_left_to_estimate() -> None:
    job = load("main")
    assert unrecorded(job, plan(job, Store(Folder("nowhere")), outline=True)) == []
