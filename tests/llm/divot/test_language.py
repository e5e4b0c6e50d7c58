"""Language models of transformers: rows for visual tokens, adapters, merging, and what is refused."""

from pathlib import Path

import pytest
import torch
from tests.llm.divot.conftest import TINY
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel, Qwen2Config

from kinetok.llm.divot.language import (
    HEAD_SCALE,
    LoRAConfig,
    PretrainedLanguage,
    UntrainedLanguage,
    build_language,
    embedding,
    merged,
    output_layer,
    tune,
)
from kinetok.llm.divot.vocabulary import byte_tokenizer

SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _saved(folder: Path, config: LlamaConfig | Qwen2Config | GPTNeoXConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_added_rows_start_from_the_mean_of_the_old(tmp_path: Path, tied: bool) -> None:
    old = _saved(tmp_path, LlamaConfig(**SIZES, tie_word_embeddings=tied))
    model, vocabulary = build_language(PretrainedLanguage(path=str(tmp_path)))
    table, head = embedding(model).weight, output_layer(model).weight
    assert len(table) == len(head) == len(vocabulary) == 260 + 262
    assert torch.equal(table[:260], embedding(old).weight)
    torch.testing.assert_close(table[260:], table[:260].mean(0).expand(262, -1))
    if not tied:
        torch.testing.assert_close(head[260:], HEAD_SCALE * head[:260].mean(0).expand(262, -1))


@pytest.mark.parametrize("rows", [600, 400])
def test_added_ids_start_from_the_mean_where_the_table_has_rows_to_spare(tmp_path: Path, rows: int) -> None:
    """As Qwen2.5's has: rows without an id count for nothing, and a model that is read again keeps what it learned."""
    config = Qwen2Config(**SIZES | {"vocab_size": rows}, num_key_value_heads=2, tie_word_embeddings=False)
    old = _saved(tmp_path, config)
    model, vocabulary = build_language(PretrainedLanguage(path=str(tmp_path)))
    table, head = embedding(model).weight, output_layer(model).weight
    assert len(table) == max(rows, 522) and vocabulary.added == vocabulary.visual == list(range(260, 522))
    assert torch.equal(table[:260], embedding(old).weight[:260]) and torch.equal(table[522:], embedding(old).weight[522:])
    torch.testing.assert_close(table[260:522], embedding(old).weight[:260].mean(0).expand(262, -1))
    torch.testing.assert_close(head[260:522], HEAD_SCALE * output_layer(old).weight[:260].mean(0).expand(262, -1))
    with torch.no_grad():
        table[300] = 7
    model.save_pretrained(tmp_path / "again")
    vocabulary.save_pretrained(tmp_path / "again")
    again, known = build_language(PretrainedLanguage(path=str(tmp_path / "again")))
    assert torch.equal(embedding(again).weight, table) and not known.added


@pytest.mark.parametrize(
    "config", [Qwen2Config(**SIZES, num_key_value_heads=2), GPTNeoXConfig(**SIZES)], ids=lambda config: config.model_type
)
def test_any_causal_model_will_do(tmp_path: Path, config: Qwen2Config | GPTNeoXConfig) -> None:
    _saved(tmp_path, config)
    model, _ = build_language(PretrainedLanguage(path=str(tmp_path)))
    assert model.config._attn_implementation == "sdpa"
    assert model.base_model(inputs_embeds=torch.randn(1, 3, 32)).last_hidden_state.shape == (1, 3, 32)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    _saved(tmp_path, LlamaConfig(**SIZES))
    LlamaConfig(**SIZES | {"num_hidden_layers": 3}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing_keys.*layers\.2"):
        build_language(PretrainedLanguage(path=str(tmp_path)))


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="100 rows are too few"):
        build_language(UntrainedLanguage(**TINY.model_dump() | {"vocabulary": 100}))


def test_adapters_train_what_the_reference_trains_and_merge_into_a_plain_model() -> None:
    model, _ = build_language(TINY)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(6)[None]
    before = model(ids).logits
    tune(model, LoRAConfig(rank=3, alpha=6, dropout=0.0))
    torch.testing.assert_close(model(ids).logits, before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "norm" in name or "embed_tokens" in name or "lm_head" in name for name in trained)
    assert sum("lora_A" in name for name in trained) == 7 * TINY.depth
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    state = merged(model)
    assert state.keys() == plain.keys()
    again, _ = build_language(TINY)
    again.load_state_dict(state)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, before, atol=1e-3)
    torch.testing.assert_close(again(ids).logits, adapted, atol=1e-5, rtol=1e-5)


def test_an_unknown_module_is_refused() -> None:
    model, _ = build_language(TINY)
    with pytest.raises(ValueError, match="a mistral model has no module called final_norm"):
        tune(model, LoRAConfig(trained=("final_norm",)))
