"""Files as they are released, made of random weights: loaded whole, or refused with what is wrong."""

from pathlib import Path

import pytest
import torch
from tests.tokenizers.divot.tiny import UNET, tiny_divot
from torch import Tensor, nn

from kinetok.tokenizers.divot import released as released_files
from kinetok.tokenizers.divot import schedule
from kinetok.tokenizers.divot.checkpoints import (
    SCHEDULE_BUFFERS,
    load_dynamicrafter,
    load_official,
    load_tokenizer,
    official_names,
    published_state,
    read_state,
)
from kinetok.tokenizers.divot.frame_vae import FrameVAE
from kinetok.tokenizers.divot.perceiver import Perceiver
from kinetok.tokenizers.divot.released import frame_autoencoder, open_released
from kinetok.tokenizers.divot.tokenizer import DivotConfig, DivotTokenizer
from kinetok.tokenizers.divot.unet import VideoUNet
from kinetok.tokenizers.divot.unet_layers import Given, SpatialTransformer, TemporalTransformer
from kinetok.tokenizers.divot.unet_training import DYNAMICRAFTER, UNetObjective, UNetPlayer, UNetTrainable

STATISTICS = ("mean_Z", "std_Z", "mean_ND", "std_D")
"""Ours, and not in the published files."""


@pytest.fixture
def model(config: DivotConfig) -> DivotTokenizer:
    return DivotTokenizer.build(config, frame_autoencoder(32, (1, 2), 1)).eval()


def half(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in published_state(parts).items()}


def detokenizer_file(model: DivotTokenizer) -> dict[str, Tensor]:
    buffers = dict.fromkeys(SCHEDULE_BUFFERS, torch.zeros(1000)) | {"alphas_cumprod": schedule.alpha_bar().float()}
    return half({"": model.detokenizer, "first_stage_model.": model.lower}) | buffers


def save(folder: Path, model: DivotTokenizer) -> tuple[Path, Path]:
    files = folder / "tokenizer.bin", folder / "detokenizer.bin"
    torch.save(half({"": model.encoder}), files[0])
    torch.save(detokenizer_file(model), files[1])
    return files


def test_released_files_make_a_whole_model(model: DivotTokenizer, config: DivotConfig, tmp_path: Path) -> None:
    files = save(tmp_path, model)
    released = open_released(*files, config, frame_autoencoder(32, (1, 2), 1))
    again = released.model
    assert released.tokenizer.loaded == len(official_names(model.encoder)) and not released.detokenizer.ignored
    for mine, theirs in ((again.encoder, model.encoder), (again.detokenizer, model.detokenizer), (again.lower, model.lower)):
        wanted = {name: tensor.half().float() for name, tensor in theirs.state_dict().items() if name not in STATISTICS}
        found = {name: tensor for name, tensor in mine.state_dict().items() if name in wanted}
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(again.detokenizer.std_Z, torch.full((4,), 1 / 0.18215))


def test_files_of_other_sizes_make_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The autoencoder that `open_released` makes has the latent channels that the U-Net's configuration says."""
    config = tiny_divot(frames=6, z=3, tokens=6, width=12)
    monkeypatch.setattr(released_files, "frame_autoencoder", lambda z: frame_autoencoder(32, (1, 2, 1), 2, z))
    model = DivotTokenizer.build(config, frame_autoencoder(32, (1, 2, 1), 2, z=3)).eval()
    again = open_released(*save(tmp_path, model), config).model
    assert isinstance(again.lower, FrameVAE) and again.lower.z == 3
    for mine, theirs in ((again.encoder, model.encoder), (again.detokenizer, model.detokenizer), (again.lower, model.lower)):
        wanted = {name: tensor.half().float() for name, tensor in theirs.state_dict().items() if name not in STATISTICS}
        torch.testing.assert_close({name: mine.state_dict()[name] for name in wanted}, wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match="3 latent channels, the config 4"):
        open_released(*save(tmp_path, model), tiny_divot(), frame_autoencoder(32, (1, 2, 1), 2, z=3))


@pytest.mark.parametrize("width", [24, 64, 96])
def test_transformers_whose_heads_are_not_their_channels_keep_their_weights(width: int) -> None:
    """Eight heads of 3, 8 and 12 numbers inside 64 channels."""
    given = Given(2, torch.empty(0), torch.randn(1, 77, 20), torch.randn(1, 48, 20))
    for build in (lambda: SpatialTransformer(64, 8, 32, 20, width, split=True), lambda: TemporalTransformer(64, 8, 32, width)):
        first, second = build(), build()
        for parameter in first.parameters():
            nn.init.normal_(parameter, std=0.1)
        state = published_state({"": first})
        sizes = {name: tuple(state[f"{name}.weight"].shape) for name in ("proj_in", "transformer_blocks.0.attn2.to_q", "proj_out")}
        assert list(sizes.values()) == [(width, 64), (width, width), (64, width)]
        assert load_official({"": second}, state).loaded == len(first.state_dict())
        x = torch.randn(2, 64, 3, 3)
        torch.testing.assert_close(second(x, given), first(x, given), rtol=0, atol=0)


def test_what_does_not_fit_is_told_and_nothing_is_loaded(model: DivotTokenizer) -> None:
    state = half({"": model.encoder})
    before = model.digest()
    for wrong, message in (
        ({name: tensor for name, tensor in state.items() if name != "norm.bias"}, r"1 missing \(norm.bias\)"),
        (state | {"norm.more": torch.zeros(1)}, r"1 unexpected \(norm.more\)"),
        (state | {"norm.bias": torch.zeros(3)}, r"of another size \(norm.bias \(3,\) \(16,\)\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(model.encoder, wrong)
    assert model.digest() == before


def test_another_schedule_is_refused(model: DivotTokenizer, config: DivotConfig, tmp_path: Path) -> None:
    tokenizer, detokenizer = save(tmp_path, model)
    without_zero_snr = (1 - schedule.betas()).cumprod(0)
    for other in (without_zero_snr.float(), without_zero_snr.half(), schedule.alpha_bar()[:500], torch.ones(1000, dtype=torch.long)):
        torch.save(detokenizer_file(model) | {"alphas_cumprod": other}, detokenizer)
        with pytest.raises(ValueError, match=r"another noise schedule.*Divot_detokenizer_stage1\.bin"):
            open_released(tokenizer, detokenizer, config, frame_autoencoder(32, (1, 2), 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_schedule_is_known_in_whatever_type_it_is_stored(
    model: DivotTokenizer, config: DivotConfig, tmp_path: Path, dtype: torch.dtype
) -> None:
    tokenizer, detokenizer = save(tmp_path, model)
    torch.save(detokenizer_file(model) | {"alphas_cumprod": schedule.alpha_bar().to(dtype)}, detokenizer)
    assert open_released(tokenizer, detokenizer, config, frame_autoencoder(32, (1, 2), 1)).detokenizer.loaded


def dynamicrafter_file(unet: VideoUNet, images: Perceiver) -> dict[str, Tensor]:
    """As the 256-pixel checkpoint names its tensors (github.com/Doubiiu/DynamiCrafter/issues/17), each one more than in the modules."""
    state = {f"model.diffusion_model.{name}": tensor + 1 for name, tensor in published_state({"": unet}).items()}
    for layer in (0, 2):
        for kind in ("weight", "bias"):
            state[f"model.diffusion_model.framestride_embed.{layer}.{kind}"] = state.pop(
                f"model.diffusion_model.fps_embedding.{layer}.{kind}"
            )
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = torch.cat([state[first], torch.full_like(state[first], 9)], dim=1)
    state |= {name: tensor.squeeze() for name, tensor in state.items() if name.endswith("attn2.alpha")}
    return state | {name: tensor + 1 for name, tensor in published_state({"image_proj_model.": images}).items()}


def test_dynamicrafters_unet_comes_without_the_image_beside_its_latents(tmp_path: Path) -> None:
    unet, images = VideoUNet(UNET.model_copy(update={"split": 77})), Perceiver(DYNAMICRAFTER, read=16, width=16, out=16)
    state = dynamicrafter_file(unet, images)
    assert {tensor.ndim for name, tensor in state.items() if name.endswith("attn2.alpha")} == {0}
    torch.save({"state_dict": state | {"cond_stage_model.weight": torch.zeros(1)}, "global_step": 7}, tmp_path / "model.ckpt")
    wanted = [{name: tensor + 1 for name, tensor in module.state_dict().items()} for module in (unet, images)]
    report = load_dynamicrafter(unet, images, tmp_path / "model.ckpt")
    assert report.loaded == sum(map(len, wanted))
    torch.testing.assert_close([dict(module.state_dict()) for module in (unet, images)], wanted, rtol=0, atol=0)
    torch.save({name: tensor for name, tensor in state.items() if "image_proj" not in name}, tmp_path / "unet.ckpt")
    with pytest.raises(ValueError, match=r"missing \(image_proj_model"):
        load_dynamicrafter(unet, images, tmp_path / "unet.ckpt")


def test_training_starts_from_dynamicrafters_unet_and_perceiver(config: DivotConfig, tmp_path: Path) -> None:
    whole = config.model_copy(update={"detokenizer": config.detokenizer.model_copy(update={"unet": UNET.model_copy(update={"split": 77})})})
    model = DivotTokenizer.build(whole, frame_autoencoder(32, (1, 2), 1))
    images = Perceiver(DYNAMICRAFTER.model_copy(update={"queries": 16 * 5}), read=16, width=16, out=16)
    state = dynamicrafter_file(model.detokenizer.unet, images)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    player = UNetTrainable(model, UNetObjective(dynamicrafter=str(tmp_path / "model.ckpt"))).player
    torch.testing.assert_close(player.images.latents_1MD, images.latents_1MD + 1, rtol=0, atol=0)
    torch.testing.assert_close(
        player.detokenizer.unet.from_stride[2].bias, state["model.diffusion_model.framestride_embed.2.bias"], rtol=0, atol=0
    )
    assert len(UNetPlayer(model, UNetObjective()).images.blocks) == config.detokenizer.perceiver.depth


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Path()}, tmp_path / "bad.bin")
    with pytest.raises(ValueError, match=r"holds more than tensors.*Fetch it again"):
        read_state(tmp_path / "bad.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match=r"no plain mapping.*state_dict\(\) alone"):
        read_state(tmp_path / "list.bin")
