"""What stages that run models will compute, against their own code counted while it computes that."""

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from kinetok.infra.errors import ConfigError
from kinetok.infra.job import Job, parse_job
from kinetok.infra.stage import Resources
from kinetok.llm.cost import FLOAT, count_flops
from kinetok.llm.dit import DiTConfig, VideoDiT
from kinetok.llm.divot.generation import Decoding, Draws, Stream, draw_clips
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.llm.divot.scoring import cost
from kinetok.llm.divot.sequences import ask, ask_clip
from kinetok.llm.text import TextConfig, TextEncoder, outline_encoder
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.estimate import CAPTION
from kinetok.pipelines.passes import passes, run_cost, run_outlines, run_table
from kinetok.pipelines.report.carried import shown
from kinetok.pipelines.stages.generate import Sampler
from kinetok.pipelines.tokens_shown import Shower
from kinetok.tokenizers import catalog
from kinetok.tokenizers.base import DecodeRecipe, Tokenizer, TokenSpec, standing
from kinetok.tokenizers.causal.autoencoder import CausalConfig
from kinetok.tokenizers.causal.chunks import ChunkPlan
from kinetok.tokenizers.causal.grown import GrownConfig
from kinetok.tokenizers.divot.ddim import SamplerConfig, timesteps
from kinetok.tokenizers.divot.presets import SMALL
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
from kinetok.tokenizers.divot.vit import ClipFeatures, FrozenViT

FIT: dict[str, Any] = {"steps": 3, "global_batch": 2}
BASE = CausalConfig(channels=8, mult=(1, 1), strides=((2, 2),), blocks=1, z=4, groups=4)
UNET = SMALL.detokenizer.unet.model_copy(update={"z": 4, "channels": 16, "head_width": 8})
DIVOT = SMALL.model_copy(update={"edge": 16, "detokenizer": SMALL.detokenizer.model_copy(update={"unet": UNET})})
DIT = DiTConfig(z=4, width=24, depth=1, heads=2, text_width=64, chunk=3)
LANGUAGE = DivotLMConfig.model_validate(
    {
        "language": {"kind": "untrained", "width": 32, "hidden": 48, "depth": 2, "heads": 4, "key_heads": 2},
        "clip_tokens": DIVOT.encoder.tokens,
        "token_width": DIVOT.encoder.token_width,
    }
)
SAMPLER = SamplerConfig(steps=4, guidance=2.0)
SAID, CLIPS, SAMPLES = 5, 2, 2
TEXT = TextConfig(max_tokens=CAPTION)


def make_job(**changes: Any) -> Job:
    clips = {"kind": "clips", "videos": "videos", "fps": 8}
    stages: dict[str, Any] = {
        "videos": {"kind": "ingest", "source": "."},
        "clips": {**clips, "frames": 5, "height": 16, "width": 16},
        "windows": {**clips, "frames": DIVOT.frames, "height": 16, "width": 16},
        "base": {"kind": "train", "data": "clips", "model": BASE, "optimizers": {"autoencoder": {"lr": 1e-3}}, **FIT},
        "latents": {"kind": "encode", "data": "clips", "model": "base"},
        "text": {"kind": "text", "data": "clips", "text": TEXT},
        "film": {"kind": "diffusion", "latents": "latents", "text": "text", "model": DIT, "optimizers": {"dit": {"lr": 1e-3}}, **FIT},
        "films": {"kind": "generate", "model": "film", "tokenizer": "base", "text": "text", "frames": 10, "beyond": True, "steps": 3},
        "again": {"kind": "decode", "tokens": "latents", "tokenizer": "base"},
        "vit": {"kind": "vit", "data": "windows", "vit": DIVOT.vit, "frames": DIVOT.encoder.frames},
        "divot": {
            "kind": "train",
            "data": "windows",
            "lower": "base",
            "model": DIVOT,
            "objective": {"kind": "divot"},
            "optimizers": {"divot": {"lr": 1e-3}},
            **FIT,
        },
        "tokens": {"kind": "encode", "data": "windows", "model": "divot"},
        "carried": {"kind": "reconstruct", "data": "windows", "model": "divot", "sampler": SAMPLER},
        "language": {
            "kind": "language",
            "tokens": ["tokens"],
            "model": LANGUAGE,
            "tasks": [{"kind": "captioning", "limit": 99}],
            "optimizers": {"divot_lm": {"lr": 1e-3}},
            **FIT,
        },
        "written": {"kind": "write", "model": "language", "data": "windows", "draws": 3},
        "shown": {"kind": "decode", "tokens": "written", "tokenizer": "divot", "sampler": SAMPLER},
        "questions": {"kind": "instructions", "source": "questions.jsonl", "data": "windows"},
        "answers": {
            "kind": "understand",
            "model": "language",
            "tokens": "tokens",
            "instructions": "questions",
            "clips": CLIPS,
            "decoding": {"max_tokens": SAID},
        },
    }
    for name, change in changes.items():
        stages[name] = stages.get(name, {}) | change
    plain = {
        name: {field: value.model_dump(mode="json") if hasattr(value, "model_dump") else value for field, value in stage.items()}
        for name, stage in stages.items()
    }
    return parse_job({"name": "small", "stages": plain, "resources": {"default": {"batch_size": SAMPLES}}}, STAGES)


@cache
def base() -> Tokenizer:
    return catalog.build(BASE).eval().requires_grad_(False)


@cache
def divot() -> DivotTokenizer:
    model = catalog.build(DIVOT, base()).eval().requires_grad_(False)
    assert isinstance(model, DivotTokenizer)
    return model


@cache
def language() -> DivotLM:
    return DivotLM.build(LANGUAGE).eval()


def spec_of(model: Tokenizer, frames: int) -> TokenSpec:
    return model.spec().model_copy(update={"recipe": DecodeRecipe(fps=8, frames=frames, height=16, width=16)})


def text() -> None:
    TextEncoder(TEXT).encode(["a", "bc"])


def vit() -> None:
    ClipFeatures(FrozenViT.load(DIVOT.vit), DIVOT.encoder.frames).encode(torch.zeros(SAMPLES, 3, DIVOT.frames, 16, 16))


def films() -> None:
    spec: Any = SimpleNamespace(plan=ChunkPlan(frames=5), shape=(4, 3, 8, 8), chunk=3)
    stage: Any = make_job().stages["films"]
    Sampler(stage, spec, VideoDiT(DIT).eval().requires_grad_(False), base(), TextEncoder(TEXT), Resources())(["a", "b"], [0, 1])


def again() -> None:
    Shower(base(), spec_of(base(), 5), Resources())([torch.zeros(4, 3, 8, 8)] * SAMPLES, [0, 1])


def sampled() -> None:
    tokens = [torch.zeros(DIVOT.encoder.tokens, DIVOT.encoder.token_width)] * SAMPLES
    Shower(divot(), spec_of(divot(), DIVOT.frames), Resources(), SAMPLER)(tokens, [0, 1])


def carried() -> None:
    video_BCTHW = torch.zeros(SAMPLES, 3, DIVOT.frames, 16, 16)
    clips: Any = SimpleNamespace(batches=lambda: [([0, 1], video_BCTHW)], index=SimpleNamespace(rows=pa.table({"video": ["a", "b"]})))
    assert len(list(shown(divot(), clips, Resources(), SAMPLER, 0))) == SAMPLES


def written() -> None:
    prompts = [ask_clip(language().vocabulary, "x" * CAPTION, instructed=False)] * SAMPLES
    draw_clips(language(), prompts, [[0, 1], [2, 3], [4, 5]])


def answers() -> None:
    """Of one that never ends before it must, with both lots of clips."""
    clips_CND = torch.zeros(CLIPS, DIVOT.encoder.tokens, DIVOT.encoder.token_width)
    prompts = [ask(language().vocabulary, clips_CND, "", instructed=False)] * SAMPLES
    with torch.no_grad():
        for _ in range(2):
            Stream(language(), prompts).say(Draws([0, 1]), Decoding(max_tokens=SAID), banned=[], stop=-1)
            for _ in prompts:
                cost(language(), clips_CND, "", ["x" * CAPTION], limit=999, instructed=False)


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("text", text),
        ("vit", vit),
        ("films", films),
        ("again", again),
        ("shown", sampled),
        ("carried", carried),
        ("written", written),
        ("answers", answers),
    ],
)
def test_what_is_said_is_what_the_stage_computes(name: str, work: Callable[[], None]) -> None:
    found = run_cost(make_job(), name)
    base(), divot(), language()  # a linear start is computed when a model is made
    assert found.flops == count_flops(work) // SAMPLES > 0
    assert found.alive > 0 and found.memory == FLOAT * found.parameters + found.alive


def test_tokens_of_cached_features_cost_what_is_left() -> None:
    grown = GrownConfig(blocks=1, groups=4)
    train = {"kind": "train", "data": "clips", "lower": "base", "optimizers": {"autoencoder": {"lr": 1e-3}}, **FIT}
    encode = {"kind": "encode", "data": "clips", "model": "base"}
    job = make_job(
        tokens={"features": "vit"},
        trunk={**encode, "content": "features"},
        grown={**train, "model": grown, "features": "trunk"},
        higher={**encode, "model": "grown", "features": "trunk"},
    )
    vit_BFPD = torch.zeros(SAMPLES, DIVOT.encoder.frames, DIVOT.vit.patches, DIVOT.vit.width)
    video_BCTHW = torch.zeros(SAMPLES, 3, 5, 16, 16)
    trunk = base().growth_features(video_BCTHW)
    cached = {"full": trunk.full_BDthw, "key": trunk.key_BDthw}
    models: dict[str, tuple[Tokenizer, dict[str, torch.Tensor]]] = {
        "tokens": (divot(), {"tokens": vit_BFPD}),
        "higher": (catalog.build(grown, base()).eval(), cached),
    }
    for name, (model, features) in models.items():
        assert run_cost(job, name).flops == count_flops(partial(model.encode_features, features, 5)) // SAMPLES > 0


def test_parameters_are_those_of_all_models_on_the_worker() -> None:
    job = make_job()

    def count(*models: Any) -> int:
        return sum(weight.numel() for model in models for weight in model.parameters())

    encoder = TextEncoder(TEXT).model
    assert run_cost(job, "films").parameters == count(encoder, VideoDiT(DIT), base())
    assert run_cost(job, "shown").parameters == count(*standing(divot()))
    assert run_cost(job, "answers").parameters == count(language())


def test_every_stage_that_runs_models_has_a_row() -> None:
    job = make_job()
    assert sorted(passes(job)) == ["again", "answers", "carried", "films", "latents", "shown", "text", "tokens", "vit", "written"]
    assert not [cost for _, _, cost in run_outlines(job) if isinstance(cost, str)]
    caption = str(run_table(job, []).caption)
    assert f"Texts have {CAPTION} ids" in caption and "each further option is one more" in caption and "Not priced" not in caption


def test_what_is_not_priced_is_named() -> None:
    job = make_job(scores={"kind": "score", "generated": ["shown"], "data": "windows", "clip": "clip"}, carried={"lpips": "vgg"})
    assert str(run_table(job, []).caption).endswith("networks of scores, lpips, clip.")


def test_models_that_are_nowhere_are_unknown() -> None:
    job = make_job(text={"text": {"encoder": "t5", "path": "somebody/nothing"}}, film={"model": DIT.model_copy(update={"text_width": 8})})
    found = {name: cost for name, _, cost in run_outlines(job)}
    for name in ("text", "films"):
        assert found[name] == "unknown: somebody/nothing is not on this machine yet; a run downloads it from the Hugging Face hub"
    with pytest.raises(ConfigError, match="token by token"):
        run_cost(make_job(language={"model": LANGUAGE.model_copy(update={"mechanism": "autoregressive"})}), "written")


@pytest.mark.parametrize("spacing", ["uniform", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 6, 50])
def test_passes_of_a_sampler(steps: int, spacing: Any) -> None:
    assert SamplerConfig(steps=steps, spacing=spacing).passes == len(timesteps(steps, spacing))


@pytest.mark.parametrize(
    ("path", "encoder", "millions"), [("google/flan-t5-xxl", "t5", 4762.3), ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "clip", 353.0)]
)
def test_encoders_have_as_many_weights_as_published(path: str, encoder: Any, millions: float) -> None:
    """T5-XXL's: 24 layers of 4 x 4096^2 and 3 x 4096 x 10240, 32,128 rows; OpenCLIP's: 24 layers of 12 x 1024^2, 49,408 rows."""
    with torch.device("meta"):
        model = outline_encoder(TextConfig(encoder=encoder, path=path))
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)
