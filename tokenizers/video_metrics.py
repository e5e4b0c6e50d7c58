"""Figures of generated and reconstructed videos that need networks somebody else trained: CLIPSIM, and the Fréchet distance of I3D (FVD).

Weights come by path or id; without them a figure is not measured, and nothing stands in for it. CLIPSIM is the mean over frames of the
cosine between CLIP's embeddings of frame and caption (arXiv 2104.14806). The Fréchet distance (arXiv 1812.01717) is between Gaussians
fitted to 400 logits of I3D on Kinetics; covariances are over N, not N - 1. Figures of other protocols (clips, length, resizing, number of
samples) do not compare, so a report has to name them.

Not covered: embeddings of whole videos, precision and recall.

Legend: B clips, N samples, C channels, T H W frames, rows, columns, D features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.tokenizers.base import import_transformers
from kinetok.tokenizers.divot.vit import CLIP_MEAN, CLIP_STD

I3D_EDGE: Final = 224
I3D_FRAMES: Final = 10
"""Fewer frames than this do not survive its strides."""


class ClipSim:
    """A CLIP of transformers, by folder or hub id."""

    def __init__(self, path: str, device: torch.device | None = None) -> None:
        """ValueError or OSError where there is none; weights are read from safetensors alone."""
        import_transformers()
        from transformers import AutoConfig, AutoTokenizer, CLIPModel

        self.device = device or torch.device("cpu")
        model: nn.Module = CLIPModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        config = AutoConfig.from_pretrained(path)
        self.edge, self.length = config.vision_config.image_size, config.text_config.max_position_embeddings
        self.model = model.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def __call__(self, video_BCTHW: Tensor, captions: Sequence[str]) -> Tensor:
        """Mean cosine of the frames of each video in [-1, 1] with its caption, (B,)."""
        text = self.tokenizer(list(captions), padding=True, truncation=True, max_length=self.length, return_tensors="pt").to(self.device)
        frames_FCHW = clip_pixels(video_BCTHW.to(self.device).transpose(1, 2).flatten(0, 1), self.edge)
        embedded = self.model(**text, pixel_values=frames_FCHW)
        frame_BTD = torch.unflatten(F.normalize(embedded.image_embeds, dim=-1), 0, (len(captions), -1))
        text_BD = F.normalize(embedded.text_embeds, dim=-1)
        cosine_B: Tensor = (frame_BTD * text_BD[:, None]).sum(-1).mean(1)
        return cosine_B.cpu()


def clip_pixels(frames_FCHW: Tensor, edge: int) -> Tensor:
    """Frames in [-1, 1] as CLIP was evaluated: the short side resized to `edge` (bicubic, antialiased), centre crop, normalised."""
    rows, columns = frames_FCHW.shape[-2:]
    size = [round(side * edge / min(rows, columns)) for side in (rows, columns)]
    resized = F.interpolate(frames_FCHW.float(), size=size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = ((side - edge) // 2 for side in size)
    cropped = resized[..., top : top + edge, left : left + edge]
    mean, std = (torch.tensor(values, device=cropped.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((cropped + 1) / 2 - mean) / std


class I3D:
    """The TorchScript file of I3D on Kinetics-400 that FVD is customarily measured with."""

    def __init__(self, file: str | Path, device: torch.device | None = None) -> None:
        """ValueError where the file is none."""
        self.device = device or torch.device("cpu")
        if not Path(file).is_file():
            raise ValueError(f"{file} is no file here: FVD needs I3D as TorchScript")
        try:
            self.model = torch.jit.load(str(file), map_location=self.device).eval()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ValueError(
                f"{file} is no TorchScript file: name what torch.jit.save wrote, such as i3d_torchscript.pt ({error})"
            ) from error

    @torch.no_grad()
    def __call__(self, video_BCTHW: Tensor) -> Tensor:
        """Features of each video in [-1, 1], (B, D) float64; the network itself resizes to 224 pixels. ValueError on short videos."""
        if video_BCTHW.shape[2] < I3D_FRAMES:
            raise ValueError(f"I3D needs {I3D_FRAMES} frames or more, these videos have {video_BCTHW.shape[2]}")
        features: Tensor = self.model(video_BCTHW.float().to(self.device), rescale=False, resize=True, return_features=True)
        return features.double().cpu()


def frechet(real_ND: Tensor, fake_ND: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    `caveat` says where there are too few of them.
    """
    (mean, cov), (other_mean, other_cov) = (_gaussian(x_ND.double()) for x_ND in (real_ND, fake_ND))
    # The trace of the root of a product of two covariances is the sum of the roots of its eigenvalues, which are real and not negative.
    roots = torch.linalg.eigvals(cov @ other_cov).real.clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * roots)


def caveat(real_ND: Tensor, fake_ND: Tensor) -> str | None:
    """What has to stand beside `frechet` of these features, None where there are enough of both.

    N samples have a covariance of rank N - 1 at most: with no more of them than features it is singular.
    """
    samples, features = min(len(real_ND), len(fake_ND)), real_ND.shape[1]
    if samples > features:
        return None
    return f"{samples} samples are too few for {features} features: their covariance is singular, many samples give another figure"


def _gaussian(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    mean = x_ND.mean(0)
    centred = x_ND - mean
    return mean, centred.T @ centred / len(x_ND)
