"""Growing: step-0 identity on both rungs and in every mode, mixing, causality, what is frozen and what a saved folder holds."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tests.tokenizers.causal.conftest import shake

from kinetok.tokenizers.base import GrowthFeatures, Tokens, weights_digest
from kinetok.tokenizers.catalog import load
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.layers import repeat_frames
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.streaming import DecodeStream

MakeVideo = Callable[..., torch.Tensor]


MODES: list[dict[str, object]] = [
    {},
    {"norm": "group"},
    {"mix": "concat"},
    {"mix": "dual"},
    {"ada": "scale"},
    {"ada": "none"},
    {"cond": "spatial"},
    {"mix": "dual", "ada": "scale", "cond": "spatial"},
    {"norm": "std"},
    {"unfreeze_decoder": "last"},
    {"unfreeze_decoder": "all"},
]
"""Every one with a key path."""
ABLATIONS: list[dict[str, object]] = [{"key": False}, {"key": False, "ada": "none"}]


def grow(lower: Rung, mode: dict[str, object]) -> GrownTokenizer:
    torch.manual_seed(1)
    return GrownTokenizer(GrownConfig.model_validate({"blocks": 1, "groups": 4} | mode), lower).double().eval()


def assert_step_0_identity(model: GrownTokenizer, lower: Rung, video: torch.Tensor) -> None:
    """The lower rung's latents of every second frame, and its decoder on repeated features."""
    latent = lower.encode(video[:, :, ::2]).values
    tokens = model.encode(video)
    torch.testing.assert_close(tokens.values[:, : lower.heads.z], latent, rtol=0, atol=1e-12)
    repeated = lower.decode_features(repeat_frames(lower.heads.decoder_features(latent)))
    torch.testing.assert_close(model.decode(tokens), repeated.clamp(-1, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_8x_starts_as_4x_and_16x_as_8x_on_every_second_frame(base: CausalTokenizer, make_video: MakeVideo, mode: dict[str, object]) -> None:
    grown = grow(base, mode)
    assert (grown.temporal, grown.spatial) == (8, 8)
    assert_step_0_identity(grown, base, make_video(17, clips=2))
    shake(grown)
    top = grow(grown, mode)
    assert (top.temporal, top.spatial) == (16, 8)
    assert_step_0_identity(top, grown, make_video(33))


@pytest.mark.parametrize("part", ["none", "last", "all"])
def test_a_frozen_adagn_has_its_style_from_the_rung_above(
    adaptive: CausalTokenizer, make_video: MakeVideo, tmp_path: Path, part: str
) -> None:
    """Growing needs no latent of the lower rate, whoever trains the decoder; at first a frame's style stands for each frame made of it."""
    grown = grow(adaptive, {"unfreeze_decoder": part})
    assert_step_0_identity(grown, adaptive, make_video(17, clips=2))
    video = make_video(17)
    shake(grown).save_pretrained(tmp_path)
    again = load(tmp_path).double()
    torch.testing.assert_close(again.decode(again.encode(video)), grown.decode(grown.encode(video)), rtol=0, atol=1e-4)


def test_dual_keeps_key_and_residual_apart(base: CausalTokenizer, make_video: MakeVideo) -> None:
    grown = grow(base, {"mix": "dual"})
    video = make_video(17)
    before = grown.encode(video).values
    assert (grown.heads.z, grown.spec().channels, grown.feature_channels, grown.decoder_channels) == (8, 8, 32, 16)
    with torch.no_grad():
        grown.mix.down.weight.mul_(2)
    after = grown.encode(video).values
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-3


def test_without_a_key_path_the_key_features_do_nothing(base: CausalTokenizer) -> None:
    full, key = torch.randn(1, 16, 5, 2, 2, dtype=torch.float64), torch.randn(1, 16, 3, 2, 2, dtype=torch.float64)
    alone = shake(grow(base, {"key": False, "ada": "none"})).mix
    assert torch.equal(alone(GrowthFeatures(full, key)), alone(GrowthFeatures(full, key + 1)))
    modulated = shake(grow(base, {"key": False})).mix
    assert not torch.equal(modulated(GrowthFeatures(full, key)), modulated(GrowthFeatures(full, key + 1)))
    with pytest.raises(ValidationError, match="nothing to concat"):
        GrownConfig(key=False, mix="concat")


@pytest.mark.parametrize("mode", ABLATIONS, ids=str)
def test_without_a_key_path_the_features_keep_their_amplitude(
    base: CausalTokenizer, make_video: MakeVideo, mode: dict[str, object]
) -> None:
    """What is left out is the key path alone: at first u is every second step of the full-rate features, not a normalised one."""
    grown, video = grow(base, mode), 0.1 * make_video(17)
    torch.testing.assert_close(grown.features(video), base.features(video)[:, :, ::2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", ["last", "all"])
def test_an_unfrozen_decoder_is_a_copy_of_the_rungs_own(base: CausalTokenizer, make_video: MakeVideo, tmp_path: Path, part: str) -> None:
    """What is trained above is what decodes, here, in a rung on top, in a stream and out of a folder; the rung below stays as it was."""
    video, before = make_video(17), base.digest()
    grown = shake(grow(base, {"unfreeze_decoder": part})).requires_grad_(False)
    tokens = grown.encode(video)
    moved = grown.decode(tokens)
    with torch.no_grad():
        grown.below[-1].to_pixels.bias.add_(0.25)
    assert grown.digest() != before and base.digest() == before
    assert (grown.decode_latent(tokens.values, 17) - moved).abs().max() > 0.2
    top = grow(grown, {})
    latent = top.encode(video)
    repeated = grown.decode_features(repeat_frames(grown.heads.decoder_features(grown.encode(video[:, :, ::2]).values)))
    torch.testing.assert_close(top.decode(latent), repeated.clamp(-1, 1), rtol=0, atol=1e-12)
    stream = DecodeStream(grown)
    pieces = torch.cat([stream.push(tokens.values[:, :, :1]), stream.push(tokens.values[:, :, 1:])], dim=2)
    torch.testing.assert_close(pieces, grown.decode(tokens), rtol=0, atol=1e-11)
    higher = shake(grow(grown, {"unfreeze_decoder": part}))
    for model in (grown, higher):
        model.save_pretrained(tmp_path / str(model.temporal))
        again = load(tmp_path / str(model.temporal)).double()
        torch.testing.assert_close(again.decode(again.encode(video)), model.decode(model.encode(video)), rtol=0, atol=1e-4)
    assert len(higher.below) == (1 if part == "last" else 3)


def test_modulation_by_position_moves_that_position_only(base: CausalTokenizer) -> None:
    full, key = torch.randn(1, 16, 3, 2, 2, dtype=torch.float64), torch.randn(1, 16, 2, 2, 2, dtype=torch.float64)
    changed = key.clone()
    changed[..., 0, 1] += 1
    for cond, positions in (("spatial", [1]), ("pooled_per_frame", [0, 1, 2, 3])):
        modulate = shake(grow(base, {"cond": cond})).mix.modulate
        moved = (modulate(full, key) != modulate(full, changed)).any(2).any(1).flatten().nonzero().flatten()
        assert moved.tolist() == positions


@pytest.mark.parametrize("mode", MODES + ABLATIONS, ids=str)
def test_one_training_step_reaches_every_new_weight_and_no_frozen_one(
    base: CausalTokenizer, make_video: MakeVideo, mode: dict[str, object]
) -> None:
    top = shake(grow(shake(grow(base, mode)), mode))
    before, video = top.lower.digest(), make_video(17)
    optimizer = torch.optim.AdamW(top.parameters(), lr=1e-3)
    posterior = top.heads.posterior(top.features(video))
    (top.decode_latent(posterior.sample(torch.ones_like(posterior.mean_BZthw)), 17) - video).abs().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in top.parameters())
    assert all(weight.grad is None for weight in (*top.lower.parameters(), *base.parameters()))
    own = weights_digest(top)
    optimizer.step()
    assert weights_digest(top) != own
    assert top.lower.digest() == before


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


@pytest.mark.parametrize(("rung", "frames"), [("base", [17]), ("shaken", [17, 9]), ("twice_grown", [17, 9, 5])])
def test_what_the_rates_share_is_computed_once(
    rung: str, frames: list[int], base: CausalTokenizer, make_video: MakeVideo, request: pytest.FixtureRequest
) -> None:
    """17, 26 = 1.53 x 17 and 31 = 1.82 x 17 frames go through the base trunk at 4x, 8x and 16x; without sharing 16x takes 40."""
    model: Rung = request.getfixturevalue(rung)
    seen: list[int] = []
    hook = base.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    model.encode(make_video(17))
    hook.remove()
    assert sorted(seen, reverse=True) == frames


def test_memoised_ladder_equals_the_naive_one(shaken: GrownTokenizer, twice_grown: GrownTokenizer, make_video: MakeVideo) -> None:
    video = make_video(17)
    memoised = shaken.growth_features(video)
    torch.testing.assert_close(memoised.full_BDthw, shaken.features(video))
    torch.testing.assert_close(memoised.key_BDthw, shaken.features(video[:, :, ::2]))
    torch.testing.assert_close(twice_grown.mix(memoised), twice_grown.features(video))


def test_short_videos_are_padded_alike_for_full_and_key(grown: GrownTokenizer, make_video: MakeVideo) -> None:
    features = grown.growth_features(make_video(10))
    assert (features.full_BDthw.shape[2], features.key_BDthw.shape[2]) == (3, 2)


@pytest.mark.parametrize("mode", MODES + ABLATIONS, ids=str)
def test_step_0_already_learns(base: CausalTokenizer, make_video: MakeVideo, mode: dict[str, object]) -> None:
    grown, video = grow(base, mode), make_video(9)
    (grown.decode_latent(grown.heads.posterior(grown.features(video)).mean_BZthw, 9) - video).abs().mean().backward()
    learning = {name.rpartition(".")[0] for name, weight in grown.named_parameters() if weight.grad is not None and weight.grad.any()}
    heads = {"heads.key.to_posterior", "heads.key.from_latent", "heads.residual.from_latent"}
    first = heads if mode.get("mix") == "dual" else {"heads.to_posterior", "heads.from_latent", "mix.down"}
    assert {"decoder.up.conv", *first} <= learning


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


@pytest.mark.parametrize("mode", [{}, {"mix": "dual"}, {"key": False}], ids=str)
def test_tokens_of_cached_features_are_those_of_the_video(base: CausalTokenizer, make_video: MakeVideo, mode: dict[str, object]) -> None:
    grown, video = grow(base, mode), make_video(17, clips=2)
    shake(grown)
    cached, spec = base.growth_features(video), base.spec()
    found = grown.encode_features({"full": cached.full_BDthw, "key": cached.key_BDthw}, 17)
    assert found.frames == 17 and torch.equal(found.values, grown.encode(video).values)
    assert grown.feature_spec() == spec.model_copy(update={"content": "features", "channels": base.feature_channels})
