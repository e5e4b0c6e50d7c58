"""The models that Divot's claims compare: judge, stages of the tokenizer, language models with every head and mechanism; and their scores.

One seed's models are units of one folder; clips, features of the vision transformer, latents and tokens are made once and kept. All of
a kind get the same data, steps and learning rate.

Legend: N clips, B samples, C channels, T frames, D token width, M tokens of a clip, Z T h w latents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import judge
import plain
import torch
from torch import Tensor
from unit import Course, Unit, aside

from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.generation import Decoding, complete, make_clips
from kinetok.llm.divot.heads import DiffusionConfig, GMMConfig, HeadConfig, MSEConfig
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.llm.divot.scoring import choose, same_answer
from kinetok.llm.divot.sequences import Packed, answer, ask, ask_clip, depict, follow
from kinetok.llm.divot.training import DivotLMObjective, DivotLMTrainable
from kinetok.tokenizers import catalog
from kinetok.tokenizers.base import Tokens
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.presets import SMALL_4X
from kinetok.tokenizers.divot.ddim import SamplerConfig
from kinetok.tokenizers.divot.detokenizer import DetokenizerConfig
from kinetok.tokenizers.divot.encoder import EncoderConfig
from kinetok.tokenizers.divot.perceiver import PerceiverConfig
from kinetok.tokenizers.divot.tokenizer import DivotConfig, DivotTokenizer
from kinetok.tokenizers.divot.training import DivotObjective, DivotTrainable, draw, mean_v_loss
from kinetok.tokenizers.divot.unet import UNetConfig
from kinetok.tokenizers.divot.vit import FrozenViT, VitConfig
from kinetok.tokenizers.metrics import clip_psnr

AUTOENCODER = SMALL_4X
"""Never trained: kinetok's start is a linear transform coder."""
TOKENIZER = DivotConfig(
    frames=plain.FRAMES,
    edge=plain.EDGE,
    vit=VitConfig(edge=plain.EDGE, patch=8, width=96, depth=1, heads=4),
    encoder=EncoderConfig(
        temporal_width=64,
        temporal_depth=1,
        temporal_heads=4,
        pool=4,
        width=96,
        depth=1,
        heads=4,
        perceiver=PerceiverConfig(queries=8, depth=2, heads=4, head_width=24),
        token_width=16,
    ),
    detokenizer=DetokenizerConfig(
        perceiver=PerceiverConfig(queries=12, depth=1, heads=4, head_width=16),
        unet=UNetConfig(
            z=16, channels=24, mult=(1, 2), blocks=1, attention=(0, 1), head_width=8, groups=4, context=48, split=None, dropout=0.0
        ),
    ),
    sampler=SamplerConfig(steps=8, eta=0.0, spacing="trailing", guidance=2.0),
)
LANGUAGE = UntrainedLanguage(width=64, hidden=192, depth=3, heads=4, key_heads=2)
HEADS: Final[dict[str, HeadConfig]] = {
    "gmm": GMMConfig(),
    "gaussian": GMMConfig(components=1),
    "mse": MSEConfig(),
    "eps": DiffusionConfig(target="eps", width=160, steps=50),
    "v": DiffusionConfig(target="v", width=160, steps=50),
}
WRITER: Final = "gaussian"
"""Writes in every comparison but that of heads: the mixture does not learn to listen to the text here, and would compare noise."""


def _writes(head: str, mechanism: Literal["bidirectional", "causal", "autoregressive"] = "bidirectional") -> DivotLMConfig:
    width = TOKENIZER.encoder.token_width
    return DivotLMConfig(language=LANGUAGE, clip_tokens=8, token_width=width, head=HEADS[head], mechanism=mechanism)


MODELS: Final[dict[str, DivotLMConfig]] = {
    **{name: _writes(name) for name in HEADS},
    "causal": _writes(WRITER, "causal"),
    "autoregressive": _writes(WRITER, "autoregressive"),
    "gmm_long": _writes("gmm"),
}
"""What writes clips: each head with bidirectional queries, and the other mechanisms with the head of `WRITER`."""
LONGER: Final = {"gmm_long": 4}
"""Language models that get so many times the steps of the others."""
SPLITS: Final = {"train": (4032, 1), "val": (192, 2), "judge": (4032, 3)}
"""Scenes of a split, and the seed they are drawn from."""
RECONSTRUCTED = 96
"""Held-out scenes that reconstruction is measured on."""
CLIP_BATCH, TEXT_BATCH, JUDGE_BATCH, SAMPLED_BATCH = 32, 32, 64, 64
NUMBERS: Final = TOKENIZER.encoder.tokens * TOKENIZER.encoder.token_width
"""Of all a clip's tokens."""
LR = 1e-3
ENCODER_RATE = 0.05
"""Of the joint stage's encoder over `LR`: at the whole rate its tokens lose much of what clips differ by before the U-Net listens."""
LIMIT = 192
"""Positions of a sequence; none here is longer."""
DRAWS = 2
"""Clips that the language model draws for each training caption when the de-tokenizer adapts to it."""
SHORT = Decoding(temperature=0, max_tokens=16)

Figures = dict[str, object]


@dataclass(frozen=True)
class Budget:
    """Training steps of each kind."""

    judge: int
    joint: int
    refine: int
    language: int

    @classmethod
    def of(cls, joint: int) -> "Budget":
        """All in proportion to the joint stage."""
        return cls(judge=joint, joint=joint, refine=joint // 4, language=joint)


@dataclass(frozen=True)
class Split:
    """Scenes with all that is cached of them."""

    scenes: plain.Scenes
    vit_NTPD: Tensor
    latent_NTZhw: Tensor
    decoded_NCTHW: Tensor
    """As the autoencoder gives them back."""

    def batch(self, rows: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """What the tokenizer's stages train on."""
        return {"latent_BTZhw": self.latent_NTZhw[rows].float(), "vit_BTND": self.vit_NTPD[rows].float(), "seed_B": seeds}


@dataclass(frozen=True)
class Material:
    """The clips, and where all is kept."""

    work: Path

    def split(self, name: str) -> Split:
        """A split, prepared once."""
        cache = self.work / f"{name}.pt"
        scenes = plain.draw(*SPLITS[name])
        if not cache.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            torch.save(_prepared(scenes), cache.with_suffix(".part"))
            cache.with_suffix(".part").rename(cache)
        return Split(scenes, *torch.load(cache, weights_only=True))

    @cached_property
    def train(self) -> Split:
        return self.split("train")

    @cached_property
    def val(self) -> Split:
        return self.split("val")

    def seeds(self) -> list[int]:
        """Seeds that something is trained of."""
        return sorted(int(folder.name.removeprefix("seed")) for folder in self.work.glob("seed*"))


@torch.no_grad()
def _prepared(scenes: plain.Scenes) -> tuple[Tensor, Tensor, Tensor]:
    """Features, latents and what is decoded from these, in half precision."""
    model = fresh_tokenizer()
    vit, latents, decoded = [], [], []
    for part in scenes.video_NTHWC.split(64):
        video_BCTHW = to_pixels(part)
        vit.append(model.vit_features(video_BCTHW).half())
        tokens = model.lower.encode(video_BCTHW)
        latents.append(tokens.values.transpose(1, 2).half())
        decoded.append(model.lower.decode(tokens).half())
    return torch.cat(vit), torch.cat(latents), torch.cat(decoded)


def fresh_tokenizer() -> DivotTokenizer:
    """The untrained tokenizer; its frozen parts are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lower = CausalTokenizer(AUTOENCODER).eval()
    return DivotTokenizer(TOKENIZER, FrozenViT.load(TOKENIZER.vit), lower)


def runs(count: int) -> list[range]:
    """Places 0 to `count` in runs of a batch."""
    return [range(start, min(start + SAMPLED_BATCH, count)) for start in range(0, count, SAMPLED_BATCH)]


def to_pixels(video_BTHWC: Tensor) -> Tensor:
    """Bytes as floats in [-1, 1], (B, C, T, H, W)."""
    return video_BTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@dataclass(frozen=True)
class Study:
    """All models of one seed."""

    material: Material
    seed: int
    budget: Budget
    deadline: float

    def unit(self, name: str) -> Unit:
        return Unit(self.material.work / f"seed{self.seed}" / name, self.deadline)

    def trained(self, name: str) -> bool:
        """Whether the unit is there."""
        return self.unit(name).figures.exists()

    def train(self, name: str) -> Figures:
        """Figures of a unit, trained now where it was not before, and all it stands on with it. Raises OutOfTime."""
        unit = self.unit(name)
        if unit.figures.exists():
            return unit.read()
        print(unit.folder, flush=True)
        return _KINDS.get(name, _language)(self, unit, name)

    # --- what is trained, loaded ---

    @cached_property
    def clip_judge(self) -> judge.Judge:
        """Of clips."""
        self.train("judge")
        return judge.load(judge.of_clips(), self.unit("judge").model)

    @cached_property
    def token_judge(self) -> judge.Judge:
        """Of tokens."""
        self.train("token_judge")
        return judge.load(judge.of_tokens(NUMBERS), self.unit("token_judge").model)

    def tokenizer(self, name: str) -> DivotTokenizer:
        """A stage's tokenizer and de-tokenizer."""
        self.train(name)
        loaded = catalog.load(self.unit(name).model)
        assert isinstance(loaded, DivotTokenizer)
        return loaded

    def language(self, name: str) -> DivotLM:
        """A trained language model."""
        self.train(name)
        return DivotLM.from_pretrained(self.unit(name).model)

    @torch.no_grad()
    def tokens(self, split: str) -> Tensor:
        """Tokens of a split's clips by the jointly trained encoder, (N, M, D)."""
        cache = self.unit("joint").folder / f"tokens-{split}.pt"
        if not cache.exists():
            encoder = self.tokenizer("joint").encoder
            with aside(cache) as part:
                torch.save(torch.cat([encoder(seen.float()) for seen in self.material.split(split).vit_NTPD.split(256)]), part)
        loaded: Tensor = torch.load(cache, weights_only=True)
        return loaded

    def rows(self, step: int, batch: int, total: int) -> Tensor:
        """The samples of a step."""
        return torch.randint(total, (batch,), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + step))

    # --- scores ---

    @torch.no_grad()
    def shown(self, model: DivotTokenizer, token_BMD: Tensor, guidance: float | None = None) -> Tensor:
        """Clips that the de-tokenizer makes of tokens, one noise for each place in the split, whatever is compared."""
        sampler = TOKENIZER.sampler if guidance is None else TOKENIZER.sampler.model_copy(update={"guidance": guidance})
        parts = (Tokens(token_BMD[part.start : part.stop], frames=plain.FRAMES) for part in runs(len(token_BMD)))
        return torch.cat([model.decode(tokens, part, sampler) for tokens, part in zip(parts, runs(len(token_BMD)), strict=True)])

    def generation(self, language: DivotLM, detokenizer: DivotTokenizer, *, instructed: bool = False) -> Figures:
        """Scores of clips made for the captions of the held-out scenes."""
        scenes = self.material.val.scenes
        prompts = [ask_clip(language.vocabulary, scenes.caption(row), instructed=instructed) for row in range(len(scenes))]
        token_BMD = torch.cat([make_clips(language, [prompts[row] for row in part], part) for part in runs(len(prompts))])
        said = judge.score(self.token_judge, token_BMD, scenes.labels)
        apart = judge.distance(self.token_judge, token_BMD, self.tokens("val"))
        return self.scores(self.shown(detokenizer, token_BMD)) | {"tokens": said, "token_distance": apart}

    def scores(self, video_NCTHW: Tensor) -> Figures:
        """Whether clips show what the first held-out captions say, and how far the set is from those scenes."""
        val, count = self.material.val, len(video_NCTHW)
        figures: Figures = dict(
            judge.score(self.clip_judge, video_NCTHW, {factor: values[:count] for factor, values in val.scenes.labels.items()})
        )
        return figures | {"distance": judge.distance(self.clip_judge, video_NCTHW, val.decoded_NCTHW[:count].float())}


# --- kinds of units ---


def _judge(study: Study, unit: Unit, name: str) -> Figures:
    renders, val = study.material.split("judge"), study.material.val
    seen = torch.cat([renders.decoded_NCTHW, to_pixels(renders.scenes.video_NTHWC).half()])
    labels = {factor: values.repeat(2) for factor, values in renders.scenes.labels.items()}
    held_out = {"decoded": val.decoded_NCTHW.float(), "drawn": to_pixels(val.scenes.video_NTHWC)}
    return _run_judge(study, unit, judge.of_clips, (seen, labels), held_out)


def _token_judge(study: Study, unit: Unit, name: str) -> Figures:
    seen, labels = study.tokens("judge"), study.material.split("judge").scenes.labels
    return _run_judge(study, unit, lambda: judge.of_tokens(NUMBERS), (seen, labels), {"tokens": study.tokens("val")})


def _run_judge(
    study: Study, unit: Unit, fresh: Callable[[], judge.Judge], shown: tuple[Tensor, dict[str, Tensor]], held_out: dict[str, Tensor]
) -> Figures:
    seen, labels = shown
    made: list[judge.JudgeTrainable] = []

    def build() -> judge.JudgeTrainable:
        made.append(judge.JudgeTrainable(fresh()))
        return made[-1]

    def batch(step: int) -> dict[str, Tensor]:
        rows = study.rows(step, JUDGE_BATCH, len(seen))
        return {"seen": seen[rows].float(), **{factor: values[rows] for factor, values in labels.items()}}

    def measure() -> Figures:
        wanted = study.material.val.scenes.labels
        return {name: judge.score(made[-1].judge, samples, wanted) for name, samples in held_out.items()}

    return unit.run(build, batch, measure, Course(study.budget.judge, LR, study.seed))


def _stage(study: Study, unit: Unit, name: str) -> Figures:
    """A stage of the tokenizer: joint; refine; adapt, on drawn tokens; refined, which goes on as long with real ones; unconditional."""
    material, budget = study.material, study.budget
    train, val, joint = material.train, material.val, name == "joint"
    tokens = {} if joint else {"token_BND": _stage_tokens(study, name)}
    made: list[DivotTrainable] = []

    def build() -> DivotTrainable:
        below = {"refine": "joint", "adapt": "refine", "refined": "refine"}
        model = study.tokenizer(below[name]) if name in below else _with_statistics(fresh_tokenizer(), train)
        objective = DivotObjective(stage="joint" if joint else "adapt" if name == "adapt" else "refine")
        made.append(DivotTrainable(model.train(), objective))
        return made[-1]

    def batch(step: int) -> dict[str, Tensor]:
        rows = study.rows(step, CLIP_BATCH, len(train.scenes))
        drawn = (step % DRAWS) * len(train.scenes) if name == "adapt" else 0
        seeds = study.seed + step * CLIP_BATCH + torch.arange(CLIP_BATCH)
        return train.batch(rows, seeds) | {key: values[rows + drawn] for key, values in tokens.items()}

    def measure() -> Figures:
        batch = val.batch(torch.arange(RECONSTRUCTED), torch.arange(RECONSTRUCTED))
        token_BMD = made[-1].player.tokens(batch)
        null_BMD = made[-1].player.null_tokens().expand_as(token_BMD)
        conditions = {"own": token_BMD, "shuffled": token_BMD[others(len(token_BMD))], "none": null_BMD}
        if name == "unconditional":
            conditions = {"none": torch.zeros_like(token_BMD)}
        figures: Figures = {key: _reconstruction(study, made[-1], batch, condition) for key, condition in conditions.items()}
        written = {"written": study.generation(study.language(WRITER), made[-1].model)} if name in ("adapt", "refined") else {}
        return figures | written

    steps = budget.joint if name in ("joint", "unconditional") else budget.refine
    return unit.run(build, batch, measure, Course(steps, LR, study.seed, rates={"encoder": ENCODER_RATE} if joint else {}))


def _stage_tokens(study: Study, name: str) -> Tensor:
    """What a stage's training clips are told by."""
    if name == "adapt":
        return _drawn_tokens(study)
    token_NMD = study.tokens("train")
    return torch.zeros_like(token_NMD) if name == "unconditional" else token_NMD


@torch.no_grad()
def _drawn_tokens(study: Study) -> Tensor:
    """Tokens that the language model draws for the training captions, `DRAWS` for each, one draw after the other."""
    cache = study.unit(WRITER).folder / "drawn.pt"
    if not cache.exists():
        model, scenes = study.language(WRITER), study.material.train.scenes
        prompts = [ask_clip(model.vocabulary, scenes.caption(row), instructed=False) for row in range(len(scenes))] * DRAWS
        with aside(cache) as part:
            torch.save(torch.cat([make_clips(model, [prompts[row] for row in rows], rows) for rows in runs(len(prompts))]), part)
    loaded: Tensor = torch.load(cache, weights_only=True)
    return loaded


def _with_statistics(model: DivotTokenizer, train: Split) -> DivotTokenizer:
    """Features and latents brought to mean 0 and deviation 1 by the training clips."""
    model.encoder.fit_statistics(train.vit_NTPD[:512].float())
    latent_ZN = train.latent_NTZhw[:512].float().transpose(1, 2).transpose(0, 1).flatten(1)
    model.detokenizer.set_statistics(latent_ZN.mean(1), latent_ZN.std(1))
    return model


def _reconstruction(study: Study, trainable: DivotTrainable, batch: dict[str, Tensor], token_BMD: Tensor) -> Figures:
    """v-loss, PSNR and the judge's scores of clips shown from tokens without guidance."""
    target_NCTHW = study.material.val.decoded_NCTHW[: len(token_BMD)].float()
    video_NCTHW = study.shown(trainable.model, token_BMD, guidance=1.0)
    x_BZThw = trainable.player.latents(batch)
    noise_BZThw = draw(batch["seed_B"].tolist(), x_BZThw.shape[1:], x_BZThw.device).noise_BZThw
    loss_N = mean_v_loss(trainable.model.detokenizer, x_BZThw, token_BMD, noise_BZThw)
    figures: Figures = {"psnr": float(clip_psnr(video_NCTHW, target_NCTHW).mean()), "v_loss": float(loss_N.mean())}
    return figures | study.scores(video_NCTHW)


def others(count: int) -> Tensor:
    """A permutation under which no clip keeps its place."""
    return (torch.arange(count) + 41) % count


def _language(study: Study, unit: Unit, name: str) -> Figures:
    """A language model that writes clips."""
    tokens, scenes = study.tokens("train"), study.material.train.scenes

    def sample(model: DivotLM, row: int, step: int) -> Packed:
        return depict(model.vocabulary, scenes.caption(row), tokens[row][None], limit=LIMIT)

    def measure(model: DivotLM) -> Figures:
        return study.generation(model, study.tokenizer("refine"))

    return _run_language(study, unit, MODELS[name], sample, measure, study.budget.language * LONGER.get(name, 1))


def _both(study: Study, unit: Unit, name: str) -> Figures:
    """One language model that writes clips in every second batch and answers questions in the others."""
    tokens, scenes = study.tokens("train"), study.material.train.scenes

    def sample(model: DivotLM, row: int, step: int) -> Packed:
        if step % 2:
            return follow(model.vocabulary, scenes.caption(row), tokens[row][None], limit=LIMIT, phrase=step // 2 + row)
        return _question(model, scenes, row, tokens[row], step)

    def measure(model: DivotLM) -> Figures:
        return _answers(study, model) | {"generation": study.generation(model, study.tokenizer("refine"), instructed=True)}

    return _run_language(study, unit, MODELS[WRITER], sample, measure, 2 * study.budget.language)


def _blind(study: Study, unit: Unit, name: str) -> Figures:
    """A language model that answers the same questions and sees clips of other scenes: what the words alone give away."""
    tokens, scenes = study.tokens("train"), study.material.train.scenes

    def sample(model: DivotLM, row: int, step: int) -> Packed:
        return _question(model, scenes, row, tokens[(row * 7919 + step) % len(tokens)], step)

    return _run_language(study, unit, MODELS[WRITER], sample, lambda model: _answers(study, model), study.budget.language)


def _question(model: DivotLM, scenes: plain.Scenes, row: int, token_MD: Tensor, step: int) -> Packed:
    factor = list(plain.QUESTIONS)[(row + step // 2) % len(plain.QUESTIONS)]
    return answer(model.vocabulary, token_MD[None], [(plain.QUESTIONS[factor], scenes.word(factor, row))], limit=LIMIT)


def _answers(study: Study, model: DivotLM) -> Figures:
    """Accuracy on questions about held-out clips: exact match of what is said, and choice among the factor's values."""
    scenes, token_NMD = study.material.val.scenes, study.tokens("val")
    figures: Figures = {}
    for factor, question in plain.QUESTIONS.items():
        prompts = [ask(model.vocabulary, token_MD[None], question) for token_MD in token_NMD]
        said = [text for part in runs(len(prompts)) for text in complete(model, [prompts[row] for row in part], part, SHORT)]
        exact = [same_answer(text, scenes.word(factor, row)) for row, text in enumerate(said)]
        options = plain.FACTORS[factor]
        chosen = [choose(model, token_MD[None], question, options, limit=LIMIT) for token_MD in token_NMD]
        right = [choice == label for choice, label in zip(chosen, scenes.labels[factor].tolist(), strict=True)]
        figures[factor] = {"exact": sum(exact) / len(exact), "choice": sum(right) / len(right), "chance": 1 / len(options)}
    return figures


def _run_language(
    study: Study,
    unit: Unit,
    config: DivotLMConfig,
    sample: Callable[[DivotLM, int, int], Packed],
    measure: Callable[[DivotLM], Figures],
    steps: int,
) -> Figures:
    models: list[DivotLM] = []

    def build() -> DivotLMTrainable:
        models.append(DivotLM.build(config))
        return DivotLMTrainable(models[-1], DivotLMObjective())

    def batch(step: int) -> Mapping[str, Tensor]:
        rows = study.rows(step, TEXT_BATCH, len(study.material.train.scenes)).tolist()
        return collate([sample(models[-1], row, step) for row in rows], [step * TEXT_BATCH + place for place in range(TEXT_BATCH)])

    def evaluated() -> Figures:
        models[-1].eval()
        return measure(models[-1])

    return unit.run(build, batch, evaluated, Course(steps, LR, study.seed))


_KINDS: Final[dict[str, Callable[[Study, Unit, str], Figures]]] = {
    "judge": _judge,
    "token_judge": _token_judge,
    **dict.fromkeys(("joint", "refine", "adapt", "refined", "unconditional"), _stage),
    "both": _both,
    "blind": _blind,
}
ORDER: Final = (
    "judge",
    "joint",
    "token_judge",
    "refine",
    "gmm",
    "gaussian",
    "mse",
    "both",
    "blind",
    "adapt",
    "refined",
    "v",
    "autoregressive",
    "causal",
    "eps",
    "gmm_long",
    "unconditional",
)
"""In the order of training: key rows first."""
