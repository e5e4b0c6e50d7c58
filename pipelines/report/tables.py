"""What the stages that measure and show write, and `report` reads: the shapes of their files. Imports no torch."""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter

from kinetok.infra.config import Config

TABLE, PANEL, CLIPS = "table.json", "panel.json", "clips.parquet"
GENERATION, CONTACT = "prompts.json", "contact.png"
ANSWERS, SCORES = "answers.json", "scores.json"
CARRIED = "carried.json"
FRAMES = "frames"
"""Name of the tensor in a file of frames."""


class RungCost(Config):
    """What a tokenizer's tokens cost and how fast it runs."""

    tokenizer: str
    weights: str
    """Digest of the weights."""
    temporal: int
    spatial: int
    latent: tuple[int, ...]
    """Shape of one clip's tokens."""
    parameters: int
    tokens_per_second: float
    """Per second of video."""
    bits_per_second: float
    """Per second of video, as stored."""
    encode_frames_per_second: float
    """Of the median batch; on one thread of a CPU by that thread's own time."""
    decode_frames_per_second: float


class Line(Config):
    """One rung of the ladder, or a baseline."""

    name: str
    psnr: float
    """dB, mean over clips."""
    ssim: float
    # Left out of the file where it is not measured, so that a table without it is the same as ever.
    lpips: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    """Mean over clips; None: not measured."""
    cost: RungCost | None = None
    """None for baselines."""

    @property
    def figures(self) -> dict[str, float]:
        """Every figure that there is, by name."""
        found = {"psnr": self.psnr, "ssim": self.ssim, "lpips": self.lpips}
        return {name: value for name, value in found.items() if value is not None}


class Geometry(Config):
    """The clips that were evaluated."""

    fps: float
    frames: int
    height: int
    width: int


class Table(Config):
    """`table.json`."""

    split: str
    clips: int
    stored: str
    """Type continuous tokens were rounded to."""
    lpips: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    """Weights of LPIPS; None: not measured."""
    recipe: Geometry
    ladder: tuple[Line, ...]
    """Baselines first, then the rungs, lowest first."""

    @property
    def rungs(self) -> tuple[Line, ...]:
        return tuple(line for line in self.ladder if line.cost is not None)

    @property
    def bar(self) -> Line:
        """The better baseline: what every rung has to beat."""
        return max((line for line in self.ladder if line.cost is None), key=lambda line: line.psnr)


class Shown(Config):
    """One video of the panel."""

    model: str
    role: Literal["panel", "worst"]
    file: str
    id: str
    caption: str | None
    psnr: float
    ssim: float


ShownList = TypeAdapter(list[Shown])
"""`panel.json`."""


class Generated(Config):
    """One generated video."""

    prompt: str
    file: str
    seed: int
    id: str | None = None
    """Of the clip whose tokens it shows; None where there is none."""
    frames: str | None = None
    """File of its frames as they were made: safetensors, `frames` uint8 (T, H, W, 3); None where they were not kept."""


class Generation(Config):
    """`prompts.json`: what was generated, and how."""

    tokenizer: str
    """Name of the tokenizer's artifact."""
    encoder: str
    """Kind of the text encoder, of which `untrained` tells captions apart and understands none; of `decode`, the name of the tokens."""
    frames: int
    fps: float
    steps: int
    """Of sampling."""
    guidance: float
    tokens: int
    """Of the transformer, for one video."""
    videos: tuple[Generated, ...]


class Asked(Config):
    """One question: what was said and chosen with its own clip shown, and with another one."""

    video: str
    question: str
    about: str
    """Kind of question."""
    answer: str
    options: tuple[str, ...]
    said: str
    exact: bool
    """Whether that is the answer, but for case, punctuation, articles and spaces."""
    chosen: str | None
    """None where there are no options."""
    blindly_said: str | None
    """As everything called so, None where there is no other clip."""
    blindly_exact: bool | None
    blindly_chosen: str | None
    ids: int
    """Of the true answer, its end included, in the model's vocabulary."""
    nats: float
    """Cross-entropy of the true answer, sum over its ids."""
    blindly_nats: float | None


class Score(Config):
    """Shares of questions that were answered rightly, and how surprising the true answers were."""

    about: str
    """Kind of question, or `all`."""
    questions: int
    exact: float
    """What was said is the answer."""
    blindly_exact: float | None
    """With another clip shown; as everything called so, None where there is none."""
    choice: float | None
    """The answer is what was chosen; over questions with options, None where there are none."""
    blindly_choice: float | None
    chance: float | None
    """Of choosing it by a guess."""
    perplexity: float
    """Of the true answers: exp of their nats per id."""
    blindly_perplexity: float | None

    @classmethod
    def of(cls, about: str, asked: Sequence[Asked]) -> Self:
        """Of some questions."""
        closed = [item for item in asked if item.options]
        exact = [item.blindly_exact for item in asked if item.blindly_exact is not None]
        choice = [item.blindly_chosen == item.answer for item in closed if item.blindly_chosen is not None]
        nats = [(item.blindly_nats, item.ids) for item in asked if item.blindly_nats is not None]
        return cls(
            about=about,
            questions=len(asked),
            exact=_share(item.exact for item in asked),
            blindly_exact=_share(exact) if exact else None,
            choice=_share(item.chosen == item.answer for item in closed) if closed else None,
            blindly_choice=_share(choice) if choice else None,
            chance=sum(1 / len(item.options) for item in closed) / len(closed) if closed else None,
            perplexity=_perplexity((item.nats, item.ids) for item in asked),
            blindly_perplexity=_perplexity(nats) if nats else None,
        )

    @property
    def figures(self) -> dict[str, float]:
        """Every share and perplexity that there is, by name."""
        dumped = self.model_dump(exclude={"about", "questions"})
        return {name: value for name, value in dumped.items() if value is not None}


class AnswerProtocol(Config):
    """How questions were asked and answers counted: what the figures of `answers.json` are of."""

    prompt: str
    """As the model reads it, of one clip: `{tokens}` stands for its tokens, and a further clip follows as another `<frame>`."""
    clips: int
    """Most clips of a video that are shown together."""
    windows: str
    """Which ones."""
    max_tokens: int
    """Ids of the longest answer that is drawn."""
    temperature: float
    """0 takes the most likely id."""
    top_p: float
    seed: int
    """Of which questions are drawn, and of the answers."""
    control: str
    """Which clip is shown instead for figures called `blindly_`, or that there is none."""
    matching: str
    """When what is said counts as the answer."""
    choice: str
    """What is chosen among options."""
    perplexity: str


class Answers(Config):
    """`answers.json`: what a language model was asked about clips of a split, and how it did."""

    model: str
    """Name of its artifact."""
    split: str
    protocol: AnswerProtocol
    scores: tuple[Score, ...]
    """By kind of question, `all` last where there are several."""
    asked: tuple[Asked, ...]


class Condition(Config):
    """Clips as they were made under one condition."""

    name: str
    psnr: float
    """dB, mean over clips."""
    ssim: float
    v_loss: float | None
    """Of the diffusion decoder; None where it takes no part."""


class Figure(Config):
    """A figure that needs weights somebody else trained."""

    name: str
    value: float | None
    """None: not measured."""
    protocol: str
    """What it was measured on and how, or why it was not."""


class Strip(Config):
    """Frames of a clip: the original, from its tokens, from another clip's."""

    id: str
    caption: str
    file: str


class Carried(Config):
    """`carried.json`: what of the clips of a split the tokens of a Divot tokenizer carry."""

    split: str
    clips: int
    weights: str
    """Digest of what makes the tokens."""
    vit: str
    """The vision transformer, `untrained` where it is."""
    tokens: int
    """Of a window."""
    token_width: int
    steps: int
    """Of sampling."""
    guidance: float
    conditions: tuple[Condition, ...]
    figures: tuple[Figure, ...]
    strips: tuple[Strip, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """Every figure there is, by condition and name."""
        shown = {c.name: {"psnr": c.psnr, "ssim": c.ssim, "v_loss": c.v_loss} for c in self.conditions}
        found = {f"{name}/{figure}": value for name, figures in shown.items() for figure, value in figures.items()}
        found |= {figure.name: figure.value for figure in self.figures}
        return {name: value for name, value in found.items() if value is not None}


class Protocol(Config):
    """What the figures were measured on, and how; `clip` and `i3d` are other people's networks, without which there is no such figure."""

    clip: str | None
    i3d: str | None
    split: str
    """Of the clips."""
    frames: int
    fps: float
    height: int
    width: int
    caption: str
    """Which one a video has."""
    pixels: str
    """What of a video was scored."""
    resize: str
    covariance: str


class ClipScore(Config):
    """Figures of some videos."""

    name: str
    videos: int
    real: int | None
    """Real clips that they are compared with, those of the same captions; None of these themselves."""
    shown: dict[str, float]
    """Share that shows what is asked, by factor and in `all`; empty without a judge."""
    clipsim: float | None
    frechet: float | None
    """To the real clips; none of these themselves."""
    caveat: str | None
    """What is to be known of the distance; None where there is nothing."""

    @property
    def figures(self) -> dict[str, float]:
        """Every figure that there is, by name."""
        others = {name: value for name, value in (("clipsim", self.clipsim), ("frechet", self.frechet)) if value is not None}
        return {**self.shown, **others}


class ClipScores(Config):
    """`scores.json`: what generated clips are worth, the real ones first."""

    judge: dict[str, float]
    """The judge's own accuracy on scenes that it never saw, by factor."""
    chance: dict[str, float]
    """Share of clips that would show what is asked by a guess among the values that each factor can have, by factor and, each guessed for
    itself, in `all`; empty without a judge."""
    protocol: Protocol
    lines: tuple[ClipScore, ...]


def _perplexity(answers: Iterable[tuple[float, int]]) -> float:
    """Of answers of so many nats and ids."""
    nats, ids = zip(*answers, strict=True)
    return math.exp(math.fsum(nats) / sum(ids))


def _share(right: Iterable[bool]) -> float:
    found = list(right)
    return sum(found) / len(found)
