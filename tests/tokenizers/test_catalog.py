"""The catalog: job-file configs, building, loading, and what is refused."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from tests.tokenizers.divot.tiny import tiny_divot

from kinetok.tokenizers.base import Config, TokenSpec
from kinetok.tokenizers.catalog import TOKENIZERS, ObjectiveConfig, TokenizerConfig, build, load, trainable
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.training import ReconstructionObjective
from kinetok.tokenizers.divot.frame_vae import FrameVAE
from kinetok.tokenizers.divot.released import frame_autoencoder
from kinetok.tokenizers.divot.training import DivotObjective
from kinetok.tokenizers.divot.unet_training import UNetObjective

SMALL = {"kind": "causal", "channels": 4, "mult": [1, 1], "strides": [[2, 2]], "blocks": 1, "z": 2, "groups": 2}


def parse(data: dict[str, object]) -> object:
    return TypeAdapter(TokenizerConfig).validate_python(data)


def test_kind_decides_the_config() -> None:
    assert parse(SMALL) == CausalConfig(channels=4, mult=(1, 1), strides=((2, 2),), blocks=1, z=2, groups=2)
    assert parse({"kind": "grown", "blocks": 1}) == GrownConfig(blocks=1)


@pytest.mark.parametrize("wrong", [{"kind": "causl"}, {"channels": 4}, SMALL | {"layers": 2}, SMALL | {"blocks": True}])
def test_unknown_kinds_and_fields_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        parse(wrong)


def test_every_tokenizer_is_built_saved_and_loaded_by_its_kind(tmp_path: Path) -> None:
    base = build(CausalConfig.model_validate(SMALL))
    grown = build(GrownConfig(blocks=1, groups=2), base)
    divot = build(tiny_divot(frames=3, z=2), base)
    assert {type(base), type(grown), type(divot)} == set(TOKENIZERS)
    for model in (base, grown, divot):
        model.save_pretrained(tmp_path / model.config.kind)
        again = load(tmp_path / model.config.kind)
        assert type(again) is type(model) and again.spec() == model.spec()


def test_loading_tells_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "vqgan"}')
    with pytest.raises(ValueError, match=r"kind 'vqgan', known kinds are \['causal', 'divot', 'grown'\]"):
        load(tmp_path)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    model = CausalTokenizer(CausalConfig.model_validate(SMALL))
    model.save_pretrained(tmp_path)
    other = CausalTokenizer(CausalConfig.model_validate(SMALL | {"blocks": 2}))
    (tmp_path / "config.json").write_text(other.config.model_dump_json())
    with pytest.raises(RuntimeError, match="Missing key"):
        load(tmp_path)


def test_growing_needs_a_lower_model_and_the_base_refuses_one() -> None:
    base = build(CausalConfig.model_validate(SMALL))
    with pytest.raises(ValueError, match="lower"):
        build(GrownConfig())
    with pytest.raises(ValueError, match="stands on its own"):
        build(CausalConfig.model_validate(SMALL), base)


def test_trainable_trains_what_it_is_given() -> None:
    torch.manual_seed(0)
    model = build(CausalConfig.model_validate(SMALL))
    batch = {"video_BTHWC": torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8), "seed_B": torch.tensor([1, 2])}
    loss, parts = trainable(model, ReconstructionObjective()).players["autoencoder"](batch, 0)
    loss.backward()
    assert set(parts) == {"l1", "kl"}
    assert all(weight.grad is not None for weight in model.parameters())


def test_an_objective_without_a_kind_is_for_reconstruction_and_dumps_as_it_always_did() -> None:
    objectives: TypeAdapter[Config] = TypeAdapter(ObjectiveConfig)
    assert objectives.validate_python({"kl": 0.5}) == ReconstructionObjective(kl=0.5)
    assert objectives.validate_python({"kind": "divot", "stage": "refine"}) == DivotObjective(stage="refine")
    assert objectives.dump_python(ReconstructionObjective(kl=0.5)) == {"kl": 0.5, "perceptual": None, "adversarial": None}
    with pytest.raises(ValidationError, match="union_tag_invalid"):
        objectives.validate_python({"kind": "divto"})


def test_a_model_is_trained_by_an_objective_of_its_own_kind() -> None:
    base = build(CausalConfig.model_validate(SMALL))
    divot = build(tiny_divot(frames=3, z=2), base)
    assert tuple(trainable(divot, DivotObjective()).players) == DivotObjective.players
    assert tuple(trainable(divot, UNetObjective()).players) == UNetObjective.players
    for model, objective in ((divot, ReconstructionObjective()), (base, DivotObjective())):
        with pytest.raises(ValueError, match="is not trained by"):
            trainable(model, objective)


def test_an_image_autoencoder_is_loaded_as_diffusers_saves_it(tmp_path: Path) -> None:
    frame_autoencoder(32, (1, 2), 1).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert isinstance(model, FrameVAE)
    assert model.spec() == TokenSpec(tokenizer="frame_vae", weights=model.digest(), layout="grid", channels=4, temporal=1, spatial=2)


def test_grown_tokenizer_is_a_tokenizer_kind() -> None:
    assert GrownTokenizer.config_class is GrownConfig
