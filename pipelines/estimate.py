"""What the stages of a job that train will compute and hold, before it is launched, and the token budget of a generator, as tables; and the
models of a job without memory for their weights.

Every model of the job is built without memory for its weights, so a job of full size is priced on a laptop, and nothing is downloaded
for it: the models of the Hugging Face hub that the job files here name are built by their published numbers (`AUTOENCODERS`, and
`PUBLISHED` in `kinetok.llm.divot.presets`), others must be on this machine; LPIPS has one architecture, whatever weights a job names.
Not covered: stages that run frozen models (`passes.py`), what communication and kernels take on top (`kinetok.llm.cost`), the speed of a
machine but for one assumed rate (`ASSUMED_TFLOPS`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from kinetok.infra.errors import ConfigError, StoreError
from kinetok.infra.plan import human_bytes, human_seconds
from kinetok.pipelines.data.language_tasks import Generation, Storytelling
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.diffusion import Diffusion
from kinetok.pipelines.stages.encode import Encode
from kinetok.pipelines.stages.language import Language
from kinetok.pipelines.stages.language_model import LanguageModel
from kinetok.pipelines.stages.model import Model
from kinetok.pipelines.stages.text import Text
from kinetok.pipelines.stages.train import Train
from kinetok.pipelines.stages.write import Write
from kinetok.tokenizers.causal.training import ReconstructionObjective
from kinetok.tokenizers.divot.tokenizer import DivotConfig
from kinetok.tokenizers.divot.training import DivotObjective
from kinetok.tokenizers.divot.unet_training import UNetObjective

if TYPE_CHECKING:
    from kinetok.infra.job import Job
    from kinetok.infra.plan import Step
    from kinetok.infra.stage import Resources, Stage
    from kinetok.llm.budget import Row
    from kinetok.llm.cost import Memory, Trained, TrainingCost
    from kinetok.llm.divot.model import DivotLMConfig
    from kinetok.llm.presets import SizeName
    from kinetok.tokenizers.base import Batch, Tokenizer

Stages = Mapping[str, "Stage"]
ASSUMED_TFLOPS = 120.0
"""What a GPU is taken to sustain in training, in TFLOP/s, where no run was recorded: about 40 % of the bf16 peak of an A100."""
AUTOENCODERS = ("stable-diffusion-v1-5/stable-diffusion-v1-5",)
"""Repositories of the hub whose autoencoder is Stable Diffusion's."""
CAPTION = 64
"""Ids of the text beside the clips of a language model's sample."""


@dataclass(frozen=True)
class Estimate:
    """One training stage."""

    stage: str
    cost: "TrainingCost"
    memory: "Memory"
    """Of one worker."""
    samples: int
    """Of one step, over all workers."""
    steps: int
    gpus: float
    """Of all workers."""

    @property
    def gpu_hours(self) -> float:
        """At the rate that is assumed."""
        return self.flops / (ASSUMED_TFLOPS * 1e12) / 3600

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return self.cost.flops * self.samples * self.steps


def trainings(job: "Job") -> list[str]:
    """The training stages of the job, in the order that it runs them."""
    return [name for name in job.order() if isinstance(job.stages[name], Train | Diffusion | Language)]


def estimates(job: "Job") -> Iterator[Estimate]:
    """Every training stage of the job. Raises as `estimate`."""
    return (estimate(job, name) for name in trainings(job))


def estimate(job: "Job", name: str) -> Estimate:
    """One training stage of the job. Raises StoreError or ConfigError where a model named from outside is not on this machine."""
    from kinetok.llm.cost import training_cost

    stage, resources = job.stages[name], job.resources[name]
    assert isinstance(stage, Train | Diffusion | Language)
    cost = training_cost(*_made(stage, job.stages, resources), bf16=stage.precision == "bf16")
    memory = cost.memory(ema=stage.ema is not None, zero=resources.zero, workers=resources.workers)
    return Estimate(name, cost, memory, stage.global_batch, stage.steps, resources.workers * resources.gpus)


def unrecorded(job: "Job", steps: "Iterable[Step]") -> list[str]:
    """The training stages on GPUs that a plan would build and knows nothing of: no record of their kind is in the store."""
    trainings = (step for step in steps if isinstance(step.stage, Train | Diffusion | Language))
    return [step.name for step in trainings if step.artifact is None and step.estimate.seconds is None and job.resources[step.name].gpus]


def outlines(job: "Job", names: Iterable[str]) -> Iterator[tuple[str, Estimate | str]]:
    """Each stage with its estimate, or with why it has none."""
    for name in names:
        try:
            yield name, estimate(job, name)
        except (ConfigError, StoreError) as error:
            yield name, f"unknown: {error}"


def outline_table(found: Iterable[tuple[str, Estimate | str]]) -> Table:
    """What training on GPUs takes by the architectures alone, for a plan without records."""
    assumed = f"without a record to go by: from the architectures, at {ASSUMED_TFLOPS:g} TFLOP/s a GPU; memory of one worker"
    table = Table(header_style="bold", expand=False, caption=assumed, caption_justify="left")
    table.add_column("training stage")
    for column in ("trained", "frozen", "FLOPs", "GPU hours", "time", "memory"):
        table.add_column(column, justify="right")
    for name, each in found:
        if isinstance(each, str):
            table.add_row(name, escape(each))
            continue
        hours = f"{each.gpu_hours:,.0f}" if each.gpu_hours >= 10 else f"{each.gpu_hours:.2g}"
        counts = (human_count(each.cost.trained), human_count(each.cost.frozen), human_count(each.flops))
        table.add_row(name, *counts, hours, human_seconds(each.gpu_hours / each.gpus * 3600), human_bytes(each.memory.total))
    return table


def outline_json(each: Estimate | str) -> dict[str, float | str]:
    """An outline as plain data."""
    if isinstance(each, str):
        return {"unknown": each.removeprefix("unknown: ")}
    counts = {"trained": each.cost.trained, "frozen": each.cost.frozen, "flops": each.flops, "memory": each.memory.total}
    return {**counts, "gpu_hours": each.gpu_hours, "assumed_tflops": ASSUMED_TFLOPS}


def estimate_table(found: Iterable[tuple[str, Estimate | str]]) -> Table:
    """One row a stage, or why it has no figures; memory is of one worker."""
    table = Table(
        header_style="bold", expand=False, caption="memory of one worker; kernels' workspaces come on top", caption_justify="left"
    )
    table.add_column("stage")
    for column in (
        "trained",
        "frozen",
        "FLOPs/sample",
        "FLOPs/step",
        "FLOPs",
        "weights",
        "gradients",
        "AdamW",
        "EMA",
        "activations",
        "memory",
    ):
        table.add_column(column, justify="right")
    for name, each in found:
        if isinstance(each, str):
            table.add_row(name, escape(each))
            continue
        cost, memory = each.cost, each.memory
        counts = (cost.trained, cost.frozen, cost.flops, cost.flops * each.samples, each.flops)
        held = (memory.weights + memory.frozen, memory.gradients, memory.optimizer, memory.average, memory.activations, memory.total)
        table.add_row(name, *map(human_count, counts), *map(human_bytes, held))
    return table


def budget_rows(size: "SizeName", *, frames: int, height: int, width: int, measured: bool) -> "list[Row]":
    """`kinetok.llm.budget.budget`, with a ConfigError where the pixels are no whole tokens."""
    from kinetok.llm.budget import budget

    try:
        return budget(size, frames=frames, height=height, width=width, measured=measured)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def budget_table(rows: "list[Row]") -> Table:
    """One row a rate; the step's time and memory are those measured here, where they were."""
    table = Table(header_style="bold", expand=False)
    for column in ("rate", "latents", "tokens", "FLOPs forward", "FLOPs step", "step", "memory", "on", "longest in equal tokens"):
        table.add_column(column, justify="right")
    for row in rows:
        step = row.measured
        seen = ("", "", "") if step is None else (human_seconds(step.seconds), human_bytes(step.memory), step.device)
        counts = (str(row.latents), f"{row.tokens:,}", human_count(row.flops.forward), human_count(row.flops.training))
        table.add_row(f"{row.rate}x", *counts, *seen, f"{row.longest} frames")
    return table


def human_count(count: float) -> str:
    """`1.5 G`."""
    for unit in ("", " k", " M", " G", " T", " P", " E"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} Z"


def _made(stage: Train | Diffusion | Language, stages: Stages, resources: "Resources") -> "tuple[Callable[[], Trained], Batch]":
    """How a stage's trainable is made, and one micro-batch of it."""
    if isinstance(stage, Train):
        return _tokenizer_training(stage, stages, resources)
    return _generator(stage, stages, resources) if isinstance(stage, Diffusion) else _language(stage, stages, resources)


def _language(stage: Language, stages: Stages, resources: "Resources") -> "tuple[Callable[[], Trained], Batch]":
    """How a language model's trainable is made, and one micro-batch of its longest task. ConfigError where its model is not there."""
    import torch

    from kinetok.llm.divot.collate import collate
    from kinetok.llm.divot.language import outline_language
    from kinetok.llm.divot.model import DivotLM
    from kinetok.llm.divot.sequences import depict, describe, narrate
    from kinetok.llm.divot.training import DivotLMTrainable
    from kinetok.llm.divot.vocabulary import Vocabulary

    config, vocabulary = language_of(stage, stages), Vocabulary.of_bytes()
    room = config.clip_tokens + 2
    samples = []
    for task in stage.tasks:
        most = min(getattr(task, "clips", 1), max(1, (task.limit - CAPTION - 4) // room))
        clips_CND = torch.zeros(most, config.clip_tokens, config.token_width)
        if isinstance(task, Storytelling):
            parts = [("x" * CAPTION, clips_CND[:1])] * task.clips
            samples.append(narrate(vocabulary, "x" * CAPTION, parts, limit=task.limit, reread=task.reread))
        elif isinstance(task, Generation):
            samples.append(depict(vocabulary, "x" * CAPTION, clips_CND, limit=task.limit))
        else:
            samples.append(describe(vocabulary, clips_CND, "x" * CAPTION, limit=task.limit))
    batch = collate([max(samples, key=len)] * resources.batch_size, list(range(resources.batch_size)))

    def build() -> DivotLMTrainable:
        try:
            return DivotLMTrainable(DivotLM(config, *outline_language(config.language)), stage.objective, checkpointing=resources.recompute)
        except OSError as error:
            raise ConfigError(f"{config.language}: {error}") from error

    return build, batch


def language_of(stage: "Stage", stages: Stages) -> "DivotLMConfig":
    """Numbers of the language model that a stage trains, goes on with, or brings in; ConfigError where the job does not tell."""
    from kinetok.llm.divot.language import PretrainedLanguage
    from kinetok.llm.divot.presets import PUBLISHED
    from kinetok.pipelines.models import is_hub_id, on_machine

    while isinstance(stage, Language) and stage.start is not None:
        stage = stages[stage.start]
    if not isinstance(stage, Language) or stage.model is None:
        raise ConfigError("the language model was trained elsewhere; what it costs is not known before it is in the store")
    language = stage.model.language
    if isinstance(language, PretrainedLanguage) and language.path in PUBLISHED and is_hub_id(language.path):
        return stage.model.model_copy(update={"language": PUBLISHED[language.path]})
    if isinstance(language, PretrainedLanguage) and not on_machine(language.path):
        raise ConfigError(f"{language.path} is not on this machine yet; a run downloads it from the Hugging Face hub")
    return stage.model


def _tokenizer_training(stage: Train, stages: Stages, resources: "Resources") -> "tuple[Callable[[], Trained], Batch]":
    """How a tokenizer's trainable is made, and one micro-batch of what it is trained from."""
    from kinetok.tokenizers import catalog
    from kinetok.tokenizers.causal.perceptual import Lpips
    from kinetok.tokenizers.causal.rung import Rung
    from kinetok.tokenizers.causal.training import RungTrainable

    objective = stage.objective
    divot = isinstance(objective, DivotObjective | UNetObjective)

    def build() -> "Trained":
        model = _build(stage, stages)
        if isinstance(model, Rung) and isinstance(objective, ReconstructionObjective):
            return RungTrainable(model, objective, Lpips().requires_grad_(False))
        return catalog.trainable(model, objective)

    return build, _cached(stage, stages, resources) if divot else _clips(stage, stages, resources)


def _cached(stage: Train, stages: Stages, resources: "Resources") -> "Batch":
    """Latents, and features or tokens, of one micro-batch of Divot; what makes them on the fly is not priced."""
    import torch

    from kinetok.tokenizers.divot import schedule
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

    # Its table is made once and kept, so it must not be made of tensors without numbers.
    schedule.signal_and_noise(torch.zeros(1, dtype=torch.long))
    samples = resources.batch_size
    with torch.device("meta"):
        model = _build(stage, stages)
        assert isinstance(model, DivotTokenizer)
        config, (steps, rows, columns) = model.config, model.latent_size
        batch = {"latent_BTZhw": torch.empty(samples, steps, config.detokenizer.unet.z, rows, columns)}
        if stage.text is not None:
            text = stages[stage.text]
            assert isinstance(text, Text)
            batch |= {"text_BLE": torch.empty(samples, text.text.max_tokens, config.detokenizer.unet.context)}
        if stage.tokens is not None:
            return batch | {"token_BND": torch.empty(samples, config.encoder.tokens, config.encoder.token_width)}
        return batch | {"vit_BTND": torch.empty(samples, config.encoder.frames, config.vit.patches, config.vit.width)}


def _clips(stage: Train, stages: Stages, resources: "Resources") -> "Batch":
    """The pixels of one micro-batch, with the cached features of the lower model."""
    import torch

    from kinetok.pipelines.models import growable

    clips = stages[stage.data]
    assert isinstance(clips, Clips)
    shape = (resources.batch_size, clips.frames, clips.height, clips.width, 3)
    batch = {"video_BTHWC": torch.empty(shape, dtype=torch.uint8, device="meta")}
    if stage.features is not None and stage.lower is not None:
        with torch.device("meta"), torch.no_grad():
            features = growable(tokenizer_of(stage.lower, stages)).growth_features(torch.empty(shape[0], 3, *shape[1:4]))
        batch |= {"full_BDthw": features.full_BDthw, "key_BDthw": features.key_BDthw}
    return batch


def _generator(stage: Diffusion, stages: Stages, resources: "Resources") -> "tuple[Callable[[], Trained], Batch]":
    """How a generator's trainable is made, and one micro-batch of latents and text."""
    import torch

    from kinetok.llm.dit import VideoDiT
    from kinetok.llm.training import DiTTrainable

    encode, text, samples = stages[stage.latents], stages[stage.text], resources.batch_size
    assert isinstance(encode, Encode) and isinstance(text, Text)
    clips = clips_of(encode, stages)
    chunks = len(encode.chunks.spans(clips.frames)) if encode.chunks else 1
    _, steps, rows, columns = latent_shape(encode, stages)
    with torch.device("meta"):
        batch = {
            "latent_BZthw": torch.empty(samples, stage.model.z, steps * chunks, rows, columns),
            "text_BLE": torch.empty(samples, text.text.max_tokens, stage.model.text_width),
            "text_mask_BL": torch.empty(samples, text.text.max_tokens, dtype=torch.bool),
        }
    return lambda: DiTTrainable(VideoDiT(stage.model), stage.objective), batch


def clips_of(stage: "Stage", stages: Stages) -> Clips:
    """The clips that a stage's samples are, or whose tokens it writes."""
    while not isinstance(stage, Clips):
        if isinstance(stage, Write):
            stage = stages[stage.model]
        elif isinstance(stage, Language):
            stage = stages[stage.tokens[0]]
        elif isinstance(stage, LanguageModel):
            stage = stages[stage.tokens]
        else:
            assert isinstance(stage, Encode)
            stage = stages[stage.data]
    return stage


def latent_shape(encode: Encode, stages: Stages) -> tuple[int, ...]:
    """Of the tokens of one clip, or of its first chunk, without the batch."""
    import torch

    clips = clips_of(encode, stages)
    frames = len(encode.chunks.spans(clips.frames)[0]) if encode.chunks else clips.frames
    with torch.device("meta"):
        return tuple(tokenizer_of(encode.model, stages).encode(torch.empty(1, 3, frames, clips.height, clips.width)).values.shape[1:])


def tokenizer_of(name: str, stages: Stages) -> "Tokenizer":
    """The tokenizer that a stage trains or brings in, on the meta device."""
    from kinetok.pipelines.models import is_hub_id, load
    from kinetok.tokenizers.divot.released import frame_autoencoder

    stage = stages[name]
    if isinstance(stage, Model):
        known = stage.where in AUTOENCODERS and is_hub_id(stage.where)
        return frame_autoencoder() if known else load(stage.where, download=False).to("meta")
    assert isinstance(stage, Train)
    return _build(stage, stages)


def _build(stage: Train, stages: Stages) -> "Tokenizer":
    """The model that a stage trains; a vision transformer by its numbers, wherever its weights are."""
    from kinetok.tokenizers import catalog

    if stage.model is None:
        assert stage.start is not None, "a job with neither is refused"
        return tokenizer_of(stage.start, stages)
    config = stage.model
    if isinstance(config, DivotConfig):
        config = config.model_copy(update={"vit": config.vit.model_copy(update={"path": None})})
    return catalog.build(config, tokenizer_of(stage.lower, stages) if stage.lower is not None else None)
