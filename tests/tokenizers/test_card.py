"""The model card: what it says, that it is a function of the model, and that save_pretrained writes it."""

from pathlib import Path

import pytest
import torch
from tests.tokenizers.divot.tiny import tiny_divot

from kinetok.tokenizers.base import Tokenizer
from kinetok.tokenizers.card import CARD_FILE, figures, lineage, model_card
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


def test_figures_are_those_of_validation_alone() -> None:
    section = figures({"val/psnr": 30.125, "val/l1": 0.05, "train/l1": 1.0, "train/samples_per_second": 3.0})
    assert section.endswith("| l1 | 0.05 |\n| psnr | 30.125 |\n") and "samples" not in section
    assert figures({"train/l1": 1.0}) == ""
