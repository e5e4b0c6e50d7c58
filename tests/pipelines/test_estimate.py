"""What a job will cost, against the models that it would build; nothing is run."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kinetok.infra.job import Job, parse_job
from kinetok.llm.cost import FLOAT, PassCost, dit_flops, dit_parameters
from kinetok.llm.dit import DiTConfig
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.cli import main
from kinetok.pipelines.estimate import Estimate, estimates, human_count
from kinetok.pipelines.passes import run_cost, run_outlines
from kinetok.tokenizers import catalog
from kinetok.tokenizers.causal.autoencoder import CausalConfig
from kinetok.tokenizers.causal.chunks import ChunkPlan
from kinetok.tokenizers.causal.presets import FULL_4X

FIT = {"steps": 3, "global_batch": 4}
SMALL = {"kind": "causal", "channels": 8, "mult": [1, 1, 1], "strides": [[2, 2], [2, 2]], "blocks": 1, "z": 4, "groups": 4}
AUTOENCODER = {"autoencoder": {"lr": 1e-3}}
DIT = {"z": 4, "width": 24, "depth": 1, "heads": 2, "text_width": 64, "chunk": 3}


def make_job(**base: Any) -> Job:
    clips = {"kind": "clips", "videos": "videos", "fps": 8, "frames": 9, "height": 32, "width": 32}
    stages = {
        "scenes": {"kind": "scenes", "count": 6, "size": 32, "seconds": 2.0},
        "videos": {"kind": "ingest", "made_by": "scenes"},
        "clips": clips,
        "base": {"kind": "train", "data": "clips", "model": SMALL, "optimizers": AUTOENCODER, **FIT} | base,
        "trunk": {"kind": "encode", "data": "clips", "model": "base", "content": "features"},
        "grown": {
            "kind": "train",
            "data": "clips",
            "lower": "base",
            "model": {"kind": "grown", "groups": 4},
            "optimizers": AUTOENCODER,
            **FIT,
        },
        "tokens": {"kind": "encode", "data": "clips", "model": "base"},
        "text": {"kind": "text", "data": "clips", "text": {"max_tokens": 16}},
        "film": {
            "kind": "diffusion",
            "latents": "tokens",
            "text": "text",
            "model": DIT,
            "optimizers": {"dit": {"lr": 1e-3}},
            "ema": 0.9,
            **FIT,
        },
    }
    stages["cached"] = stages["grown"] | {"features": "trunk"}
    return parse_job({"name": "small", "stages": stages, "resources": {"default": {"batch_size": 2}}}, STAGES)


@pytest.fixture(scope="module")
def found() -> dict[str, Estimate]:
    return {each.stage: each for each in estimates(make_job())}


def test_every_training_stage_is_priced(found: dict[str, Estimate]) -> None:
    assert list(found) == ["base", "grown", "film", "cached"]
    parameters = sum(weight.numel() for weight in catalog.build(CausalConfig.model_validate(SMALL)).parameters())
    assert found["base"].cost.trained == found["grown"].cost.frozen == parameters
    assert found["base"].flops == found["base"].cost.flops * 4 * 3


def test_every_stage_that_runs_a_tokenizer_is_priced() -> None:
    job = make_job()
    rows = {name: cost for name, _, cost in run_outlines(job)}
    trunk, tokens = rows["trunk"], rows["tokens"]
    assert isinstance(trunk, PassCost) and isinstance(tokens, PassCost)
    assert trunk.parameters == tokens.parameters and trunk.flops > tokens.flops, "features are of two rates"
    chunked = job.model_copy(
        update={"stages": job.stages | {"tokens": job.stages["tokens"].model_copy(update={"chunks": ChunkPlan(frames=5)})}}
    )
    assert run_cost(chunked, "tokens").alive < tokens.alive


def test_a_generator_is_priced_by_its_closed_forms(found: dict[str, Estimate]) -> None:
    film, config = found["film"], DiTConfig.model_validate(DIT)
    assert film.cost.trained == dit_parameters(config)
    assert film.cost.flops == pytest.approx(dit_flops(config, (3, 8, 8), 16).training, rel=5e-3), "a batch shares its positions"
    assert film.memory.average == 2 * FLOAT * film.cost.trained and film.memory.total > film.memory.activations > 0


def test_cached_features_spare_the_lower_trunk(found: dict[str, Estimate]) -> None:
    assert found["cached"].cost.flops < 0.8 * found["grown"].cost.flops
    assert found["cached"].cost.frozen == found["grown"].cost.frozen


def test_a_discriminator_is_priced_too(found: dict[str, Estimate]) -> None:
    job = make_job(
        objective={"adversarial": {"start": 2, "width": 8, "layers": 2}}, optimizers={**AUTOENCODER, "discriminator": {"lr": 1e-3}}
    )
    base = next(estimates(job))
    assert base.cost.trained > found["base"].cost.trained and base.cost.flops > found["base"].cost.flops


def test_a_job_of_full_size_is_priced_here() -> None:
    job = make_job(model=FULL_4X.model_dump(mode="json") | {"z": 4})
    base = next(estimates(job))
    assert base.cost.trained == pytest.approx(229e6, rel=5e-3)
    assert base.memory.total > 4 * FLOAT * base.cost.trained


def test_commands_print_tables() -> None:
    answer = CliRunner().invoke(main, ["budget", "--no-measure"], env={"COLUMNS": "160"})
    assert answer.exit_code == 0 and "19,200" in answer.output and "170 frames" in answer.output and "2.5 times" in answer.output
    answer = CliRunner().invoke(main, ["budget", "--no-measure", "--height", "100"])
    assert answer.exit_code == 1 and "multiples of 8" in answer.output


def test_the_command_prices_what_it_can_where_a_model_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = make_job()
    stages = {
        name: stage.model_dump(mode="json") for name, stage in job.stages.items() if name in ("scenes", "videos", "clips", "base", "grown")
    }
    stages |= {"wan": {"kind": "model", "where": "somebody/nothing"}, "grown": stages["grown"] | {"lower": "wan"}}
    (tmp_path / "job.yaml").write_text(json.dumps({"name": "small", "stages": stages, "resources": {"default": {"batch_size": 2}}}))
    answer = CliRunner().invoke(main, ["estimate", "job.yaml"], env={"COLUMNS": "400"})
    assert answer.exit_code == 0, answer.output
    rows = {line.split("│")[1].strip(): line for line in answer.output.splitlines() if line.startswith("│")}
    assert "unknown: somebody/nothing is not on this machine yet" in rows["grown"]
    (base,) = (each for each in estimates(job) if each.stage == "base")
    assert human_count(base.flops) in rows["base"]


def test_counts_for_people() -> None:
    assert [human_count(count) for count in (0, 999, 1_234_000, 5.04e13, 2e21)] == ["0", "999", "1.23 M", "50.4 T", "2 Z"]
