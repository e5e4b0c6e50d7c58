"""Files as they are released, made of random weights: loaded whole, or refused with what is wrong."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kinetok.tokenizers.divot import schedule
from kinetok.tokenizers.divot.checkpoints import (
    SCHEDULE_BUFFERS,
    load_dynamicrafter,
    load_tokenizer,
    official_names,
    published_state,
    read_state,
)
from kinetok.tokenizers.divot.released import frame_autoencoder, open_released
from kinetok.tokenizers.divot.tokenizer import DivotConfig, DivotTokenizer

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
    torch.save(detokenizer_file(model) | {"alphas_cumprod": torch.linspace(1, 0.005, 1000)}, detokenizer)
    with pytest.raises(ValueError, match="another noise schedule"):
        open_released(tokenizer, detokenizer, config, frame_autoencoder(32, (1, 2), 1))


def test_dynamicrafters_unet_comes_without_the_image_beside_its_latents(model: DivotTokenizer, tmp_path: Path) -> None:
    unet = model.detokenizer.unet
    state = {f"model.diffusion_model.{name}": tensor + 1 for name, tensor in published_state({"": unet}).items()}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = torch.cat([state[first], torch.full_like(state[first], 9)], dim=1)
    torch.save({"state_dict": state | {"cond_stage_model.weight": torch.zeros(1)}, "global_step": 7}, tmp_path / "model.ckpt")
    wanted = {name: tensor + 1 for name, tensor in unet.state_dict().items()}
    report = load_dynamicrafter(unet, tmp_path / "model.ckpt")
    assert report.loaded == len(wanted)
    torch.testing.assert_close(dict(unet.state_dict()), wanted, rtol=0, atol=0)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Path()}, tmp_path / "bad.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_state(tmp_path / "bad.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="no plain mapping"):
        read_state(tmp_path / "list.bin")
