"""Figures against their formulas."""

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from kinetok.tokenizers.metrics import Fidelity, clip_psnr, clip_ssim, frame_psnr, mean_frame


def test_clip_psnr_is_one_squared_error_over_the_clip() -> None:
    target = torch.rand(2, 3, 4, 8, 8) * 2 - 1
    video = target.clone()
    video[0] += 0.2
    video[1, :, 0] += 0.4
    expected = [10 * math.log10(4 / 0.04), 10 * math.log10(4 / (0.16 / 4))]
    assert clip_psnr(video, target).tolist() == pytest.approx(expected, rel=1e-4)


def test_frame_psnr_tells_the_frames_apart() -> None:
    target = torch.zeros(1, 3, 2, 8, 8)
    video = target.clone()
    video[:, :, 0] = 0.2
    assert frame_psnr(video, target).shape == (1, 2)
    assert frame_psnr(video, target)[0].tolist() == pytest.approx([20.0, math.inf])


def test_psnr_is_torchmetrics() -> None:
    video, target = torch.rand(2, 3, 4, 8, 8) * 2 - 1, torch.rand(2, 3, 4, 8, 8) * 2 - 1
    for ours, dim in ((clip_psnr, (1, 2, 3, 4)), (frame_psnr, (1, 3, 4))):
        torch.testing.assert_close(ours(video, target), peak_signal_noise_ratio(video, target, data_range=2.0, dim=dim, reduction="none"))


def test_ssim_is_one_for_equal_clips_and_falls_with_noise() -> None:
    target = torch.rand(3, 3, 2, 16, 16) * 2 - 1
    noisy = target + torch.tensor([0.0, 0.1, 0.5]).view(3, 1, 1, 1, 1) * torch.randn_like(target)
    ssim = clip_ssim(noisy, target)
    assert ssim.shape == (3,)
    assert ssim[0].item() == pytest.approx(1.0)
    assert ssim[0] > ssim[1] > ssim[2]


def test_a_clips_ssim_does_not_depend_on_its_company() -> None:
    target, video = torch.rand(2, 3, 2, 16, 16), torch.rand(2, 3, 2, 16, 16)
    torch.testing.assert_close(clip_ssim(video, target)[1:], clip_ssim(video[1:], target[1:]))


def test_figures_of_pieces_are_those_of_the_whole() -> None:
    target, video = torch.rand(2, 1, 3, 7, 16, 16) * 2 - 1
    fidelity = Fidelity()
    for piece, aim in zip(torch.split(video, [1, 4, 2], 2), torch.split(target, [1, 4, 2], 2), strict=True):
        fidelity.add(piece, aim)
    assert fidelity.frames == 7
    assert fidelity.psnr == pytest.approx(clip_psnr(video, target).item())
    assert fidelity.ssim == pytest.approx(clip_ssim(video, target).item())
    equal = Fidelity()
    equal.add(video, video)
    assert equal.psnr == math.inf and equal.ssim == pytest.approx(1)


def test_mean_frame_is_exact_for_still_clips_only() -> None:
    still = torch.rand(1, 3, 1, 4, 4).expand(-1, -1, 5, -1, -1)
    torch.testing.assert_close(mean_frame(still), still)
    moving = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(1, 3, 5, 4, 4)
    assert mean_frame(moving).unique().tolist() == [2.0]
