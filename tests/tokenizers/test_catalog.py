"""The catalog: job-file configs, building, loading, and what is refused."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from kinetok.tokenizers.catalog import TOKENIZERS, TokenizerConfig, build, load, trainable
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.training import ReconstructionObjective

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
    assert {type(base), type(grown)} == set(TOKENIZERS)
    for model in (base, grown):
        model.save_pretrained(tmp_path / model.config.kind)
        again = load(tmp_path / model.config.kind)
        assert type(again) is type(model) and again.spec() == model.spec()


def test_loading_tells_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "vqgan"}')
    with pytest.raises(ValueError, match=r"kind 'vqgan', known kinds are \['causal', 'grown'\]"):
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


def test_grown_tokenizer_is_a_tokenizer_kind() -> None:
    assert GrownTokenizer.config_class is GrownConfig
