"""The base rung: causality both ways, the image latent, any length, and a full-size model that exists on the meta device only."""

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from kinetok.tokenizers.base import Tokens
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer

MakeVideo = Callable[..., torch.Tensor]


def moved_steps(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Indices along time where two tensors differ at all."""
    return (before != after).any(1).flatten(2).any(2).any(0).nonzero().flatten().tolist()


@pytest.mark.parametrize(("frame", "first_step"), [(0, 0), (1, 1), (4, 1), (5, 2), (12, 3), (16, 4)])
def test_a_changed_frame_moves_only_its_latent_step_and_later_ones(
    base: CausalTokenizer, frame: int, first_step: int, make_video: MakeVideo
) -> None:
    video = make_video(17)
    changed = video.clone()
    changed[:, :, frame] += 0.5
    moved = moved_steps(base.features(video), base.features(changed))
    assert moved and moved[0] == first_step


@pytest.mark.parametrize("name", ["base", "adaptive"])
@pytest.mark.parametrize(("step", "first_frame"), [(0, 0), (1, 1), (2, 5), (4, 13)])
def test_a_changed_latent_step_moves_only_its_frames_and_later_ones(
    request: pytest.FixtureRequest, step: int, first_frame: int, name: str
) -> None:
    model: CausalTokenizer = request.getfixturevalue(name)
    latent = torch.randn(1, model.config.z, 5, 2, 2, dtype=torch.float64)
    changed = latent.clone()
    changed[:, :, step] += 0.5
    moved = moved_steps(model.decode_latent(latent, 17), model.decode_latent(changed, 17))
    assert moved and moved[0] == first_frame


def test_training_reaches_every_weight_of_an_adagn_decoder(adaptive: CausalTokenizer, make_video: MakeVideo) -> None:
    posterior = adaptive.heads.posterior(adaptive.features(make_video(9)))
    adaptive.decode_latent(posterior.sample(torch.ones_like(posterior.mean_BZthw)), 9).square().mean().backward()
    still = [name for name, weight in adaptive.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert not still and sum(".norms." in name for name, _ in adaptive.named_parameters()) == 4 * len(adaptive.config.widths)


def test_what_was_trained_before_there_was_adagn_keeps_its_key(base: CausalTokenizer, adaptive: CausalTokenizer) -> None:
    assert "adagn" not in base.config.model_dump() and adaptive.config.model_dump()["adagn"] is True


def test_first_latent_is_the_latent_of_the_image(base: CausalTokenizer, make_video: MakeVideo) -> None:
    video = make_video(17)
    torch.testing.assert_close(base.encode(video).values[:, :, :1], base.encode(video[:, :, :1]).values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", range(1, 41))
def test_any_number_of_frames_comes_back(base: CausalTokenizer, frames: int, make_video: MakeVideo) -> None:
    base.float()
    tokens = base.encode(make_video(frames).float())
    assert tokens.values.shape == (1, base.config.z, 1 + -(-(frames - 1) // 4), 2, 2)
    assert tokens.frames == frames
    assert base.decode(tokens).shape == (1, 3, frames, 16, 16)


def test_padding_repeats_the_last_frame(base: CausalTokenizer, make_video: MakeVideo) -> None:
    video = make_video(6)
    longer = torch.cat([video, video[:, :, -1:].repeat(1, 1, 3, 1, 1)], dim=2)
    torch.testing.assert_close(base.encode(video).values, base.encode(longer).values)


def test_clips_of_a_batch_do_not_touch_each_other(base: CausalTokenizer, make_video: MakeVideo) -> None:
    video = make_video(5, clips=3)
    torch.testing.assert_close(base.encode(video).values[1:2], base.encode(video[1:2]).values)


def test_decode_clamps_and_gradients_flow_through_decode_features(base: CausalTokenizer) -> None:
    loud = Tokens(torch.full((1, base.config.z, 1, 2, 2), 1e3, dtype=torch.float64), frames=1)
    assert base.decode(loud).abs().max() <= 1
    features = torch.randn(1, base.feature_channels, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    base.decode_features(features).sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0


def test_bfloat16_autocast_stays_close(base: CausalTokenizer, make_video: MakeVideo) -> None:
    base.float()
    video = make_video(5).float()
    exact = base.encode(video).values
    with torch.autocast("cpu", torch.bfloat16):
        rounded = base.encode(video)
        assert torch.isfinite(base.decode(rounded)).all()
    assert rounded.values.dtype == torch.float32
    torch.testing.assert_close(rounded.values, exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("shape", "told"),
    [((3, 5, 16, 16), "unsqueeze"), ((1, 1, 5, 16, 16), "batch, 3"), ((1, 3, 0, 16, 16), "frames"), ((1, 3, 5, 12, 16), "multiples of 8")],
)
def test_wrong_shapes_are_refused_with_the_remedy(base: CausalTokenizer, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        base.encode(torch.zeros(shape, dtype=torch.float64))


def test_bytes_are_refused(base: CausalTokenizer) -> None:
    with pytest.raises(ValueError, match=r"127\.5"):
        base.encode(torch.zeros((1, 3, 5, 16, 16), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"strides": ((1, 2),)}, "strides"),
        ({"groups": 48}, "groups"),
        ({"mult": (1, 2), "strides": ((3, 2),)}, "strides"),
        ({"chanels": 8}, "chanels"),
        ({"adagn": True}, "set start: random"),
    ],
)
def test_inconsistent_numbers_are_refused(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        CausalConfig.model_validate(wrong)
