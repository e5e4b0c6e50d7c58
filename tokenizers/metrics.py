"""Reconstruction figures per clip: PSNR, and SSIM by torchmetrics' functional interface; pixels are in [-1, 1].

torchmetrics is imported where SSIM is first asked for: it takes seconds (scipy and transformers come with it), and neither planning a job
nor a training, whose validation is in PSNR, should wait for it.

Legend: B clips, C channels, T H W frames, rows, columns.
"""

import math

import torch
from torch import Tensor

RANGE = 2.0


def clip_psnr(video_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB from one mean squared error over the whole clip, (B,); infinite where the two are equal."""
    return _psnr(video_BCTHW, target_BCTHW, dim=(1, 2, 3, 4))


def frame_psnr(video_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each frame, (B, T)."""
    return _psnr(video_BCTHW, target_BCTHW, dim=(1, 3, 4))


def clip_ssim(video_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """Structural similarity (Gaussian window 11, sigma 1.5), the mean over a clip's frames, (B,). Needs 6 rows and columns or more."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    frames, targets = (x.transpose(1, 2).flatten(0, 1).float() for x in (video_BCTHW, target_BCTHW))
    ssim = structural_similarity_index_measure(frames, targets, data_range=(-1.0, 1.0), reduction="none")
    assert isinstance(ssim, Tensor)
    return ssim.view(video_BCTHW.shape[0], -1).mean(1)


class Fidelity:
    """`clip_psnr` and `clip_ssim` of one video whose pieces come one after the other; at work on one frame at a time."""

    def __init__(self) -> None:
        import torchmetrics.functional.image  # noqa: F401 - here, so that it takes no time of what is measured

        self.frames = 0
        self._squares = self._numbers = self._ssim = 0.0

    def add(self, video_BCTHW: Tensor, target_BCTHW: Tensor) -> None:
        """The next frames, B = 1."""
        for video, target in zip(torch.split(video_BCTHW, 1, 2), torch.split(target_BCTHW, 1, 2), strict=True):
            self._squares += float((video.double() - target.double()).square().sum())
            self._numbers += target.numel()
            self._ssim += float(clip_ssim(video, target))
            self.frames += 1

    @property
    def psnr(self) -> float:
        """In dB, from one mean squared error over all frames; infinite where the two are equal."""
        return 10 * math.log10(RANGE**2 * self._numbers / self._squares) if self._squares else math.inf

    @property
    def ssim(self) -> float:
        """The mean over frames."""
        return self._ssim / self.frames


def mean_frame(video_BCTHW: Tensor) -> Tensor:
    """The clip's temporal mean standing still: the baseline that a reconstruction has to beat."""
    return video_BCTHW.mean(2, keepdim=True).expand_as(video_BCTHW)


def _psnr(video_BCTHW: Tensor, target_BCTHW: Tensor, dim: tuple[int, ...]) -> Tensor:
    squares = (video_BCTHW.float() - target_BCTHW.float()).square().mean(dim)
    return 10 * torch.log10(RANGE**2 / squares)
