"""Every adapter: what it computes is what its class computes, what it claims of time holds, and what it saves is what it loads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tokenizers.pretrained.conftest import RUNGS, TINY, Adapt, MakeModel, MakeVideo
from torch import Tensor

from kinetok.tokenizers.base import Tokens, lower_stage
from kinetok.tokenizers.card import CARD_FILE
from kinetok.tokenizers.catalog import build, load
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.layers import repeat_frames
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.tiling import LayerwiseTiling

FRAMES = 17


def decoded(model: Any, latent: Tensor) -> Tensor:
    """What the class itself decodes."""
    timestep = {"temb": torch.zeros(len(latent))} if model.config.get("timestep_conditioning") else {}
    found: Tensor = model.decode(latent, **timestep).sample
    return found


def moved(before: Tensor, after: Tensor) -> list[int]:
    """Steps or frames that differ."""
    return [step for step in range(before.shape[2]) if not torch.equal(before[:, :, step], after[:, :, step])]


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_tokens_and_pixels_are_those_of_the_class(name: str, make_model: MakeModel, adapt: Adapt, make_video: MakeVideo) -> None:
    model, video = make_model(name), make_video(FRAMES, clips=2)
    adapter, latent = adapt(model), model.encode(video).latent_dist.mode()
    tokens = adapter.encode(video)
    assert latent.std() > 0.05 and tokens.frames == FRAMES
    torch.testing.assert_close(tokens.values, latent, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.decode(tokens), decoded(model, latent).clamp(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNGS)
@torch.no_grad()
def test_a_rung_has_the_posterior_of_the_class_and_does_not_clamp(
    name: str, make_model: MakeModel, adapt: Adapt, make_video: MakeVideo
) -> None:
    model, video = make_model(name), make_video(9)
    adapter: Any = adapt(model)
    theirs, mine = model.encode(video).latent_dist, adapter.heads.posterior(adapter.features(video))
    if hasattr(theirs, "logvar"):
        torch.testing.assert_close(mine.log_variance_BZthw, theirs.logvar, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(mine.sample(torch.randn_like(mine.mean_BZthw)), theirs.mode(), rtol=1e-5, atol=1e-5)
    assert adapter.decode_latent(mine.mean_BZthw, 9).abs().max() > 1


@pytest.mark.parametrize("name", TINY)
def test_any_number_of_frames_comes_back(name: str, make_model: MakeModel, adapt: Adapt, make_video: MakeVideo) -> None:
    adapter = adapt(make_model(name))
    for frames in (1, 6, 16):
        tokens = adapter.encode(make_video(frames))
        assert tokens.values.shape[2] == adapter.geometry.latent_steps(frames)
        assert adapter.decode(tokens).shape == (1, 3, frames, 32, 32)
    spec, geometry = adapter.spec(), adapter.geometry
    assert (spec.temporal, spec.spatial, spec.channels) == (geometry.temporal, geometry.spatial, geometry.channels)
    assert tokens.values.shape[1:] == (geometry.channels, geometry.latent_steps(16), 32 // geometry.spatial, 32 // geometry.spatial)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_claims_of_causality_are_true_and_so_are_denials(name: str, make_model: MakeModel, adapt: Adapt, make_video: MakeVideo) -> None:
    adapter, video = adapt(make_model(name)), make_video(FRAMES)
    geometry, changed = adapter.geometry, video.clone()
    late = 1 + geometry.temporal  # the frame with which latent step 2 begins
    changed[:, :, late:] *= -1
    tokens = adapter.encode(video)
    assert (moved(tokens.values, adapter.encode(changed).values)[0] == 2) == geometry.causal_encoder
    image = adapter.encode(video[:, :, :1]).values
    assert torch.allclose(image, tokens.values[:, :, :1], rtol=0, atol=1e-5) == geometry.image_first
    later = tokens.values.clone()
    later[:, :, 2:] *= -1
    assert (moved(adapter.decode(tokens), adapter.decode(Tokens(later, FRAMES)))[0] == late) == geometry.causal_decoder


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_normalised_latents_come_back(name: str, make_model: MakeModel, adapt: Adapt) -> None:
    adapter = adapt(make_model(name))
    latent = torch.randn(2, adapter.z, 3, 2, 2)
    torch.testing.assert_close(adapter.denormalise(adapter.normalise(latent)), latent)


def test_wans_latents_are_normalised_as_its_pipeline_has_it(make_model: MakeModel, adapt: Adapt) -> None:
    """diffusers' WanPipeline decodes latent * std + mean, with statistics of 16 channels that come with the class."""
    adapter, latent = adapt(make_model("wan")), torch.randn(2, 16, 3, 2, 2)
    normal = adapter.normalise(latent)
    torch.testing.assert_close(normal[:, 0], (latent[:, 0] + 0.7571) / 2.8184)
    torch.testing.assert_close(normal[:, 15], (latent[:, 15] + 0.2921) / 1.9160)
    scaled = adapt(make_model("wan2.2"))
    torch.testing.assert_close(scaled.normalise(torch.ones(1, 4, 2, 1, 1)), torch.full((1, 4, 2, 1, 1), 0.45))


def test_cogvideox_latents_are_normalised_as_its_pipeline_has_it(make_model: MakeModel, adapt: Adapt) -> None:
    """diffusers' CogVideoXPipeline decodes latent / scaling_factor."""
    adapter, latent = adapt(make_model("cogvideox")), torch.randn(2, 4, 3, 2, 2)
    torch.testing.assert_close(adapter.normalise(latent), latent * 1.15258426)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_saved_model_is_the_same_model_whatever_its_address(
    name: str, make_model: MakeModel, adapt: Adapt, make_video: MakeVideo, tmp_path: Path
) -> None:
    adapter, video = adapt(make_model(name)), make_video(5)
    adapter.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert type(again) is type(adapter) and not again.training
    assert again.spec() == adapter.spec() and again.config == adapter.config
    assert torch.equal(again.encode(video).values, adapter.encode(video).values)
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
    again.save_pretrained(tmp_path / "third")
    cards = [(tmp_path / name / CARD_FILE).read_text() for name in ("again", "third")]
    assert cards[0] == cards[1] and f"diffusers' `{adapter.class_name}`" in cards[0] and adapter.digest() in cards[0]


@pytest.mark.parametrize("name", RUNGS)
def test_growing_starts_at_the_lower_rung_on_every_second_frame(
    name: str, make_model: MakeModel, adapt: Adapt, make_video: MakeVideo
) -> None:
    lower, video = adapt(make_model(name)), make_video(FRAMES)
    assert isinstance(lower, Rung)
    grown = build(GrownConfig(blocks=1, groups=4), lower)
    assert isinstance(grown, GrownTokenizer)
    latent, tokens = lower.encode(video[:, :, ::2]).values, grown.encode(video)
    assert torch.equal(tokens.values, latent)
    repeated = lower.decode_features(repeat_frames(lower.heads.decoder_features(latent)))
    torch.testing.assert_close(grown.decode(tokens), repeated[:, :, :FRAMES].clamp(-1, 1))
    assert grown.geometry.causal_decoder == lower.geometry.causal_decoder
    grown.decode_latent(grown.heads.posterior(grown.features(video)).mean_BZthw, FRAMES).square().mean().backward()
    assert all(weight.grad is None for weight in lower.parameters())
    assert all(weight.grad is not None for weight in grown.heads.parameters())


@pytest.mark.parametrize("name", TINY)
def test_layerwise_tiles_change_nothing(name: str, make_model: MakeModel, adapt: Adapt, make_video: MakeVideo) -> None:
    adapter, video = adapt(make_model(name)).double(), make_video(5).double()
    tokens = adapter.encode(video)
    with LayerwiseTiling(12):
        torch.testing.assert_close(adapter.encode(video).values, tokens.values, rtol=1e-6, atol=1e-6)
        tiled = adapter.decode(tokens)
    torch.testing.assert_close(tiled, adapter.decode(tokens), rtol=1e-6, atol=1e-6)


def test_weights_that_are_not_all_there_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("wan").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    removed = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != removed}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"missing_keys {removed}"):
        load(tmp_path)


def test_settings_are_part_of_the_digest(make_model: MakeModel, adapt: Adapt) -> None:
    one, other = (adapt(make_model("wan", latents_std=[scale] * 16)) for scale in (1.0, 2.0))
    assert one.digest() != other.digest()


def test_classes_without_an_adapter_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLMochi"}))
    with pytest.raises(
        ValueError, match="no adapter for diffusers' AutoencoderKLMochi; there are some for AutoencoderKL, AutoencoderKLCogVideoX, "
    ):
        load(tmp_path)


def test_what_cannot_be_grown_upon_says_why(make_model: MakeModel, adapt: Adapt) -> None:
    lower = adapt(make_model("cogvideox"))
    for refuse in (lower_stage, lambda model: build(GrownConfig(groups=4), model)):
        with pytest.raises(ValueError, match="upon a 'cogvideox' model: its decoder's norms want the 4x latent at every level"):
            refuse(lower)


def test_nothing_but_loading_imports_diffusers() -> None:
    code = "import sys, kinetok.pipelines.catalog\nassert not {'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
