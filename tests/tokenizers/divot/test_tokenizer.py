"""Windows, tokens and the way back to video."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kinetok.tokenizers.base import Tokens
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.divot.released import frame_autoencoder
from kinetok.tokenizers.divot.tokenizer import DivotConfig, DivotTokenizer, latent_space
from kinetok.tokenizers.divot.vit import ClipFeatures


def test_tokens_are_normalised_and_depend_on_the_video_alone(model: DivotTokenizer, video: Tensor) -> None:
    tokens = model.encode(video)
    assert tokens.values.shape == (2, 4, 8) and tokens.frames == 5
    torch.testing.assert_close(tokens.values.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.values.var(-1, correction=0), torch.ones(2, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(model.encode(video[1:]).values, tokens.values[1:])
    assert not torch.allclose(tokens.values[0], tokens.values[1])


def test_frames_between_those_that_are_seen_do_not_matter(model: DivotTokenizer, video: Tensor) -> None:
    changed = video.clone()
    changed[:, :, [1, 3]] = 0
    assert torch.equal(model.encode(changed).values, model.encode(video).values)


def test_windows_follow_one_another_and_the_last_is_filled_up(model: DivotTokenizer, video: Tensor) -> None:
    long = torch.cat([video, video[:, :, :2]], dim=2)
    tokens = model.encode(long)
    assert tokens.values.shape == (2, 8, 8) and tokens.frames == 7
    torch.testing.assert_close(tokens.values[:, :4], model.encode(video).values)
    still = torch.cat([video[:, :, :2], video[:, :, 1:2].expand(-1, -1, 3, -1, -1)], dim=2)
    torch.testing.assert_close(tokens.values[:, 4:], model.encode(still).values)
    assert model.decode(tokens).shape == long.shape


def test_decoding_depends_on_seeds_and_not_on_the_company(model: DivotTokenizer, video: Tensor) -> None:
    tokens = model.encode(video)
    both = model.decode(tokens, seeds=[3, 4])
    assert both.shape == video.shape and both.abs().max() <= 1
    torch.testing.assert_close(model.decode(Tokens(tokens.values[1:], 5), seeds=[4]), both[1:])
    assert torch.equal(model.decode(tokens, seeds=[3, 4]), both)
    assert not torch.allclose(model.decode(tokens), both)


def test_the_digest_is_that_of_what_decides_tokens(model: DivotTokenizer) -> None:
    before = model.spec()
    with torch.no_grad():
        model.detokenizer.unet.to_latent.weight.add_(1)
    assert model.spec() == before
    with torch.no_grad():
        model.encoder.norm.bias.add_(1)
    assert before.difference(model.spec()) is not None
    assert (before.layout, before.channels, before.temporal, before.spatial) == ("sequence", 8, 5, 16)


def test_frozen_models_are_no_part_of_the_weights_but_move_along(model: DivotTokenizer) -> None:
    own = {id(weight) for weight in model.parameters()}
    assert not own & {id(weight) for frozen in (model.vit, model.lower) for weight in frozen.parameters()}
    model.double()
    assert {weight.dtype for frozen in (model.vit, model.lower) for weight in frozen.parameters()} == {torch.float64}


def test_saved_models_come_back_whole(model: DivotTokenizer, video: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = DivotTokenizer.from_pretrained(tmp_path)
    assert again.spec() == model.spec() and again.config == model.config
    tokens = model.encode(video)
    assert torch.equal(again.decode(tokens), model.decode(tokens))


def test_features_are_standardised_by_those_of_some_clips(model: DivotTokenizer, video: Tensor) -> None:
    features = model.vit_features(torch.cat([video, video.flip(1)]))
    before = model.spec()
    model.encoder.fit_statistics(features)
    assert before.difference(model.spec()) is not None
    standard = (features - model.encoder.mean_ND) / model.encoder.std_D
    torch.testing.assert_close(standard.mean((0, 1)), torch.zeros(16, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.square().mean((0, 1, 2)), torch.ones(16))
    shifted = model.encoder(features)
    model.encoder.fit_statistics(3 * features + 5)
    torch.testing.assert_close(model.encoder(3 * features + 5), shifted, atol=1e-4, rtol=1e-4)


def test_position_bound_tokens(config: DivotConfig, rung: CausalTokenizer, video: Tensor) -> None:
    encoder = config.encoder.model_copy(update={"perceiver": None})
    model = DivotTokenizer.build(config.model_copy(update={"encoder": encoder}), rung).eval()
    assert encoder.tokens == 12
    assert model.decode(model.encode(video)).shape == video.shape
    assert model.encode(video).values.shape == (2, 12, 8)


def test_an_image_autoencoder_brings_its_scale(config: DivotConfig, video: Tensor) -> None:
    model = DivotTokenizer.build(config, frame_autoencoder(32, (1, 2), 1)).eval()
    assert model.latent_size == (5, 8, 8)
    latent = model.lower.encode(video)
    assert latent.values.shape == (2, 4, 5, 8, 8)
    torch.testing.assert_close(model.detokenizer.normalise(latent.values), latent.values * 0.18215)
    torch.testing.assert_close(model.detokenizer.denormalise(model.detokenizer.normalise(latent.values)), latent.values)
    assert model.decode(model.encode(video)).shape == video.shape


@pytest.mark.parametrize("image", [False, True])
def test_half_precision_is_near(config: DivotConfig, rung: CausalTokenizer, video: Tensor, image: bool) -> None:
    torch.manual_seed(0)
    model = DivotTokenizer.build(config, frame_autoencoder(32, (1, 2), 1) if image else rung).eval()
    tokens = model.encode(video)
    decoded = model.decode(tokens)
    model.bfloat16()
    rounded = model.encode(video)
    assert rounded.values.dtype == torch.float32
    torch.testing.assert_close(rounded.values, tokens.values, atol=0.1, rtol=0)
    torch.testing.assert_close(model.decode(tokens).float(), decoded, atol=0.1, rtol=0)


def test_what_does_not_fit_is_refused(model: DivotTokenizer, config: DivotConfig, rung: CausalTokenizer, video: Tensor) -> None:
    with pytest.raises(ValueError, match="16 pixels square"):
        model.encode(torch.zeros(1, 3, 5, 16, 32))
    with pytest.raises(ValueError, match="lower: none is given"):
        latent_space(None)
    with pytest.raises(ValueError, match="'divot' model is not one"):
        latent_space(model)
    wrong = config.detokenizer.model_copy(update={"unet": config.detokenizer.unet.model_copy(update={"z": 3})})
    with pytest.raises(ValueError, match="4 latent channels, the config 3"):
        DivotTokenizer.build(config.model_copy(update={"detokenizer": wrong}), rung)
    with pytest.raises(ValueError, match="leave the class token out"):
        model.encoder(torch.zeros(1, 3, 17, 16))
    with pytest.raises(ValueError, match="std_Z"):
        model.detokenizer.set_statistics(torch.zeros(4), torch.zeros(4))


def test_tokens_of_cached_features_are_those_of_the_video(model: DivotTokenizer, video: Tensor) -> None:
    cached = ClipFeatures(model.vit, model.config.encoder.frames)
    found = model.encode_features({"tokens": cached.encode(video).values}, 5)
    assert found.frames == 5 and torch.equal(found.values, model.encode(video).values)
    assert model.feature_spec() == cached.spec()
