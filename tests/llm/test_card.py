"""The cards of a generator and of a language model: what they say, and that saving writes them."""

from pathlib import Path

import pytest
from tests.llm.conftest import CONFIG
from tests.llm.divot.conftest import tiny

from kinetok.llm.card import belongs, generator_card, language_card
from kinetok.llm.dit import VideoDiT
from kinetok.llm.divot.language import LoRAConfig, PretrainedLanguage
from kinetok.llm.divot.model import DivotLM
from kinetok.llm.divot.training import DivotLMObjective, DivotLMTrainable
from kinetok.llm.text import TextConfig
from kinetok.llm.training import DiffusionObjective, DiTTrainable
from kinetok.tokenizers.base import TokenSpec
from kinetok.tokenizers.card import CARD_FILE

SPEC = TokenSpec(tokenizer="grown", weights="f" * 64, layout="grid", channels=16, temporal=16, spatial=8)


@pytest.mark.parametrize("card", [generator_card(VideoDiT(CONFIG)), language_card(tiny())], ids=["generator", "language"])
def test_it_has_every_number_and_says_that_a_patent_may_cover_the_tokenizer(card: str) -> None:
    text = " ".join(card.split())
    assert card.startswith("---\nlibrary_name: kinetok\n") and "## Configuration" in card
    assert "may be covered by a patent of its authors' employer; commercial users should check" in text
    assert "written from the public description alone" in text


def test_every_field_stands_with_its_meaning() -> None:
    card = generator_card(VideoDiT(CONFIG))
    for name, info in type(CONFIG).model_fields.items():
        assert name == "kind" or f"| `{name}` |" in card
        assert name == "kind" or info.description
        assert " ".join((info.description or "").split()) in card
    assert "| `head.components` |" in language_card(tiny()), "sections are entered"


def test_a_generator_says_what_its_description_leaves_open() -> None:
    card = generator_card(VideoDiT(CONFIG.model_copy(update={"depth": 3})))
    assert "## What the description leaves open" in card and "3 blocks of" in card and "| positions | rotary on three axes" in card


def test_a_saved_model_has_its_card_and_equal_models_have_equal_ones(tmp_path: Path) -> None:
    for name, model in (("dit", VideoDiT(CONFIG)), ("lm", tiny())):
        model.save_pretrained(tmp_path / name)
        type(model).from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name}-again")
        cards = [(tmp_path / folder / CARD_FILE).read_text() for folder in (name, f"{name}-again")]
        assert cards[0] == cards[1] == (generator_card(model) if isinstance(model, VideoDiT) else language_card(model))


def test_an_exported_model_names_its_objective_and_counts_no_adapters(tmp_path: Path) -> None:
    DiTTrainable(VideoDiT(CONFIG), DiffusionObjective(caption_dropout=0.25)).export(tmp_path / "dit")
    assert "| `caption_dropout` | `0.25` |" in (tmp_path / "dit" / CARD_FILE).read_text()
    DivotLMTrainable(tiny(), DivotLMObjective(head=0.5, lora=LoRAConfig(rank=2))).export(tmp_path / "lm")
    card = (tmp_path / "lm" / CARD_FILE).read_text()
    assert "| `head` | `0.5` |" in card and "| `lora.rank` | `2` |" in card
    count = f"| parameters | {sum(weight.numel() for weight in DivotLM.from_pretrained(tmp_path / 'lm').parameters()):,} |"
    assert count in card and count in language_card(tiny())


def test_a_language_model_says_what_it_started_from() -> None:
    model = tiny()
    assert "untrained: random weights over bytes" in language_card(model) and "others trained" not in language_card(model)
    model.config = model.config.model_copy(update={"language": PretrainedLanguage(path="a/b")})
    assert "| language model that it started from | `a/b` |" in language_card(model) and "others trained" in language_card(model)


def test_whose_tokens_and_which_text_is_named_and_an_untrained_encoder_is_called_so() -> None:
    section = belongs(SPEC, (TextConfig(max_tokens=16), "e" * 64))
    assert "| tokenizer | `grown`, 16x8x8, 16 channels |" in section and SPEC.weights in section and "e" * 64 in section
    assert "| text encoder | untrained: " in section
    assert "`x/t5` (t5), 9 tokens" in belongs(SPEC, (TextConfig(encoder="t5", path="x/t5", max_tokens=9), "e" * 64))
    assert "text encoder" not in belongs(SPEC)
