"""What every tokenizer offers: `TokenSpec`, `Tokens`, the `Tokenizer` base and the `LowerStage` protocol.

Legend: B clips, C channels, T H W pixels (frames, rows, columns), t h w latents, N tokens, D width.
Pixels are float in [-1, 1]. Pure torch: no Ray, no files beyond `save_pretrained` / `from_pretrained`.
"""

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kinetok.tokenizers.card import CARD_FILE, model_card

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

Count = Annotated[StrictInt, Field(ge=1)]


def import_transformers() -> None:
    """Import transformers whole, before anything is taken from it by name.

    It puts another module in its place while it is imported: a `from transformers import` of a second thread waits for the first, and
    then looks into the module that was put aside ("cannot import name"). Stages of a job are threads.
    """
    importlib.import_module("transformers")


class Seeded(TorchFunctionMode):
    """`with Seeded(0): SomeModule()`: what modules begin with is drawn from a generator of this seed, in this thread alone.

    torch's own generator is one for all threads, and stages of a job are threads: with `manual_seed` a module now and then comes out
    otherwise, because another stage draws in between. Not covered: what is drawn by other functions (`DRAWS`), or on a GPU.
    """

    DRAWS = frozenset(
        f"{name}_" for name in ("normal", "uniform", "trunc_normal", "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform")
    ) | {"rand", "randn"}
    """By name: of torch, of tensors, of `torch.nn.init`, and of transformers, which puts functions of its own in the place of those."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__name__", None) in self.DRAWS:
            named["generator"] = self.generator
        return func(*args, **named)


Batch: TypeAlias = dict[str, Tensor]
"""A training batch: named tensors whose first dimension is the sample, as `kinetok.infra.training` feeds them."""


class Config(BaseModel):
    """Frozen, strict data: equality and hash by value, unknown keys refused. (`kinetok.infra` has its own; neither imports the other.)"""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(Config):
    """Numbers of a model."""

    kind: str
    """Tells the catalog which class to build."""

    @property
    def grows(self) -> bool:
        """Whether a fresh model needs another one, to stand on or to start from."""
        return False

    @property
    def spatial(self) -> int | None:
        """Pixels that rows and columns must be multiples of; None where any will do, or the model below decides."""
        return None


class DecodeRecipe(Config):
    """How pixels reached the tokenizer: part of the token contract, because other pixels make other tokens."""

    fps: float
    frames: int
    height: int
    width: int


class TokenSpec(Config):
    """What a token shard holds and which weights wrote it; stamped on every shard (contract 3)."""

    tokenizer: str
    """`kind` of the model."""
    weights: str
    """sha256 over the state dict, see `weights_digest`."""
    content: Literal["tokens", "features"] = "tokens"
    layout: Literal["grid", "sequence", "pyramid"]
    channels: int
    """Numbers of one token: latent channels of a grid, width of a sequence."""
    vocabulary: int | None = None
    """None for continuous tokens."""
    temporal: int
    """Frames of one latent step (temporal compression)."""
    spatial: int
    """Pixels of one latent cell along an edge."""
    dtype: Literal["float32", "float16", "bfloat16", "int32", "int64"] = "float32"
    """Type the numbers are stored in."""
    recipe: DecodeRecipe | None = None
    chunk_frames: int | None = None
    """Frames of a chunk, where clips were encoded chunk by chunk and the latents joined; None where each was encoded at once."""
    chunk_overlap: int = 0
    """Frames that a chunk shares with the one before."""

    def difference(self, other: "TokenSpec") -> str | None:
        """The first differing field as `field: mine, other`, or None where the two agree."""
        return difference(self, other)


def difference(one: BaseModel, other: BaseModel) -> str | None:
    """The first differing field of two of one class as `field: one, other`, or None where they agree."""
    for name in type(one).model_fields:
        first, second = getattr(one, name), getattr(other, name)
        if first != second:
            return f"{name}: {first}, {second}"
    return None


@dataclass(frozen=True)
class Geometry:
    """How a tokenizer maps frames and pixels to latents, and what can be relied on in time."""

    temporal: int
    """Frames of one latent step."""
    spatial: int
    """Pixels of one latent cell along an edge."""
    channels: int
    """Latent channels."""
    encoder_width: int
    """Channels of the encoder's trunk features."""
    decoder_width: int
    """Channels of the decoder's trunk features."""
    causal_encoder: bool = True
    """Whether a latent step depends on no frame after the ones it stands for."""
    causal_decoder: bool = True
    """Whether a frame depends on no latent step after the one that stands for it."""
    image_first: bool = True
    """Whether the first latent step is the latent of the first frame alone."""
    window: int | None = None
    """Videos are padded to 1 + window * k frames; None where any step will do, which is `temporal`."""

    def legal_frames(self, frames: int) -> int:
        """The length that a video of so many frames is padded to at its end."""
        step = self.window or self.temporal
        return frames + -(frames - 1) % step

    def latent_steps(self, frames: int) -> int:
        """Latent steps of a video of so many frames, padding included."""
        return latent_steps(frames, self.temporal, self.window)


def latent_steps(frames: int, temporal: int, window: int | None = None) -> int:
    """Latent steps of `frames` pixel frames encoded at once: one for the first, and one for each `temporal` of the further ones, whose
    number is padded to a multiple of `window`; None: of `temporal`."""
    step = window or temporal
    return 1 + -(-(frames - 1) // step) * step // temporal


@dataclass
class Tokens:
    """Tokens of a batch: `values_BCthw` for a grid, (B, N, D) for a sequence; `frames` is the true length before padding."""

    values: Tensor
    frames: int


@dataclass
class GrowthFeatures:
    """What a grown stage needs of its frozen lower stage, at trunk width D.

    `full_BDthw` are the trunk features of the video, `key_BDthw` those of its every second frame (section 2 of arXiv 2501.05442).
    """

    full_BDthw: Tensor
    key_BDthw: Tensor


class Tokenizer(nn.Module, ABC):
    """Video to tokens and back. Subclasses set `config_class`; they take their config, and the model below where they have one."""

    config_class: ClassVar[type[ModelConfig]]
    config: ModelConfig
    growth_obstacle: ClassVar[str | None] = "it has no trunk features"
    """Why nothing can be grown upon models of this class; None where it can."""

    @abstractmethod
    def spec(self) -> TokenSpec:
        """The contract of this model's tokens, with the digest of its present weights."""

    @abstractmethod
    def encode(self, video_BCTHW: Tensor) -> Tokens:
        """Tokens of a video in [-1, 1] of any number of frames; deterministic."""

    @abstractmethod
    def decode(self, tokens: Tokens) -> Tensor:
        """The video in [-1, 1], `tokens.frames` long."""

    def feature_spec(self) -> TokenSpec | None:
        """The contract of the cached features that `encode_features` takes; None where tokens are made of pixels alone."""
        return None

    def encode_features(self, features: Mapping[str, Tensor], frames: int) -> Tokens:
        """Tokens of clips of `frames` frames, from a batch of what shards of `feature_spec` hold, float32; as `encode` would make them."""
        raise NotImplementedError(f"a {self.config.kind!r} model makes tokens of pixels alone")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` (shared tensors are not supported) and the model card."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG_FILE).write_text(json.dumps(self.config.model_dump(mode="json"), indent=1, sort_keys=True))
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, target / WEIGHTS_FILE)
        (target / CARD_FILE).write_text(model_card(self))

    @classmethod
    def build(cls, config: ModelConfig, lower: "Tokenizer | None" = None) -> Self:
        """A fresh model; ValueError where `lower`, the frozen model below it, is missing or not wanted."""
        if lower is not None:
            raise ValueError(f"a {config.kind!r} model stands on its own: leave out the lower model")
        return cls(config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model saved in `folder`, in eval mode; raises on missing or unexpected weights."""
        return cls.build(cls.read_config(folder)).read_weights(folder)

    @classmethod
    def read_config(cls, folder: str | Path) -> ModelConfig:
        """The `config.json` of a saved model of this class."""
        return cls.config_class.model_validate_json((Path(folder) / CONFIG_FILE).read_text())

    def read_weights(self, folder: str | Path) -> Self:
        """Load `model.safetensors` strictly into this model and put it in eval mode."""
        self.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE), strict=True)
        return self.eval()

    def digest(self) -> str:
        """sha256 over all weights that decide the tokens, frozen ones below included."""
        return weights_digest(self)

    def identity(self) -> str:
        """sha256 over all weights there are: two models of equal tokens may decode them differently."""
        return self.digest()


class LowerStage(Tokenizer):
    """A tokenizer that another can be grown upon once it is frozen (docs/architecture.md, "Growing").

    Trunk features are those before the latent head: a grown stage mixes them at full width D and trains heads of its own.
    """

    growth_obstacle = None

    @property
    @abstractmethod
    def geometry(self) -> Geometry:
        """Compression, widths and causality."""

    @property
    @abstractmethod
    def feature_channels(self) -> int:
        """Width D of the trunk features on the encoder's side."""

    @property
    @abstractmethod
    def temporal(self) -> int:
        """Frames of one latent step: 1 + temporal * k frames become 1 + k steps."""

    @property
    @abstractmethod
    def spatial(self) -> int:
        """Pixels of one latent cell along an edge."""

    @abstractmethod
    def feature_ladder(self, video_BCTHW: Tensor, rates: int) -> list[Tensor]:
        """Trunk features (B, D, t, h, w) of the video, of every 2nd frame of it, of every 4th ... for `rates` such rates.

        The video is padded at its end to 1 + temporal * 2**(rates - 1) * k frames. What the rates share is computed once.
        """

    @abstractmethod
    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        """Video (B, 3, 1 + temporal * (t - 1), H, W) from decoder trunk features: not clamped, with gradient to them."""

    def features(self, video_BCTHW: Tensor) -> Tensor:
        """Encoder trunk features before the head, (B, D, t, h, w)."""
        return self.feature_ladder(video_BCTHW, 1)[0]

    def growth_features(self, video_BCTHW: Tensor) -> GrowthFeatures:
        """Features of the video and of its every second frame: what a stage grown on this one is trained from."""
        full_BDthw, key_BDthw = self.feature_ladder(video_BCTHW, 2)
        return GrowthFeatures(full_BDthw, key_BDthw)


def lower_stage(model: Tokenizer) -> LowerStage:
    """`model`, where others can be grown upon it; ValueError with the reason where they cannot."""
    if isinstance(model, LowerStage):
        return model
    raise ValueError(f"nothing can be grown upon a {model.config.kind!r} model: {model.growth_obstacle}")


def standing(model: nn.Module) -> list[nn.Module]:
    """A model and the frozen ones below it, which are hidden from torch."""
    below = [standing(lower) for lower in getattr(model, "_hidden", ())]
    return [model, *(each for models in below for each in models)]


def check_video(video_BCTHW: Tensor, spatial: int) -> None:
    """Refuse what a trunk would only fail on later, or silently misread."""
    shape = tuple(video_BCTHW.shape)
    if len(shape) != 5 or shape[1] != 3 or shape[2] < 1:
        raise ValueError(f"expected a video (batch, 3, frames, rows, columns), got {shape}; unsqueeze(0) makes a batch of one clip")
    if shape[3] % spatial or shape[4] % spatial:
        raise ValueError(f"rows and columns must be multiples of {spatial}, got {shape[3]} x {shape[4]}: crop or resize first")
    if not video_BCTHW.is_floating_point():
        raise ValueError(f"expected floats in [-1, 1], got {video_BCTHW.dtype}: x / 127.5 - 1 converts bytes")


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of the state dict, independent of device and insertion order."""
    return tensors_digest(module.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """`weights_digest` of tensors by name."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
