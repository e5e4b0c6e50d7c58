"""`convert`: released files, here of random weights and small sizes, become a folder that `kinetok.load` reads; others are refused."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kinetok.infra.errors import ConfigError
from kinetok.pipelines.cli import main
from kinetok.pipelines.convert import convert
from kinetok.pipelines.divot_cli import VIT
from kinetok.pipelines.models import load
from kinetok.tokenizers.divot import presets, released
from kinetok.tokenizers.divot.checkpoints import published_state
from kinetok.tokenizers.divot.detokenizer import DetokenizerConfig
from kinetok.tokenizers.divot.encoder import EncoderConfig
from kinetok.tokenizers.divot.perceiver import PerceiverConfig
from kinetok.tokenizers.divot.tokenizer import DivotConfig, DivotTokenizer
from kinetok.tokenizers.divot.unet import UNetConfig
from kinetok.tokenizers.divot.vit import FrozenViT, VitConfig

PERCEIVER = PerceiverConfig(queries=4, depth=1, heads=2, head_width=8)
CONFIG = DivotConfig(
    edge=16,
    vit=VitConfig(edge=16, patch=4, width=16, depth=1, heads=2),
    encoder=EncoderConfig(
        temporal_width=16, temporal_depth=1, temporal_heads=2, pool=2, width=16, depth=1, heads=2, perceiver=PERCEIVER, token_width=8
    ),
    detokenizer=DetokenizerConfig(
        perceiver=PERCEIVER, unet=UNetConfig(channels=16, mult=(1, 2), blocks=1, attention=(1,), head_width=8, groups=4, context=16)
    ),
)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> DivotTokenizer:
    """A model of small sizes, which count as the published ones."""
    made = released.frame_autoencoder
    monkeypatch.setattr(presets, "FULL", CONFIG)
    monkeypatch.setattr(released, "frame_autoencoder", lambda z=4: made(32, (1, 2), 1, z))
    torch.manual_seed(0)
    return DivotTokenizer(CONFIG, FrozenViT.load(CONFIG.vit), released.frame_autoencoder()).eval()


def test_the_command_writes_what_load_reads(model: DivotTokenizer, tmp_path: Path) -> None:
    model.vit.save_pretrained(tmp_path / "vit")
    files = [tmp_path / "tokenizer.bin", tmp_path / "detokenizer.bin"]
    torch.save(published_state({"": model.encoder}) | {"vit_model.proj": torch.zeros(1)}, files[0])
    torch.save(published_state({"": model.detokenizer, "first_stage_model.": model.lower}), files[1])
    done = CliRunner().invoke(main, ["convert", *map(str, files), str(tmp_path / "out"), "--vit", str(tmp_path / "vit")])
    assert done.exit_code == 0, done.output
    assert "1 not needed (vit_model.proj, ...)" in done.output and "none missing, none left over" in done.output
    video = torch.rand((1, 3, 16, 16, 16), generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(load(tmp_path / "out").encode(video).values, model.encode(video).values)
    assert load(tmp_path / "out").config.model_dump()["vit"]["path"] == str(tmp_path / "vit")


def test_a_block_that_nobody_knows_is_left_aside_only_when_told(model: DivotTokenizer, tmp_path: Path) -> None:
    model.vit.save_pretrained(tmp_path / "vit")
    files = [tmp_path / "tokenizer.bin", tmp_path / "detokenizer.bin"]
    torch.save(published_state({"": model.encoder}) | {"teacher.proj.weight": torch.zeros(1)}, files[0])
    torch.save(published_state({"": model.detokenizer, "first_stage_model.": model.lower}), files[1])
    command = ["convert", *map(str, files), str(tmp_path / "out"), "--vit", str(tmp_path / "vit")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1 and "1 unexpected (teacher.proj.weight)" in refused.output and "--ignore PREFIX" in refused.output
    done = CliRunner().invoke(main, [*command, "--ignore", "teacher."])
    assert done.exit_code == 0 and "1 not needed (teacher.proj.weight, ...)" in done.output


def test_files_of_another_model_are_refused_and_nothing_is_written(model: DivotTokenizer, tmp_path: Path) -> None:
    model.vit.save_pretrained(tmp_path / "vit")
    files = [tmp_path / "tokenizer.bin", tmp_path / "detokenizer.bin"]
    for file in files:
        torch.save(published_state({"": model.encoder}), file)
    with pytest.raises(ConfigError, match=r"cannot be converted: .* missing"):
        convert(*files, tmp_path / "out", str(tmp_path / "vit"))
    torch.save({"weight": Path()}, files[0])
    with pytest.raises(ConfigError, match="cannot be converted"):
        convert(*files, tmp_path / "out", str(tmp_path / "vit"))
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_published_vision_transformer() -> None:
    assert presets.VIT_H.path == VIT
