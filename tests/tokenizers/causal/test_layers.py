"""Layers against plain formulas, and their causality."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kinetok.tokenizers.causal import layers
from kinetok.tokenizers.causal.layers import (
    AdaptiveNorm,
    CausalConv3d,
    FrameNorm,
    Memory,
    ResBlock,
    Upsample,
    depth_to_space,
    frame_style,
    pad_frames,
    repeat_frames,
    space_to_depth,
)


def test_rms_norm_equals_its_formula_frame_by_frame() -> None:
    x = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    norm = FrameNorm(6, groups=2).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    for clip in range(2):
        for group in range(2):
            channels = slice(3 * group, 3 * group + 3)
            for frame in range(3):
                values = x[clip, channels, frame]
                expected = values / values.square().mean().add(1e-6).sqrt()
                expected = expected * norm.weight[channels].view(-1, 1, 1) + norm.bias[channels].view(-1, 1, 1)
                torch.testing.assert_close(norm(x)[clip, channels, frame], expected)


def test_group_kind_is_torchs_group_norm_of_each_frame() -> None:
    x = torch.randn(2, 6, 3, 4, 5) + 1
    norm = FrameNorm(6, groups=2, kind="group")
    for frame in range(3):
        torch.testing.assert_close(norm(x)[:, :, frame], F.group_norm(x[:, :, frame], 2, eps=1e-6))


def test_adaptive_norm_is_open_magvit2s_frame_by_frame() -> None:
    """GroupNorm without weights, times a linear map of the latent's deviations, plus one of its means (arXiv 2409.04410's code, whose
    deviations are unbiased and of the clip: those of a latent of one position would not be numbers)."""
    torch.manual_seed(0)
    x, latent = torch.randn(2, 6, 3, 4, 5) + 1, torch.randn(2, 4, 3, 2, 2)
    norm = AdaptiveNorm(4, 6, groups=2, norm="group")
    y = norm(x, frame_style(latent))
    for frame in range(3):
        values = latent[:, :, frame].flatten(2)
        scale, shift = norm.scale((values.var(-1, correction=0) + 1e-6).sqrt()), norm.shift(values.mean(-1))
        expected = F.group_norm(x[:, :, frame], 2, eps=1e-6) * scale[..., None, None] + shift[..., None, None]
        torch.testing.assert_close(y[:, :, frame], expected)


def test_std_kind_divides_by_the_deviation_and_leaves_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 4, 4).double() + 5
    y = FrameNorm(6, groups=2, kind="std").double()(x)
    centred = FrameNorm(6, groups=2, kind="group").double()(x)
    offset = (y - centred).unflatten(1, (2, 3))
    torch.testing.assert_close(offset, offset.mean((2, 4, 5), keepdim=True).expand_as(offset))
    assert offset.mean() > 3


def test_rms_norm_keeps_the_mean_that_group_norm_removes() -> None:
    x = torch.full((1, 4, 1, 2, 2), 3.0)
    torch.testing.assert_close(FrameNorm(4, groups=1)(x), torch.ones_like(x))
    torch.testing.assert_close(FrameNorm(4, groups=1, kind="group")(x), torch.zeros_like(x))


def test_norm_statistics_survive_half_precision() -> None:
    x = torch.full((1, 4, 1, 16, 16), 300.0, dtype=torch.float16)  # squares overflow float16
    y = FrameNorm(4, groups=1)(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y), atol=1e-3, rtol=0)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_convolution_sees_the_past_and_the_present_only(stride: tuple[int, int, int]) -> None:
    conv = CausalConv3d(2, 3, stride=stride).double()
    x = torch.randn(1, 2, 9, 4, 4, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 4] += 1
    moved = (conv(x) != conv(changed)).flatten(3).any(3).any(1).squeeze(0)
    first, last = (4, 6) if stride[0] == 1 else (2, 3)
    assert moved.nonzero().flatten().tolist() == list(range(first, last + 1))


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_upsample_gives_one_frame_for_the_first_step_and_two_for_each_further_one(frames: int) -> None:
    assert Upsample(4, 2, time=2, space=2)(torch.randn(1, 4, frames, 3, 3)).shape == (1, 2, 2 * frames - 1, 6, 6)
    assert Upsample(4, 2, time=1, space=2)(torch.randn(1, 4, frames, 3, 3)).shape == (1, 2, frames, 6, 6)


def test_upsample_is_causal() -> None:
    up = Upsample(2, 2, time=2, space=1)
    x = torch.randn(1, 2, 5, 4, 4)
    changed = x.clone()
    changed[:, :, 3:] += 1
    assert torch.equal(up(x)[:, :, :5], up(changed)[:, :, :5])
    assert not torch.equal(up(x)[:, :, 5], up(changed)[:, :, 5])


def test_depth_to_space_agrees_with_pixel_shuffle_and_space_to_depth_undoes_it() -> None:
    x = torch.randn(2, 12, 3, 4, 4)
    y = depth_to_space(x, time=1, space=2)
    # pixel_shuffle counts channels before offsets, we count offsets first
    ours_as_theirs = x[:, :, 0].view(2, 4, 3, 4, 4).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(y[:, :, 0], F.pixel_shuffle(ours_as_theirs, 2))
    assert torch.equal(space_to_depth(y, space=2), x)


def test_temporal_depth_to_space_interleaves_steps() -> None:
    early, late = torch.zeros(1, 2, 3, 1, 1), torch.ones(1, 2, 3, 1, 1)
    y = depth_to_space(torch.cat([early, late], dim=1), time=2, space=1)
    assert y[0, 0, :, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(("frames", "padded"), [(1, 1), (2, 5), (5, 5), (6, 9), (17, 17)])
def test_padding_repeats_the_last_frame_up_to_the_next_legal_length(frames: int, padded: int) -> None:
    x = torch.arange(frames, dtype=torch.float32).view(1, 1, -1, 1, 1)
    y = pad_frames(x, 4)
    assert y.flatten().tolist() == [min(frame, frames - 1) for frame in range(padded)]


def test_repeated_frames_stand_at_the_two_fine_steps_they_cover() -> None:
    assert repeat_frames(torch.arange(4).view(1, 1, 4, 1, 1)).flatten().tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_block_starts_as_the_identity_and_learns() -> None:
    block, x = ResBlock(4, 2), torch.randn(1, 4, 2, 3, 3)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.conv2.weight.grad is not None and block.conv2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("clips", [1, 2])
def test_channels_stay_last_in_memory(clips: int) -> None:
    x = torch.randn(clips, 8, 5, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    modules: tuple[nn.Module, ...] = (ResBlock(8, 2), CausalConv3d(8, 16, stride=(2, 2, 2)), Upsample(8, 4, time=2, space=2))
    for layer in modules:
        memory: Memory = {}
        for y in (layer(x), layer(x, memory), layer(x, memory)):
            assert y.stride(1) == 1 and y.shape[1] > 1, layer
    assert space_to_depth(x, space=2).is_contiguous(memory_format=torch.channels_last_3d)


class Convolutions(TorchFunctionMode):
    """Which convolution was called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in {F.conv3d, torch.conv3d, torch.mkldnn_convolution}:
            self.called.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_one_clip_is_convolved_by_onednn_and_gives_the_same(stride: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)  # float32 sums of either sign: what cancels differs in its last digits
    conv, x = CausalConv3d(4, 6, stride=stride), torch.randn(1, 4, 5, 6, 6, requires_grad=True)

    def convolved() -> tuple[Tensor, ...]:
        y = conv(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])

    with Convolutions() as one:
        ours = convolved()
    with Convolutions() as others:
        conv(x.expand(2, -1, -1, -1, -1))
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        copy.deepcopy(conv).double()(x.double())
    with monkeypatch.context() as patch:
        patch.setattr(layers, "leaves_onednn_out", lambda x: False)
        torch.testing.assert_close(convolved(), ours)
    assert one.called == [torch.mkldnn_convolution] and torch.mkldnn_convolution not in others.called
