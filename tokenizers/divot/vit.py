"""`FrozenViT`: the frozen vision transformer under Divot's tokenizer, and the resizing that belongs to it (arXiv 2412.04432, A.1).

The published one is OpenCLIP's ViT-H/14 on LAION-2B. Its features are those of the last block, neither normalised nor projected, which
is transformers' `last_hidden_state`; the class token is left out. Without a path there is an "untrained" one, with random weights of a
fixed seed, for runs without a network: it tells pictures apart, it does not understand them.

Legend: B clips, T frames of a clip, F frames, C channels, H W pixels, N patches, D width.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.tokenizers.base import Config, Count, Seeded, Tokens, TokenSpec, import_transformers, weights_digest
from kinetok.tokenizers.divot import frames

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels in [0, 1] that CLIP was trained on."""
MLP_RATIO = 4
UNTRAINED_SEED = 0
VIT = "vit"
"""What the token contract calls features that are cached."""


class VitConfig(Config):
    """Which vision transformer; the numbers describe the published one, and are checked against what is found at `path`."""

    path: str | None = None
    """Folder or hub id of a CLIP vision model of transformers; None for an untrained one of these numbers."""
    edge: Count = 224
    """Pixels along an edge that frames are resized to."""
    patch: Count = 14
    """Pixels along an edge of one patch."""
    width: Count = 1280
    depth: Count = 32
    heads: Count = 16

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.edge % self.patch or self.width % self.heads:
            raise ValueError(f"patch {self.patch} must divide edge {self.edge}, and heads {self.heads} the width {self.width}")
        return self

    @property
    def patches(self) -> int:
        """Patches of one frame."""
        return (self.edge // self.patch) ** 2

    @property
    def title(self) -> str:
        """What it is called where people read of it."""
        return self.path or f"untrained ({self.depth} layers of {self.width})"


class FrozenViT(nn.Module):
    """Frames in [-1, 1] to patch features. Never trained: its features are cached."""

    worth_compiling: ClassVar[bool] = True

    def __init__(self, config: VitConfig, model: "CLIPVisionModel") -> None:
        super().__init__()
        self.config = config
        self.model = model.train(False).requires_grad_(False)

    @classmethod
    def load(cls, config: VitConfig) -> Self:
        """The model at `config.path`, or an untrained one; ValueError where its numbers are others than the config's."""
        import_transformers()
        return cls(config, _untrained(config) if config.path is None else _pretrained(config, config.path))

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever is trained around it."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames_FCHW: Tensor) -> Tensor:
        """Features of the last block for each patch in the order of rows and columns, (F, N, D)."""
        pixels_FCHW = preprocess(frames_FCHW.float(), self.config.edge).to(self.model.dtype)
        features: Tensor = self.model(pixel_values=pixels_FCHW).last_hidden_state
        return features[:, 1:]

    def seen(self, window_BCTHW: Tensor, count: int) -> Tensor:
        """Features of `count` frames of each window, equal steps apart, (B, `count`, N, D)."""
        chosen_BCTHW = window_BCTHW[:, :, frames.sparse_indices(window_BCTHW.shape[2], count)]
        return torch.unflatten(self(chosen_BCTHW.transpose(1, 2).flatten(0, 1)), 0, (-1, count))

    def digest(self) -> str:
        """sha256 over the weights."""
        return weights_digest(self.model)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in transformers' format."""
        self.model.save_pretrained(folder)


class ClipFeatures(nn.Module):
    """A frozen vision transformer on the frames of a clip that Divot sees, as what caches them takes it: each clip is one window."""

    def __init__(self, vit: FrozenViT, count: int) -> None:
        super().__init__()
        self.vit = vit
        self.count = count

    def spec(self) -> TokenSpec:
        """Patches of single frames, as a sequence of continuous tokens."""
        config = self.vit.config
        return TokenSpec(
            tokenizer=VIT, weights=self.vit.digest(), layout="sequence", channels=config.width, temporal=1, spatial=config.patch
        )

    def encode(self, video_BCTHW: Tensor) -> Tokens:
        """Features (B, F, N, D) of a video in [-1, 1]."""
        return Tokens(self.vit.seen(video_BCTHW, self.count), frames=video_BCTHW.shape[2])


def preprocess(frames_FCHW: Tensor, edge: int) -> Tensor:
    """Frames in [-1, 1] as CLIP sees them, `edge` x `edge` pixels: bicubic between the corners, not clamped, CLIP's mean and deviation.

    Before an axis shrinks it is blurred with a deviation of half of what the factor exceeds 1 by: nothing at 256 -> 224, the sizes
    that Divot was trained with.
    """
    rows, columns = frames_FCHW.shape[-2:]
    x_FCHW = frames_FCHW
    if (rows, columns) != (edge, edge):
        if max(rows, columns) > edge:
            x_FCHW = _blur(_blur(x_FCHW, columns / edge).mT, rows / edge).mT
        x_FCHW = F.interpolate(x_FCHW, size=(edge, edge), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(values, device=x_FCHW.device, dtype=x_FCHW.dtype)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((x_FCHW + 1) / 2 - mean) / std


def _blur(x_FCHW: Tensor, factor: float) -> Tensor:
    """Gaussian blur along the last axis, which is to shrink by `factor`; edges are reflected."""
    sigma = max((factor - 1) / 2, 0.001)
    taps = int(max(4 * sigma, 3)) | 1
    offset = torch.arange(taps, device=x_FCHW.device, dtype=x_FCHW.dtype) - taps // 2
    kernel = torch.softmax(-offset.square() / (2 * sigma**2), dim=0)
    padded = F.pad(x_FCHW, (taps // 2, taps // 2, 0, 0), mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None, None]).view_as(x_FCHW)


def _settings(config: VitConfig) -> "CLIPVisionConfig":
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=MLP_RATIO * config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        image_size=config.edge,
        patch_size=config.patch,
        hidden_act="gelu",
    )


def _untrained(config: VitConfig) -> "CLIPVisionModel":
    """A vision transformer of a fixed seed; needs no file."""
    from transformers import CLIPVisionModel

    with Seeded(UNTRAINED_SEED):
        return CLIPVisionModel(_settings(config))


def _pretrained(config: VitConfig, path: str) -> "CLIPVisionModel":
    """What is saved at `path`; weights are read from safetensors alone, never unpickled."""
    from transformers import CLIPVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = CLIPVisionModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
    found = model.config
    wanted = _settings(config)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    wrong = [
        f"{name} {getattr(found, name)}, not {getattr(wanted, name)}" for name in names if getattr(found, name) != getattr(wanted, name)
    ]
    if wrong:
        raise ValueError(f"{path} is another vision transformer than the config says: {', '.join(wrong)}")
    return model
