"""What the stages of a job that run frozen models will compute and hold, before it is launched, as a table.

Each `_work` does on tensors without numbers what its stage does with a micro-batch, and says which part of it is repeated: one step of a
sampler stands for all, one id of an answer for as many as may be said. Not covered: trainings (`estimate.py`), networks that only measure
(CLIP, I3D, LPIPS, the judge of drawn scenes), whose architecture is known once their weights are there or that are too small to matter.

Legend: B samples, C T H W pixels, N tokens, D token width, Z latent channels, L positions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from kinetok.infra.errors import ConfigError, StoreError
from kinetok.infra.plan import human_bytes
from kinetok.infra.stage import Resources, Stage
from kinetok.pipelines.estimate import CAPTION, Stages, clips_of, human_count, language_of, latent_shape, tokenizer_of
from kinetok.pipelines.stages.decode import Decode
from kinetok.pipelines.stages.diffusion import Diffusion
from kinetok.pipelines.stages.encode import Encode
from kinetok.pipelines.stages.evaluate import Evaluate
from kinetok.pipelines.stages.generate import Generate
from kinetok.pipelines.stages.judge import Judge
from kinetok.pipelines.stages.language import Language
from kinetok.pipelines.stages.reconstruct import Reconstruct
from kinetok.pipelines.stages.score import Score
from kinetok.pipelines.stages.text import Text
from kinetok.pipelines.stages.understand import Understand
from kinetok.pipelines.stages.vit import Vit
from kinetok.pipelines.stages.write import Write
from kinetok.tokenizers.causal.chunks import ChunkPlan
from kinetok.tokenizers.divot.ddim import SamplerConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kinetok.infra.job import Job
    from kinetok.llm.cost import PassCost
    from kinetok.llm.divot.generation import Stream
    from kinetok.llm.divot.model import DivotLM
    from kinetok.llm.text import TextConfig
    from kinetok.tokenizers.base import Tokenizer
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

PRICED = (Encode, Evaluate, Text, Vit, Generate, Decode, Write, Understand, Reconstruct)
UNPRICED = (Judge, Score)
"""What has networks too, and is not priced."""
MEASURING = ("lpips", "clip", "i3d")
"""Fields of stages that name networks which measure."""


@dataclass(frozen=True)
class Work:
    """What a worker does with one micro-batch; see `kinetok.llm.cost.pass_cost`."""

    build: "Callable[[], Sequence[nn.Module]]"
    run: Callable[..., Iterator[int]]
    half: bool = True
    """Whether `resources.dtype` is its arithmetic."""


def passes(job: "Job") -> list[str]:
    """The stages of the job that only run models, in the order that it runs them."""
    return [name for name in job.order() if isinstance(job.stages[name], PRICED)]


def run_cost(job: "Job", name: str) -> "PassCost":
    """One such stage, or the dearest model of one `evaluate`. Raises StoreError or ConfigError where a model is not on this machine."""
    from kinetok.llm.cost import pass_cost
    from kinetok.pipelines.data.token_shards import DTYPES

    resources = job.resources[name]
    costs = []
    for work in _works(job.stages[name], job.stages, resources):
        dtype = DTYPES[resources.dtype if work.half else "fp32"]
        costs.append(pass_cost(work.build, work.run, resources.batch_size, dtype=dtype))
    return max(costs, key=lambda found: found.memory)


def run_outlines(job: "Job") -> "Iterator[tuple[str, int, PassCost | str]]":
    """Each stage of `passes` with its micro-batch and its cost, or with why that is not known."""
    for name in passes(job):
        try:
            yield name, job.resources[name].batch_size, run_cost(job, name)
        except (ConfigError, StoreError) as error:
            yield name, job.resources[name].batch_size, f"unknown: {error}"


def run_table(job: "Job", found: "Iterable[tuple[str, int, PassCost | str]]") -> Table:
    """One row a stage, or why it has no figures; memory is of one worker."""
    table = Table(header_style="bold", expand=False, caption=" ".join(_caption(job)), caption_justify="left")
    table.add_column("stage")
    for column in ("parameters", "FLOPs/sample", "at once", "weights", "tensors alive", "memory"):
        table.add_column(column, justify="right")
    for name, batch, cost in found:
        if isinstance(cost, str):
            table.add_row(name, escape(cost))
            continue
        held = (cost.memory - cost.alive, cost.alive, cost.memory)
        table.add_row(name, human_count(cost.parameters), human_count(cost.flops), str(batch), *map(human_bytes, held))
    return table


def _caption(job: "Job") -> Iterator[str]:
    """What has to be known of the figures of this job."""
    yield "stages that run models: memory of one worker at its most; workspaces of kernels come on top, of convolutions less with `tile`."
    kinds = {type(job.stages[name]) for name in passes(job)}
    if kinds & {Write, Understand}:
        yield f"Texts have {CAPTION} ids where nothing says how many."
    if Understand in kinds:
        yield "A question has all clips and the longest answer that it may have; one answer is scored, each further option is one more."
    left = [name for name in job.order() if isinstance(job.stages[name], UNPRICED)]
    left += [network for network in MEASURING if any(getattr(stage, network, None) for stage in job.stages.values())]
    if left:
        yield f"Not priced, for they are small or in files of others: networks of {', '.join(left)}."


@singledispatch
def _works(stage: Stage, stages: Stages, resources: Resources) -> "Sequence[Work]":
    """What is done with one micro-batch; of several, the dearest counts."""
    raise NotImplementedError(stage.kind)


@_works.register
def _encode(stage: Encode, stages: Stages, resources: Resources) -> Sequence[Work]:
    from kinetok.pipelines.models import growable
    from kinetok.tokenizers.causal.chunks import encode_chunks

    video_shape = _video(stage, stages, resources)
    cached = None if stage.features is None else _features(stages[stage.features], stages, video_shape)

    def run(model: "Tokenizer") -> Iterator[int]:
        video_BCTHW = _empty(*video_shape)
        if cached is not None:
            model.encode_features({name: _empty(*shape) for name, shape in cached.items()}, video_BCTHW.shape[2])
        elif stage.content == "features":
            growable(model).growth_features(video_BCTHW)
        else:
            encode_chunks(model, video_BCTHW, stage.chunks or ChunkPlan(frames=video_BCTHW.shape[2]))
        yield 1

    return [Work(_tokenizer(stage.model, stages), run)]


@_works.register
def _evaluate(stage: Evaluate, stages: Stages, resources: Resources) -> Sequence[Work]:
    from kinetok.tokenizers.base import Tokens

    video_shape = _video(stages[stage.data], stages, resources)

    def run(model: "Tokenizer") -> Iterator[int]:
        tokens = model.encode(_empty(*video_shape))
        model.decode(Tokens(tokens.values, tokens.frames))
        yield 1

    return [Work(_tokenizer(name, stages), run) for name in stage.models]


@_works.register
def _text(stage: Text, stages: Stages, resources: Resources) -> Sequence[Work]:
    def run(encoder: "nn.Module") -> Iterator[int]:
        _embed(encoder, stage.text, resources.batch_size)
        yield 1

    return [Work(lambda: [_text_encoder(stage.text)], run, half=False)]


@_works.register
def _vit(stage: Vit, stages: Stages, resources: Resources) -> Sequence[Work]:
    from kinetok.tokenizers.divot.vit import ClipFeatures, FrozenViT

    video_shape = _video(stages[stage.data], stages, resources)
    numbers = stage.vit.model_copy(update={"path": None})

    def run(model: ClipFeatures) -> Iterator[int]:
        model.encode(_empty(*video_shape))
        yield 1

    return [Work(lambda: [ClipFeatures(FrozenViT.load(numbers), stage.frames)], run)]


@_works.register
def _generate(stage: Generate, stages: Stages, resources: Resources) -> Sequence[Work]:
    from kinetok.llm.dit import VideoDiT
    from kinetok.llm.flow import guided
    from kinetok.tokenizers.base import Tokens
    from kinetok.tokenizers.causal.chunks import decode_chunks

    model, text = stages[stage.model], stages[stage.text]
    assert isinstance(model, Diffusion) and isinstance(text, Text)
    encode, samples = stages[model.latents], resources.batch_size
    assert isinstance(encode, Encode)
    plan = encode.chunks or ChunkPlan(frames=clips_of(encode, stages).frames)
    chunks, (_, steps, rows, columns) = len(plan.spans(stage.frames)), latent_shape(encode, stages)

    def build() -> "Sequence[nn.Module]":
        return _text_encoder(text.text), VideoDiT(model.model), tokenizer_of(stage.tokenizer, stages)

    def run(encoder: "nn.Module", dit: VideoDiT, tokenizer: "Tokenizer") -> Iterator[int]:
        import torch

        text_BLE = _embed(encoder, text.text, samples)
        mask_BL = torch.ones(text_BLE.shape[:2], dtype=torch.bool)
        yield 1
        x_BZthw = _empty(samples, model.model.z, chunks * steps, rows, columns)
        guided(dit, x_BZthw, torch.ones(samples), text_BLE, mask_BL, stage.guidance)
        yield stage.steps
        parts = [Tokens(part, plan.frames) for part in torch.split(x_BZthw, steps, dim=2)]
        decode_chunks(tokenizer, parts, plan)
        yield 1

    return [Work(build, run)]


@_works.register
def _decode(stage: Decode, stages: Stages, resources: Resources) -> Sequence[Work]:
    from kinetok.tokenizers.base import Tokens
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

    samples, frames = resources.batch_size, clips_of(stages[stage.tokens], stages).frames
    encode = stages[stage.tokens]
    shape = latent_shape(encode, stages) if isinstance(encode, Encode) else None

    def run(model: "Tokenizer") -> Iterator[int]:
        if isinstance(model, DivotTokenizer):
            yield from sampled(model, _empty(samples, *_tokens_of(model, frames)), stage.sampler or model.config.sampler)
            return
        assert shape is not None, "a language model writes tokens of Divot alone"
        model.decode(Tokens(_empty(samples, *shape), frames))
        yield 1

    return [Work(_tokenizer(stage.tokenizer, stages), run)]


@_works.register
def _reconstruct(stage: Reconstruct, stages: Stages, resources: Resources) -> Sequence[Work]:
    from kinetok.pipelines.report.carried import CONDITIONS
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
    from kinetok.tokenizers.divot.training import EVALUATION_STEPS

    video_shape = _video(stages[stage.data], stages, resources)

    def run(model: "Tokenizer") -> Iterator[int]:
        import torch

        if not isinstance(model, DivotTokenizer):
            raise ConfigError(f"model: {stage.model} is no Divot tokenizer")
        video_BCTHW = _empty(*video_shape)
        token_BND = model.encode(video_BCTHW).values
        model.null_tokens()
        latent = model.lower.encode(model.windows(video_BCTHW))
        model.lower.decode(latent)
        yield 1
        for times in sampled(model, token_BND, stage.sampler or model.config.sampler):
            yield times * len(CONDITIONS)
        windows_BND = torch.unflatten(token_BND, 1, (-1, model.config.encoder.tokens)).flatten(0, 1)
        model.detokenizer(latent.values, torch.zeros(len(windows_BND), dtype=torch.long), windows_BND)
        yield len(CONDITIONS) * len(EVALUATION_STEPS)

    return [Work(_tokenizer(stage.model, stages), run)]


@_works.register
def _write(stage: Write, stages: Stages, resources: Resources) -> Sequence[Work]:
    from kinetok.llm.divot.generation import Stream
    from kinetok.llm.divot.sequences import ask_clip

    language = stages[stage.model]
    if language_of(language, stages).mechanism == "autoregressive":
        raise ConfigError("what a model that makes clips token by token takes is not priced")
    instructed = _instructed(language, stages)

    def run(model: "DivotLM") -> Iterator[int]:
        prompts = [ask_clip(model.vocabulary, "x" * CAPTION, instructed=instructed)] * resources.batch_size
        stream = Stream(model, prompts)
        condition_BNP = stream.ask_clip("video")
        yield 1
        stream.draw(condition_BNP, range(resources.batch_size), stage.variance_scale)
        yield stage.draws

    return [Work(lambda: [_language(language, stages)], run)]


@_works.register
def _understand(stage: Understand, stages: Stages, resources: Resources) -> Sequence[Work]:
    import torch

    from kinetok.llm.divot.collate import collate
    from kinetok.llm.divot.generation import Stream
    from kinetok.llm.divot.sequences import answer, ask, describe
    from kinetok.llm.divot.vocabulary import Vocabulary

    language, samples, said = stages[stage.model], resources.batch_size, stage.decoding.max_tokens
    config, instructed, text = language_of(language, stages), _instructed(language, stages), "x" * CAPTION
    clips_CND, vocabulary = torch.zeros(stage.clips, config.clip_tokens, config.token_width), Vocabulary.of_bytes()
    if instructed:
        scored = answer(vocabulary, clips_CND, [(text, text)], limit=1 << 20)
    else:
        scored = describe(vocabulary, clips_CND, text, limit=1 << 20)
    batch = collate([scored], [0])

    def run(model: "DivotLM") -> Iterator[int]:
        # Asked twice: with the question's own clips, and with another video's.
        stream = Stream(model, [ask(vocabulary, clips_CND, text, instructed=instructed)] * samples)
        yield 2
        # The id in the middle sees as many keys as one does on average.
        _say(stream, said // 2)
        yield 0
        model.logits(stream.last_BW)
        _say(stream, 1)
        yield 2 * said
        _say(stream, said - said // 2 - 1)
        yield 0
        model(batch)
        yield 2 * samples

    return [Work(lambda: [_language(language, stages)], run, half=False)]


def sampled(model: "DivotTokenizer", token_BND: "Tensor", sampler: SamplerConfig) -> Iterator[int]:
    """`DivotTokenizer.decode`, one pass of the U-Net standing for all of the sampler's steps."""
    import torch

    from kinetok.tokenizers.base import Tokens

    config, net = model.config, model.detokenizer
    windows_BND = torch.unflatten(token_BND, 1, (-1, config.encoder.tokens)).flatten(0, 1)
    null_ND, context_BLC = model.null_tokens(), net.perceiver(windows_BND)
    if sampler.guidance > 1:
        context_BLC = torch.cat([context_BLC, net.perceiver(null_ND[None]).expand_as(context_BLC)])
    yield 1
    x_BZThw = _empty(len(context_BLC), config.detokenizer.unet.z, *model.latent_size)
    net.unet(x_BZThw, torch.zeros(len(x_BZThw), dtype=torch.long), context_BLC)
    yield sampler.passes
    model.lower.decode(Tokens(x_BZThw[: len(windows_BND)], frames=config.frames))
    yield 1


def _say(stream: "Stream", ids: int) -> None:
    """Read so many ids of text after each prompt."""
    from kinetok.llm.divot.mask import TEXT

    if ids:
        stream._read_row([0] * ids, [TEXT] * ids)


def _embed(encoder: "nn.Module", config: "TextConfig", captions: int) -> "Tensor":
    """Embeddings of captions, (B, L, E), in float32 as `TextEncoder` computes them."""
    import torch

    with torch.autocast("cpu", enabled=False):
        text_BLE: Tensor = encoder(input_ids=torch.zeros(captions, config.max_tokens, dtype=torch.long)).last_hidden_state
    return text_BLE


def _tokenizer(name: str, stages: Stages) -> "Callable[[], Sequence[nn.Module]]":
    """What builds the tokenizer of a stage on the meta device."""
    return lambda: [tokenizer_of(name, stages)]


def _text_encoder(config: "TextConfig") -> "nn.Module":
    """A text encoder on the meta device; ConfigError where nothing is known of it here."""
    from kinetok.llm.text import PUBLISHED, outline_encoder
    from kinetok.pipelines.models import on_machine

    if config.path is not None and config.path not in PUBLISHED and not on_machine(config.path):
        raise ConfigError(f"{config.path} is not on this machine yet; a run downloads it from the Hugging Face hub")
    return outline_encoder(config)


def _language(stage: Stage, stages: Stages) -> "DivotLM":
    """A language model on the meta device."""
    from kinetok.llm.divot.language import outline_language
    from kinetok.llm.divot.model import DivotLM

    config = language_of(stage, stages)
    return DivotLM(config, *outline_language(config.language))


def _instructed(stage: Stage, stages: Stages) -> bool:
    """Whether a language model of the job is asked in the form of an instruction."""
    while isinstance(stage, Language):
        if stage.instructed or stage.start is None:
            return stage.instructed
        stage = stages[stage.start]
    return True


def _features(stage: Stage, stages: Stages, video_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of what the shards of a stage hold of a micro-batch, by name."""
    import torch

    from kinetok.pipelines.models import growable

    if isinstance(stage, Vit):
        return {"tokens": (video_shape[0], stage.frames, stage.vit.patches, stage.vit.width)}
    assert isinstance(stage, Encode)
    with torch.device("meta"), torch.no_grad():
        found = growable(tokenizer_of(stage.model, stages)).growth_features(torch.empty(*video_shape))
    return {"full": tuple(found.full_BDthw.shape), "key": tuple(found.key_BDthw.shape)}


def _tokens_of(model: "DivotTokenizer", frames: int) -> tuple[int, int]:
    """Tokens of a clip, and their width."""
    config = model.config
    return -(-frames // config.frames) * config.encoder.tokens, config.encoder.token_width


def _video(stage: Stage, stages: Stages, resources: Resources) -> tuple[int, ...]:
    """Shape of a micro-batch of clips."""
    clips = clips_of(stage, stages)
    return resources.batch_size, 3, clips.frames, clips.height, clips.width


def _empty(*shape: Any) -> "Tensor":
    import torch

    return torch.empty(*shape)
