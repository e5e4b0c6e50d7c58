"""The job files that come with kinetok are sound, the sizes of one job differ in numbers, and full sizes are priced without their memory.

The generator's tokenizers are those of the main job, so its artifacts serve both.
"""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from kinetok.infra.artifact import Store
from kinetok.infra.job import Job, load_job
from kinetok.infra.plan import UNKNOWN, plan
from kinetok.infra.stage import Stage
from kinetok.infra.storage import Folder
from kinetok.llm.cost import TrainingCost, dit_parameters, training_cost
from kinetok.llm.divot.heads import GMMConfig
from kinetok.llm.divot.language import PretrainedLanguage
from kinetok.llm.divot.model import DivotLMConfig
from kinetok.llm.divot.presets import DIVOT_1B, DIVOT_7B, PUBLISHED
from kinetok.llm.presets import dit
from kinetok.pipelines import cli
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.data.language_tasks import Answering
from kinetok.pipelines.estimate import ASSUMED_TFLOPS, _made, outline_table, outlines, unrecorded
from kinetok.pipelines.passes import run_cost
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.diffusion import Diffusion
from kinetok.pipelines.stages.encode import Encode
from kinetok.pipelines.stages.ingest import Ingest
from kinetok.pipelines.stages.instructions import Instructions
from kinetok.pipelines.stages.language import Language
from kinetok.pipelines.stages.scenes import Scenes
from kinetok.pipelines.stages.train import Train, config_of
from kinetok.pipelines.stages.vit import Vit
from kinetok.pipelines.stages.write import Write
from kinetok.tokenizers.causal.presets import FULL_4X, FULL_GROWN, SMALL_4X, SMALL_GROWN
from kinetok.tokenizers.divot import presets
from kinetok.tokenizers.divot.released import frame_autoencoder
from kinetok.tokenizers.divot.tokenizer import DivotConfig
from kinetok.tokenizers.divot.training import DivotObjective

JOBS = sorted((Path(__file__).parents[2] / "pipelines" / "jobs").glob("*.yaml"))


def load(name: str) -> Job:
    return load_job(next(path for path in JOBS if path.stem == name), STAGES)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_files_are_sound(path: Path) -> None:
    assert load_job(path, STAGES).name == path.stem


@pytest.mark.parametrize("name", ["divot-7b", "divot-middle", "ladder-full"])
def test_larger_sizes_name_sources_of_the_users_beside_the_job(name: str) -> None:
    """WebVid's tars and questions about them, in a folder that the repository has not; nothing of one machine."""
    sources = {
        each: (stage.source, getattr(stage, "csv", None))
        for each, stage in load(name).stages.items()
        if isinstance(stage, Ingest | Instructions)
    }
    asked = {} if name == "ladder-full" else {"instructions": ("webvid/questions.jsonl", None)}
    assert sources == {"videos": ("webvid/*.tar", None), **asked}


def test_divot_stands_beside_the_main_jobs_ladder() -> None:
    main, divot = load("main").stages, load("divot").stages
    for name in main.keys() - {"quality", "report"}:
        assert divot[name] == main[name], f"{name}: change both job files"
    assert divot["rungs"] == main["quality"]


@pytest.mark.parametrize(
    ("name", "preset", "language"),
    [("divot", presets.SMALL, None), ("divot-middle", presets.MIDDLE, DIVOT_1B), ("divot-7b", presets.FULL, DIVOT_7B)],
)
def test_divot_has_the_numbers_of_its_size(name: str, preset: DivotConfig, language: DivotLMConfig | None) -> None:
    job = load(name).stages
    vit, model = job["vit"], job["language"]
    assert isinstance(vit, Vit) and vit.frames == preset.encoder.frames
    for trained in ("joint", "refined"):
        config = config_of(job[trained], job)
        assert isinstance(config, DivotConfig) and config.vit == vit.vit
        # Which weights a vision transformer of these numbers has is the job's to say.
        assert _without_path(config) == _without_path(preset)
    assert isinstance(model, Language) and model.model is not None
    assert (model.model.clip_tokens, model.model.token_width) == (preset.encoder.tokens, preset.encoder.token_width)
    if language is not None:
        assert isinstance(model.model.language, PretrainedLanguage)
        assert model.model.model_copy(update={"language": PUBLISHED[model.model.language.path]}) == language


def _without_path(config: DivotConfig) -> DivotConfig:
    return config.model_copy(update={"vit": config.vit.model_copy(update={"path": None})})


Wire = tuple[str, str, str]
"""A stage, one of its fields, and what that names: a stage, a kind, a stage of Divot's training, a task, or what its numbers turn on."""


def wires(stages: Mapping[str, Stage]) -> set[Wire]:
    """What makes a job this job and no other, without its numbers."""
    found = {(name, field, str(ref)) for name, stage in stages.items() for field, ref in stage.refs()}
    for name, stage in stages.items():
        found.add((name, "kind", stage.kind))
        if isinstance(stage, Train) and isinstance(stage.objective, DivotObjective):
            found.add((name, "stage", stage.objective.stage))
        if isinstance(stage, Language):
            found |= {
                (name, "task", f"{task.kind} of {stage.tokens[task.source]}, {getattr(task, 'instructed', '')}") for task in stage.tasks
            }
        found |= {(name, "on", what) for what, on in _switches(stage, stages) if on}
    return found


def _switches(stage: Stage, stages: Mapping[str, Stage]) -> Iterator[tuple[str, bool]]:
    """Parts of the method that a number turns on or off: one component is no mixture, a guidance of 1 is none."""
    if isinstance(stage, Language):
        yield "adapters", stage.objective.lora is not None
        yield f"{stage.objective.frozen} frozen", stage.objective.frozen is not None
        yield "one question a sample", any(isinstance(task, Answering) and task.turns == 1 for task in stage.tasks)
        if stage.model is not None:
            assert isinstance(stage.model.head, GMMConfig)
            yield "mixture", stage.model.head.components > 1
            yield stage.model.mechanism, True
    if isinstance(stage, Write):
        yield "several draws", stage.draws > 1
    if isinstance(stage, Train):
        if isinstance(stage.objective, DivotObjective):
            yield "dropped conditions", stage.objective.dropped > 0
        if stage.model is not None and isinstance(config := config_of(stage, stages), DivotConfig):
            yield "guidance", config.sampler.guidance > 1
            yield "steps of sampling", config.sampler.steps > 1
            yield "noise while sampling", config.sampler.eta > 0
            yield f"{config.sampler.spacing} steps", True
            yield "standardised features", config.encoder.standardise
            yield "dropout", config.detokenizer.unet.dropout > 0
            yield "split context", config.detokenizer.unet.split is not None


DRAWN = {
    *(("shapes", "kind", "scenes"), ("films", "kind", "ingest"), ("films", "made_by", "shapes")),
    *(("windows", "videos", "films"), ("stills", "videos", "films"), ("instructions", "scenes", "shapes")),
}
"""The small job draws its source, and knows what is true of it."""
GIVEN = {("windows", "videos", "videos"), ("stills", "videos", "videos"), ("videos", "kind", "ingest")}
JUDGED = {
    *(("judge", "kind", "judge"), ("judge", "scenes", "shapes"), ("judge", "data", "windows"), ("report", "trained", "judge")),
    *(("scores", "judge", "judge"), ("scores", "instructions", "instructions")),
}
"""A classifier of drawn scenes tells what a clip shows; for other clips there is CLIP, which is a path and no stage."""
OWN_BASE = {("base", "kind", "train"), ("base", "data", "clips"), ("report", "trained", "base")}
"""The small job's autoencoder is its ladder's first rung; others name a published one."""
NAMED_BASE = {("base", "kind", "model")}
LANGUAGES = ("language", "reader", "writer", "storyteller")
LEFT_OUT = {
    # Adapters stand beside trained weights; an untrained language model has none to keep.
    *((name, "on", "adapters") for name in LANGUAGES),
    # Tokens of few values: several Gaussians cover them without a look at the text.
    ("language", "on", "mixture"),
    # Its `adapted` ends within the first epoch, which meets the first draw alone.
    ("written", "on", "several draws"),
    # A U-Net of minutes takes away less noise in later steps than they leave, and knows too little without tokens to go away from that.
    *(("unet", "on", what) for what in ("guidance", "steps of sampling", "noise while sampling", "uniform steps")),
    # A choice: no clip is met often enough to be learned by heart.
    ("unet", "on", "dropout"),
}
"""What the small job does without, and why: `jobs/divot.yaml` has the reasons at their places, but for the dropout."""
INSTEAD = {
    # Its steps end at the noise that they begin with.
    ("unet", "on", "trailing steps"),
    # Only the end of a sample is learned as one; a small model would not stop after the first answer.
    ("reader", "on", "one question a sample"),
}
RELEASED = {("unet", "on", "split context")}
"""Only the published U-Net reads its context in two parts."""


def test_divot_is_wired_alike_at_every_size() -> None:
    middle, full = (wires(load(name).stages) for name in ("divot-middle", "divot-7b"))
    assert middle == full - RELEASED
    ladder = {*load("main").stages, "rungs", "ladder"} - {"base", "quality", "report"}
    small = {wire for wire in wires(load("divot").stages) if wire[0] not in ladder}
    assert small - full == DRAWN | JUDGED | OWN_BASE | INSTEAD
    assert full - small == GIVEN | NAMED_BASE | LEFT_OUT | RELEASED


def test_the_small_divot_adapts_for_less_than_an_epoch() -> None:
    """So it writes each clip once: a later epoch would meet other draws."""
    stages = load("divot").stages
    shapes, windows, adapted = stages["shapes"], stages["windows"], stages["adapted"]
    assert isinstance(shapes, Scenes) and isinstance(windows, Clips) and isinstance(adapted, Train)
    assert adapted.steps * adapted.global_batch < shapes.count * (1 - windows.val_fraction)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_the_middle_size_takes_one_to_eight_gpus(gpus: int) -> None:
    path = next(path for path in JOBS if path.stem == "divot-middle")
    job = load_job(path, STAGES, [f"resources.default.workers={gpus}"])
    assert {job.resources[name].workers * job.resources[name].gpus for name in ("vit", "joint", "reader", "adapted")} == {gpus}


def test_the_ladder_is_small_and_full_in_numbers_alone() -> None:
    small, full = load("generate").stages, load("ladder-full").stages
    drawn = {"scenes", "longer", "longer_videos", "videos"}
    both = [{wire for wire in wires(stages) if wire[0] not in drawn} for stages in (small, full)]
    # The small job draws a source for each of the two lengths of clips; the full one cuts both from the user's.
    assert both[0] ^ both[1] == {("long", "videos", "longer_videos"), ("long", "videos", "videos")}
    for stages, base, grown in ((small, SMALL_4X, SMALL_GROWN), (full, FULL_4X, FULL_GROWN)):
        assert [config_of(stages[name], stages) for name in ("base", "grown8", "grown16")] == [base, grown, grown]
    diffusion, tokens = full["diffusion"], full["tokens"]
    assert isinstance(diffusion, Diffusion) and diffusion.model == dit("1b", z=FULL_4X.z, chunk=2)
    assert isinstance(tokens, Encode) and tokens.chunks is not None and tokens.chunks.frames == 17


@pytest.mark.long
def test_the_full_ladder_is_priced_and_so_built_without_memory() -> None:
    """Its 229.3 M and twice 78.4 M, a discriminator, and VGG16's 14.7 M under every rung, of which no weights are asked for."""
    found = _costs(load("ladder-full"), "base", "grown8", "grown16", "diffusion")
    assert found["base"].trained == pytest.approx(234.8e6, rel=1e-3) and found["base"].frozen == pytest.approx(14.7e6, rel=1e-2)
    assert found["grown8"].trained == found["grown16"].trained == pytest.approx(78.4e6, rel=1e-3)
    assert found["grown16"].frozen - found["grown8"].frozen == found["grown8"].trained
    assert found["diffusion"].trained == dit_parameters(dit("1b", z=FULL_4X.z, chunk=2))


@pytest.mark.long
def test_middle_size_divot_is_priced() -> None:
    """278 M of its own; TinyLlama's 1,100.0 M weights with 262 more rows twice, two MLPs, adapters."""
    found = _costs(load("divot-middle"), "joint", "language", "storyteller")
    assert found["joint"].trained == pytest.approx(278.2e6, rel=1e-3)
    assert found["language"].trained + found["language"].frozen == pytest.approx(1215.3e6, rel=1e-4)
    assert found["language"].trained - found["storyteller"].trained == 256 * 2048 + 2048 + 2048 * 2048 + 2048


@pytest.mark.parametrize("name", ["tokens16", "rungs", "latents", "tokens", "quality"])
def test_what_runs_a_tokenizer_in_the_main_job_is_priced(name: str) -> None:
    """Divot's encoder is given its queries as they are."""
    cost = run_cost(load("divot"), name)
    assert cost.parameters > 1e6 and cost.flops > 1e6 and cost.alive > 1e6


@pytest.mark.parametrize(("name", "millions"), [("joint", 1687.4), ("language", 467.3), ("reader", 366.3), ("writer", 449.5)])
def test_full_size_divot_is_built_without_memory(name: str, millions: float, tmp_path: Path) -> None:
    """What the job itself names, on the meta device; how many weights each of its trainings has is that of its published parts."""
    frame_autoencoder(32, (1, 1, 1, 1), 1).save_pretrained(tmp_path)
    path = next(path for path in JOBS if path.stem == "divot-7b")
    job = load_job(path, STAGES, [f"base.where={tmp_path}"])
    build, _ = _made(job.stages[name], job.stages, job.resources[name])  # type: ignore[arg-type]
    with torch.device("meta"):
        made = build()
    weights = [weight for player in made.players.values() for weight in player.parameters() if weight.requires_grad]
    assert all(weight.is_meta for weight in weights)
    assert sum(weight.numel() for weight in weights) == pytest.approx(millions * 1e6, rel=2e-3)


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
    made = _costs(job, "language", "reader", "writer", "storyteller")
    assert [cost.trained + cost.frozen for cost in made.values()] == 4 * [pytest.approx(7446.6e6, rel=1e-4)]
    assert made["language"].trained == pytest.approx(467.3e6, rel=1e-3)
    assert made["language"].trained - made["reader"].trained == pytest.approx(101.0e6, rel=1e-3)
    assert made["language"].trained - made["writer"].trained == pytest.approx(17.8e6, rel=1e-2)
    assert made["storyteller"].trained == made["writer"].trained


def test_the_generator_stands_on_the_main_jobs_ladder() -> None:
    main, generate = load("main").stages, load("generate").stages
    for name in ("scenes", "videos", "clips", "base", "trunk4", "grown8", "trunk8", "grown16", "quality"):
        assert generate[name] == main[name], f"{name}: change both job files"


def _tiny_divot(folder: Path) -> list[str]:
    """Values that leave the job's wiring and resources alone, with numbers of a few thousand weights; the autoencoder is in `folder`."""
    frame_autoencoder(32, (1, 1, 1, 1), 1).save_pretrained(folder)
    small = presets.SMALL.model_dump(mode="json")
    small["detokenizer"]["unet"]["z"] = 4
    language = {"kind": "untrained", "width": 32, "hidden": 48, "depth": 1, "heads": 4, "key_heads": 2}
    changes = {
        "base.where": str(folder),
        "unet.model": small,
        "text.text": {"encoder": "untrained", "max_tokens": 16},
        "vit.vit": small["vit"],
        "vit.frames": presets.SMALL.encoder.frames,
        "windows.frames": presets.SMALL.frames,
        "windows.height": presets.SMALL.edge,
        "windows.width": presets.SMALL.edge,
        "stills.height": presets.SMALL.edge,
        "stills.width": presets.SMALL.edge,
        "language.model": {"language": language, "clip_tokens": 16, "token_width": 32},
    }
    return _overrides(changes)


def _tiny_ladder() -> list[str]:
    base = FULL_4X.model_dump(mode="json") | {"channels": 8, "blocks": 1, "groups": 4}
    generator = {"z": 16, "width": 32, "depth": 1, "heads": 2, "patch": [1, 2], "text_width": 4096, "chunk": 2}
    sides = {f"{clips}.{side}": 32 for clips in ("clips", "long") for side in ("height", "width")}
    grown = {f"{name}.model": {"kind": "grown", "blocks": 1, "groups": 4} for name in ("grown8", "grown16")}
    return _overrides({"base.model": base, "diffusion.model": generator, **grown, **sides})


def _overrides(changes: Mapping[str, object]) -> list[str]:
    return [f"{path}={json.dumps(value)}" for path, value in changes.items()]


@pytest.mark.parametrize("name", ["divot-7b", "divot-middle", "ladder-full"])
def test_larger_sizes_are_planned_and_sized_without_data_or_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sources are not there: the plan says so, and sizes every training nevertheless."""
    monkeypatch.chdir(tmp_path)
    tiny = _tiny_ladder() if name == "ladder-full" else _tiny_divot(tmp_path / "vae")
    words = [word for override in tiny for word in ("--set", override)]
    answer = CliRunner().invoke(cli.main, ["plan", name, "--json", *words])
    assert answer.exit_code == 0, answer.stderr
    steps = {step["name"]: step for step in json.loads(answer.stdout)}
    assert "--set videos.source=... names another" in steps["videos"]["reason"]
    trainings = [each for each, stage in load(name).stages.items() if isinstance(stage, Train | Diffusion | Language)]
    assert {each for each, step in steps.items() if "outline" in step} == set(trainings)
    for each in trainings:
        outline = steps[each]["outline"]
        assert steps[each]["key"] == UNKNOWN and min(outline[part] for part in ("trained", "flops", "gpu_hours", "memory")) > 0, each
        assert outline["gpu_hours"] == pytest.approx(outline["flops"] / (ASSUMED_TFLOPS * 1e12 * 3600))
    if "base" not in trainings:
        assert steps["base"]["key"] != UNKNOWN


def test_a_model_that_is_nowhere_leaves_only_what_stands_on_it_unsized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = next(path for path in JOBS if path.stem == "divot-7b")
    overrides = [
        *_tiny_divot(tmp_path / "vae"),
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
