"""`Networks`: CLIP, I3D and LPIPS, which somebody else trained, where a job names their weights; on the device of the stage.

What no job names is None here, and its figure `not measured`: nothing stands in for it. Arithmetic is float32 whatever the resources say.
Not covered: the figures themselves (`kinetok.tokenizers.video_metrics`, `kinetok.tokenizers.causal.perceptual`).

Legend: B videos, C T H W colours, frames, rows, columns, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from kinetok.infra.errors import ConfigError
from kinetok.infra.stage import Resources
from kinetok.tokenizers.causal.perceptual import Lpips, load_lpips
from kinetok.tokenizers.video_metrics import I3D, ClipSim

Network = TypeVar("Network")


@dataclass(frozen=True)
class Networks:
    """Figures of videos (B, 3, T, H, W) in [-1, 1], on the CPU, computed `size` videos at a time; None without the network."""

    device: torch.device
    size: int
    clip: ClipSim | None = None
    i3d: I3D | None = None
    lpips: Lpips | None = None

    @classmethod
    def open(cls, resources: Resources, *, clip: str | None = None, i3d: str | None = None, lpips: str | None = None) -> Self:
        """Those that are named; ConfigError where one cannot be had."""
        device = torch.device("cuda" if resources.gpus and torch.cuda.is_available() else "cpu")
        return cls(
            device,
            resources.batch_size,
            _opened("clip", clip, lambda path: ClipSim(path, device)),
            _opened("i3d", i3d, lambda path: I3D(path, device)),
            _opened("lpips", lpips, lambda path: load_lpips(path).to(device)),
        )

    def clipsim(self, video_BCTHW: Tensor, captions: Sequence[str]) -> Tensor | None:
        """Mean cosine of each video's frames with its caption, (B,)."""
        if self.clip is None:
            return None
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self.clip(video_BCTHW[part], captions[part]) for part in self._parts(len(captions))])

    def features(self, video_BCTHW: Tensor) -> Tensor | None:
        """Of I3D, (B, D) float64; ConfigError on videos that are too short for it."""
        if self.i3d is None:
            return None
        try:
            with torch.autocast(self.device.type, enabled=False):
                return torch.cat([self.i3d(video_BCTHW[part]) for part in self._parts(len(video_BCTHW))])
        except ValueError as error:
            raise ConfigError(f"i3d: {error}") from error

    @torch.no_grad()
    def distance(self, video_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor | None:
        """LPIPS between videos, (B,)."""
        if self.lpips is None:
            return None
        with torch.autocast(self.device.type, enabled=False):
            pairs = ((video_BCTHW[part], target_BCTHW[part]) for part in self._parts(len(video_BCTHW)))
            return torch.cat([self.lpips(video.to(self.device), target.to(self.device)).cpu() for video, target in pairs])

    def _parts(self, count: int) -> Iterator[slice]:
        return (slice(first, first + self.size) for first in range(0, count, self.size))


def _opened(field: str, path: str | None, load: Callable[[str], Network]) -> Network | None:
    try:
        return None if path is None else load(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}: {error}") from error
