"""Growing: step-0 identity on both rungs, mixing, causality, what is frozen and what a saved folder holds."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kinetok.tokenizers.base import GrowthFeatures, Tokens, weights_digest
from kinetok.tokenizers.catalog import load
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.layers import repeat_frames
from kinetok.tokenizers.causal.rung import Rung

MakeVideo = Callable[..., torch.Tensor]


def assert_step_0_identity(model: GrownTokenizer, lower: Rung, video: torch.Tensor) -> None:
    latent = lower.encode(video[:, :, ::2]).values
    tokens = model.encode(video)
    torch.testing.assert_close(tokens.values, latent, rtol=0, atol=1e-12)
    repeated = lower.decode_features(repeat_frames(lower.heads.decoder_features(latent)))
    torch.testing.assert_close(model.decode(tokens), repeated.clamp(-1, 1), rtol=0, atol=1e-12)


def test_8x_starts_as_4x_on_every_second_frame(base: CausalTokenizer, grown: GrownTokenizer, make_video: MakeVideo) -> None:
    assert (grown.temporal, grown.spatial) == (8, 8)
    assert_step_0_identity(grown, base, make_video(17, clips=2))


def test_16x_starts_as_8x_on_every_second_frame(shaken: GrownTokenizer, twice_grown: GrownTokenizer, make_video: MakeVideo) -> None:
    assert (twice_grown.temporal, twice_grown.spatial) == (16, 8)
    assert_step_0_identity(twice_grown, shaken, make_video(33, clips=2))


def test_a_trained_rung_is_no_longer_the_lower_one(base: CausalTokenizer, shaken: GrownTokenizer, make_video: MakeVideo) -> None:
    video = make_video(17)
    assert (shaken.encode(video).values - base.encode(video[:, :, ::2]).values).abs().max() > 0.1


@pytest.mark.parametrize(("frame", "first_step"), [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2)])
def test_mixing_stays_causal(shaken: GrownTokenizer, make_video: MakeVideo, frame: int, first_step: int) -> None:
    video = make_video(17)
    changed = video.clone()
    changed[:, :, frame] += 0.5
    moved = (shaken.features(video) != shaken.features(changed)).any(1).flatten(2).any(2).any(0)
    assert moved.nonzero().flatten().tolist()[0] == first_step


@pytest.mark.parametrize("rung", ["shaken", "twice_grown"])
def test_first_latent_is_the_latent_of_the_image(rung: str, make_video: MakeVideo, request: pytest.FixtureRequest) -> None:
    model: GrownTokenizer = request.getfixturevalue(rung)
    video = make_video(17)
    torch.testing.assert_close(model.encode(video).values[:, :, :1], model.encode(video[:, :, :1]).values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 2, 8, 9, 10, 16, 17, 18, 40])
def test_any_number_of_frames_comes_back(twice_grown: GrownTokenizer, make_video: MakeVideo, frames: int) -> None:
    tokens = twice_grown.encode(make_video(frames))
    assert tokens.values.shape[2] == 1 + -(-(frames - 1) // 16)
    assert twice_grown.decode(tokens).shape == (1, 3, frames, 16, 16)


def test_ladder_computes_what_the_rates_share_once(
    base: CausalTokenizer, shaken: GrownTokenizer, twice_grown: GrownTokenizer, make_video: MakeVideo
) -> None:
    video = make_video(17)
    seen: list[int] = []
    hook = base.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    memoised = shaken.growth_features(video)
    hook.remove()
    assert sorted(seen) == [5, 9, 17]  # 31 frames; full and key one after the other would be 17 + 9 and 9 + 5
    torch.testing.assert_close(memoised.full_BDthw, shaken.features(video))
    torch.testing.assert_close(memoised.key_BDthw, shaken.features(video[:, :, ::2]))
    torch.testing.assert_close(twice_grown.mix(memoised), twice_grown.features(video))


def test_short_videos_are_padded_alike_for_full_and_key(grown: GrownTokenizer, make_video: MakeVideo) -> None:
    features = grown.growth_features(make_video(10))
    assert (features.full_BDthw.shape[2], features.key_BDthw.shape[2]) == (3, 2)


def test_training_reaches_every_new_weight_and_no_frozen_one(shaken: GrownTokenizer, make_video: MakeVideo) -> None:
    video = make_video(9)
    posterior = shaken.heads.posterior(shaken.features(video))
    (shaken.decode_latent(posterior.sample(torch.ones_like(posterior.mean_BZthw)), 9) - video).abs().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in shaken.parameters())
    assert all(weight.grad is None for weight in shaken.lower.parameters())


def test_step_0_already_learns(grown: GrownTokenizer, make_video: MakeVideo) -> None:
    video = make_video(9)
    (grown.decode_latent(grown.heads.posterior(grown.features(video)).mean_BZthw, 9) - video).abs().mean().backward()
    for layer in (grown.mix.down, grown.decoder.up.conv, grown.heads.to_posterior, grown.heads.from_latent):
        assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_lower_rung_is_hidden_from_optimizers_and_checkpoints_but_follows_moves(base: CausalTokenizer, grown: GrownTokenizer) -> None:
    theirs = {id(weight) for weight in base.parameters()}
    assert not theirs & {id(weight) for weight in grown.parameters()}
    assert base not in list(grown.modules())
    grown.train().float()
    assert not base.training and not any(weight.requires_grad for weight in base.parameters())
    assert next(base.parameters()).dtype == torch.float32


def test_copied_heads_are_new_weights(base: CausalTokenizer, grown: GrownTokenizer) -> None:
    before = weights_digest(base)
    with torch.no_grad():
        grown.heads.from_latent.weight.add_(1)
    assert weights_digest(base) == before


@pytest.mark.parametrize("rung", ["shaken", "twice_grown"])
def test_saved_folder_is_whole_by_itself(rung: str, tmp_path: Path, make_video: MakeVideo, request: pytest.FixtureRequest) -> None:
    model: GrownTokenizer = request.getfixturevalue(rung).float()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    video = make_video(17).float()
    assert isinstance(again, GrownTokenizer) and not again.training
    assert again.spec() == model.spec()
    assert torch.equal(again.encode(video).values, model.encode(video).values)
    assert torch.equal(again.decode(again.encode(video)), model.decode(model.encode(video)))
    assert GrownTokenizer.from_pretrained(tmp_path).spec() == model.spec()


def test_digest_covers_the_weights_of_every_rung(base: CausalTokenizer, twice_grown: GrownTokenizer) -> None:
    digests = {twice_grown.spec().weights}
    for model in (twice_grown, twice_grown.lower, base):
        with torch.no_grad():
            next(model.parameters()).add_(1)
        digests.add(twice_grown.spec().weights)
    assert len(digests) == 4


def test_digest_does_not_depend_on_device_type_of_copy(shaken: GrownTokenizer) -> None:
    assert copy.deepcopy(shaken).spec() == shaken.spec()


def test_key_step_modulates_the_two_fine_steps_it_ends(shaken: GrownTokenizer) -> None:
    full, key = torch.randn(1, 16, 5, 2, 2, dtype=torch.float64), torch.randn(1, 16, 3, 2, 2, dtype=torch.float64)
    changed = key.clone()
    changed[:, :, 1] += 1
    moved = (shaken.mix.modulate(full, key) != shaken.mix.modulate(full, changed)).any(1).flatten(2).any(2)[0]
    assert moved.nonzero().flatten().tolist() == [1, 2]
    assert shaken.mix(GrowthFeatures(full, key)).shape == key.shape


def test_what_cannot_be_grown_upon_is_refused(base: CausalTokenizer) -> None:
    with pytest.raises(ValueError, match="give it as lower"):
        GrownTokenizer.build(GrownConfig(groups=4))
    with pytest.raises(ValueError, match="does not divide the trunk width 16"):
        GrownTokenizer(GrownConfig(groups=5), base)
    with pytest.raises(ValueError, match="stands on its own"):
        CausalTokenizer.build(base.config, base)


def test_decode_needs_no_encoder(shaken: GrownTokenizer) -> None:
    latent = torch.zeros(2, 4, 3, 2, 2, dtype=torch.float64)
    assert shaken.decode(Tokens(latent, frames=13)).shape == (2, 3, 13, 16, 16)


@pytest.mark.slow
def test_compiles_without_graph_breaks(shaken: GrownTokenizer, make_video: MakeVideo) -> None:
    video = make_video(9)

    def reconstruct(video_BCTHW: torch.Tensor) -> torch.Tensor:
        return shaken.decode_latent(shaken.heads.posterior(shaken.features(video_BCTHW)).mean_BZthw, 9)

    torch.testing.assert_close(torch.compile(reconstruct, backend="eager", fullgraph=True)(video), reconstruct(video))
