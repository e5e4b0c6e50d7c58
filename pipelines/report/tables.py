"""What `evaluate` and `generate` write and `report` reads: the shapes of `table.json`, `panel.json`, `prompts.json`. Imports no torch."""

from typing import Literal

from pydantic import TypeAdapter

from kinetok.infra.config import Config

TABLE, PANEL, CLIPS = "table.json", "panel.json", "clips.parquet"
GENERATION, CONTACT = "prompts.json", "contact.png"


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
    decode_frames_per_second: float


class Line(Config):
    """One rung of the ladder, or a baseline."""

    name: str
    psnr: float
    """dB, mean over clips."""
    ssim: float
    cost: RungCost | None = None
    """None for baselines."""


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


class Generation(Config):
    """`prompts.json`: what was generated, and how."""

    tokenizer: str
    """Name of the tokenizer's artifact."""
    encoder: str
    """Kind of the text encoder; `untrained` tells captions apart and understands none."""
    frames: int
    fps: float
    steps: int
    """Euler steps."""
    guidance: float
    tokens: int
    """Of the transformer, for one video."""
    videos: tuple[Generated, ...]
