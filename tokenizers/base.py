"""What every tokenizer offers: `TokenSpec`, `Tokens`, the `Tokenizer` base and the `LowerStage` protocol.

Legend: B clips, C channels, T H W pixels (frames, rows, columns), t h w latents, N tokens, D width.
Pixels are float in [-1, 1]. Pure torch: no Ray, no files beyond `save_pretrained` / `from_pretrained`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

Count = Annotated[StrictInt, Field(ge=1)]


class ModelConfig(BaseModel):
    """Frozen, strict configuration of a model; `kind` tells the catalog which class it builds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=())


class DecodeRecipe(ModelConfig):
    """How pixels reached the tokenizer: part of the token contract, because other pixels make other tokens."""

    fps: float
    frames: int
    height: int
    width: int


class TokenSpec(ModelConfig):
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

    def difference(self, other: "TokenSpec") -> str | None:
        """The first differing field as `field: mine, other`, or None where the two agree."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: {mine}, {theirs}"
        return None


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
    """Video to tokens and back. Subclasses set `config_class` and take their config as only argument."""

    config_class: ClassVar[type[ModelConfig]]
    config: ModelConfig

    @abstractmethod
    def spec(self) -> TokenSpec:
        """The contract of this model's tokens, with the digest of its present weights."""

    @abstractmethod
    def encode(self, video_BCTHW: Tensor) -> Tokens:
        """Tokens of a video in [-1, 1] of any number of frames; deterministic."""

    @abstractmethod
    def decode(self, tokens: Tokens) -> Tensor:
        """The video in [-1, 1], `tokens.frames` long."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (shared tensors are not supported)."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG_FILE).write_text(json.dumps(self.config.model_dump(mode="json"), indent=1, sort_keys=True))
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, target / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model saved in `folder`, in eval mode; raises on missing or unexpected weights."""
        source = Path(folder)
        config = cls.config_class.model_validate_json((source / CONFIG_FILE).read_text())
        model = cls(config)
        model.load_state_dict(load_file(source / WEIGHTS_FILE), strict=True)
        return model.eval()


class LowerStage(Protocol):
    """What a frozen lower rung must offer to be grown upon (docs/architecture.md, "Growing")."""

    @property
    def feature_channels(self) -> int:
        """Width D of the trunk features."""

    @property
    def temporal(self) -> int:
        """Frames of one latent step."""

    def features(self, video_BCTHW: Tensor) -> Tensor:
        """Encoder trunk features before the head, (B, D, t, h, w)."""

    def growth_features(self, video_BCTHW: Tensor) -> GrowthFeatures:
        """Features of the video and of its every second frame, computing what the two share only once."""

    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        """Video from decoder trunk features, unclamped, with gradient to them."""


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of the state dict, independent of device and insertion order."""
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
