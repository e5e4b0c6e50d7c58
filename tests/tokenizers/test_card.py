"""The model card: what it says, that it is a function of the model, and that save_pretrained writes it."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from tests.tokenizers.divot.tiny import tiny_divot
from tests.tokenizers.pretrained.conftest import random_model

from kinetok.tokenizers.base import Tokenizer
from kinetok.tokenizers.card import CARD_FILE, figures, lineage, model_card, training
from kinetok.tokenizers.catalog import load
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.training import AdversarialConfig, ReconstructionObjective, RungTrainable
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer


@pytest.fixture
def rungs() -> list[Tokenizer]:
    """8x on 4x."""
    torch.manual_seed(0)
    base = CausalTokenizer(CausalConfig(channels=4, mult=(1, 1, 1), strides=((2, 2), (2, 2)), blocks=1, z=4, patch=2, groups=2))
    return [GrownTokenizer(GrownConfig(blocks=1, groups=2), base), base]


def test_it_names_every_rung_its_digest_and_the_meaning_of_every_field(rungs: list[Tokenizer]) -> None:
    card = model_card(rungs[0])
    assert lineage(rungs[0]) == rungs
    assert card.startswith("---\nlibrary_name: kinetok\n") and "# 8x8x8 video tokenizer, 4 channels" in card
    for rung in rungs:
        assert rung.spec().weights in card
        for name, info in type(rung.config).model_fields.items():
            assert name == "kind" or f"| `{name}` |" in card
            assert " ".join((info.description or "").split()).replace("|", "\\|") in card
    assert "| numbers of pixels for one of the latent | 384 |" in card


def test_it_says_plainly_that_a_patent_may_cover_the_method(rungs: list[Tokenizer]) -> None:
    for rung in rungs:
        card = " ".join(model_card(rung).split())
        assert "may be covered by a patent of its authors' employer; commercial users should check" in card
        assert "written from the public description alone" in card


def test_a_saved_model_has_its_card_and_equal_models_have_equal_ones(rungs: list[Tokenizer], tmp_path: Path) -> None:
    rungs[0].save_pretrained(tmp_path / "one")
    load(tmp_path / "one").save_pretrained(tmp_path / "two")
    cards = [(tmp_path / name / CARD_FILE).read_text() for name in ("one", "two")]
    assert cards[0] == cards[1] == model_card(rungs[0])
    assert (tmp_path / "one" / "lower" / CARD_FILE).read_text() == model_card(rungs[1])


def test_an_exported_model_names_its_loss(rungs: list[Tokenizer], tmp_path: Path) -> None:
    assert isinstance(rungs[1], CausalTokenizer)
    RungTrainable(rungs[1], ReconstructionObjective(kl=0.25, adversarial=AdversarialConfig(start=7))).export(tmp_path)
    card = (tmp_path / CARD_FILE).read_text()
    assert "| `kl` | `0.25` |" in card and "| `adversarial.start` | `7` |" in card and "| `perceptual` | `null` |" in card


def test_a_set_of_tokens_stands_for_a_window_and_a_decoder_that_draws_says_so(rungs: list[Tokenizer]) -> None:
    divot = DivotTokenizer.build(tiny_divot(), rungs[1])
    card = model_card(divot)
    assert lineage(divot) == [divot, rungs[1]]
    assert "4 tokens of 8 numbers stand for a window of 5 frames of 16 x 16 pixels" in card and "one token of" not in card
    assert "| numbers of pixels for one of the tokens | 120 |" in card and "| `divot` | windows of 5x16x16 |" in card
    assert "untrained (1 layers of 16)" in card and "shows what the tokens say, not the very pixels" in " ".join(card.split())
    assert "The autoencoder below this model follows ProMAG" in card and "that others trained" not in card
    named = divot.config.model_copy(update={"vit": divot.config.vit.model_copy(update={"path": "a/b"})})
    assert "Weights that others trained" in model_card(DivotTokenizer(named, divot.vit, divot.lower))


def test_what_the_description_leaves_open_stands_beside_what_was_taken(rungs: list[Tokenizer]) -> None:
    """Every reading of every field has its words; what has no field is there as well."""
    card = model_card(rungs[0])
    assert "## What the description leaves open" in card
    assert "| 8x: how key features and residual are mixed | a sum | `mix`, `key` |" in card
    assert "a cosine transform of each cell, which the description does not have | `image_path`, `start` |" in card
    assert "| AdaGN in the decoder, which MagViT-v2 has | left out, so that a decoder frozen under a grown rung" in card
    adaptive = model_card(CausalTokenizer(rungs[1].config.model_copy(update={"start": "random", "adagn": True})))
    assert "| AdaGN in the decoder, which MagViT-v2 has | in front of each level" in adaptive and "| `adagn` |" in adaptive
    assert "the first frame, repeated; Open-MAGVIT2 has zeros there" in card and "and drops the later: a departure" in card
    assert "the decoder stays frozen as a whole; there is no joint training | `unfreeze_decoder` |" in card
    assert (
        card.count("| the posterior while training | a sample") == 1
        and "unless the objective said `mode` | `objective.posterior` |" in card
    )
    assert "| the posterior while training | its mean" in model_card(rungs[0], ReconstructionObjective(posterior="mode"))
    base = rungs[1]
    assert isinstance(base, CausalTokenizer) and "8x: " not in model_card(base)
    random = model_card(CausalTokenizer(base.config.model_copy(update={"start": "random"})))
    assert "no image model; training starts at torch's default initialisation of every convolution | `image_path`, `start` |" in random
    for field in ("mix", "ada", "cond", "norm", "unfreeze_decoder"):
        values = get_args(GrownConfig.model_fields[field].annotation)
        cards = {model_card(GrownTokenizer(GrownConfig.model_validate({"blocks": 1, "groups": 2, field: value}), base)) for value in values}
        opened = {made.split("leaves open")[1].split("## ")[0] for made in cards}
        assert len(opened) == len(values), f"{field}: two readings have the same words"
    ablation = model_card(GrownTokenizer(GrownConfig(blocks=1, groups=2, key=False, ada="none"), base))
    assert "the residual alone: an ablation" in ablation and "its heads are copied" not in ablation


def test_an_image_model_below_the_base_is_no_rung_of_its_own() -> None:
    config = CausalConfig(channels=4, mult=(1, 1), strides=((2, 2),), blocks=1, z=4, groups=2, image_path="frozen2d")
    card = model_card(CausalTokenizer.build(config, CausalTokenizer(config.image)))
    assert card.count("| where training starts, and what an image model is for |") == 1 and "its frozen encoder stays" in card


def test_models_that_are_not_of_the_description_have_no_such_section(tmp_path: Path) -> None:
    random_model("wan").save_pretrained(tmp_path)
    card = model_card(load(tmp_path))
    assert "leaves open" not in card and "## Configuration" in card
    load(tmp_path).save_pretrained(tmp_path / "ours")
    assert card == (tmp_path / "ours" / CARD_FILE).read_text()
    assert "diffusers' `AutoencoderKLWan`, trained by others and unchanged" in card and "Its settings name no licence" in card
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"license": "apache-2.0"}))
    assert "Its settings name the licence `apache-2.0`." in model_card(load(tmp_path))


class Player(BaseModel):
    lr: float
    """Peak."""


class Numbers(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)
    steps: int
    """How many."""
    optimizers: dict[str, Player]


def test_how_it_was_trained_names_the_data_and_every_number() -> None:
    section = training(Numbers(steps=7, optimizers={"autoencoder": Player(lr=0.5)}), [("data", "`clips-00`")])
    assert section.startswith("\n## How it was trained\n") and "| data | `clips-00` |" in section
    assert "| `steps` | `7` | How many. |" in section and "| `optimizers.autoencoder.lr` | `0.5` |" in section


def test_figures_are_those_of_validation_alone() -> None:
    section = figures({"val/psnr": 30.125, "val/l1": 0.05, "train/l1": 1.0, "train/samples_per_second": 3.0})
    assert section.endswith("| l1 | 0.05 |\n| psnr | 30.125 |\n") and "samples" not in section
    assert figures({"train/l1": 1.0}) == ""
