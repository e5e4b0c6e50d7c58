"""A video model that starts from an image model, or keeps its encoder for the first frame."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.tokenizers.causal.conftest import shake

from kinetok.tokenizers.base import weights_digest
from kinetok.tokenizers.catalog import load
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.layers import repeat_frames
from kinetok.tokenizers.causal.start import inflate_
from kinetok.tokenizers.causal.streaming import EncodeStream
from kinetok.tokenizers.causal.training import rungs_below

MakeVideo = Callable[..., torch.Tensor]
PATHS = ["inflate", "frozen2d"]


def of_path(base: CausalTokenizer, image_path: str) -> CausalConfig:
    return CausalConfig.model_validate(base.config.model_dump() | {"image_path": image_path})


@pytest.fixture
def image(base: CausalTokenizer) -> CausalTokenizer:
    """As if trained on single frames."""
    torch.manual_seed(3)
    return shake(CausalTokenizer(base.config.image).double().eval())


@pytest.fixture
def inflated(base: CausalTokenizer, image: CausalTokenizer, request: pytest.FixtureRequest) -> CausalTokenizer:
    """Untrained, of the path that the test names."""
    model = CausalTokenizer.build(of_path(base, request.param), image).double().eval()
    inflate_(model, image)  # again, in float64
    return model


def test_the_image_model_has_no_temporal_stride(base: CausalTokenizer, image: CausalTokenizer, make_video: MakeVideo) -> None:
    assert (image.temporal, image.spatial, image.config.widths) == (1, base.spatial, base.config.widths)
    assert image.encode(make_video(3)).values.shape[2] == 3


@pytest.mark.parametrize("inflated", PATHS, indirect=True)
def test_it_starts_as_the_image_model_on_every_fourth_frame(
    inflated: CausalTokenizer, image: CausalTokenizer, make_video: MakeVideo
) -> None:
    video = make_video(9)
    tokens = inflated.encode(video)
    alone = [image.encode(video[:, :, index : index + 1]) for index in (0, 4, 8)]
    torch.testing.assert_close(tokens.values, torch.cat([token.values for token in alone], dim=2), rtol=0, atol=1e-11)
    frames = torch.cat([image.decode(token) for token in alone], dim=2)
    repeated = repeat_frames(repeat_frames(frames))
    torch.testing.assert_close(inflated.decode(tokens), repeated, rtol=0, atol=1e-11)


@pytest.mark.parametrize("inflated", PATHS, indirect=True)
def test_first_latent_is_the_latent_of_the_image_after_training_too(
    inflated: CausalTokenizer, image: CausalTokenizer, make_video: MakeVideo
) -> None:
    shake(inflated)
    video = make_video(9)
    latent = inflated.encode(video).values
    torch.testing.assert_close(latent[:, :, :1], inflated.encode(video[:, :, :1]).values, rtol=0, atol=1e-12)
    same = torch.allclose(inflated.features(video)[:, :, :1], image.features(video[:, :, :1]), rtol=0, atol=1e-12)
    assert same == (inflated.config.image_path == "frozen2d")


@pytest.mark.parametrize("inflated", ["frozen2d"], indirect=True)
def test_the_image_encoder_stays_frozen_and_hidden(inflated: CausalTokenizer, image: CausalTokenizer, make_video: MakeVideo) -> None:
    before = weights_digest(image)
    optimizer = torch.optim.AdamW(inflated.parameters(), lr=1e-2)
    video = make_video(5)
    (inflated.decode_latent(inflated.heads.posterior(inflated.features(video)).mean_BZthw, 5) - video).abs().mean().backward()
    optimizer.step()
    assert weights_digest(image) == before
    assert rungs_below(inflated) == {"lower": image}
    assert image not in list(inflated.modules())


@pytest.mark.parametrize("inflated", PATHS, indirect=True)
def test_saved_folder_is_whole_by_itself(inflated: CausalTokenizer, tmp_path: Path, make_video: MakeVideo) -> None:
    shake(inflated).float().save_pretrained(tmp_path)
    again, video = load(tmp_path), make_video(5).float()
    assert again.spec() == inflated.spec()
    assert torch.equal(again.encode(video).values, inflated.encode(video).values)
    assert (tmp_path / "lower").is_dir() == (inflated.config.image_path == "frozen2d")


@pytest.mark.parametrize("inflated", ["frozen2d"], indirect=True)
def test_it_streams_and_is_grown_upon(inflated: CausalTokenizer, make_video: MakeVideo) -> None:
    grown = shake(GrownTokenizer(GrownConfig(blocks=1, groups=4), shake(inflated)).double().eval())
    video = make_video(17)
    stream = EncodeStream(grown)
    pieces = [stream.push(video[:, :, :1]), stream.push(video[:, :, 1:9]), stream.push(video[:, :, 9:])]
    torch.testing.assert_close(torch.cat(pieces, dim=2), grown.encode(video).values, rtol=0, atol=1e-11)
    naive = inflated.features(video[:, :, ::2])
    torch.testing.assert_close(inflated.growth_features(video).key_BDthw, naive)
    assert list(rungs_below(grown)) == ["lower", "lower.lower"]


def test_an_image_model_of_other_numbers_is_refused(base: CausalTokenizer, image: CausalTokenizer) -> None:
    with pytest.raises(ValueError, match=r"inflate needs the image model .* as lower, got none"):
        CausalTokenizer.build(of_path(base, "inflate"))
    with pytest.raises(ValueError, match=r"frozen2d needs the image model .*\"z\":4.* got .*\"z\":2"):
        CausalTokenizer.build(of_path(base, "frozen2d"), CausalTokenizer(base.config.image.model_copy(update={"z": 2})))
    with pytest.raises(ValueError, match="stands on its own"):
        CausalTokenizer.build(base.config, image)
