"""The joint model by what must not change, by what must, and at full size without memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.llm.divot.conftest import TOKENS, tiny
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from kinetok.llm.cost import count_flops
from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.heads import DiffusionConfig, MSEConfig
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.mask import QUERY, TEXT
from kinetok.llm.divot.model import DivotLM, DivotLMConfig, nth, pick, place
from kinetok.llm.divot.official import official_names
from kinetok.llm.divot.presets import DIVOT_7B
from kinetok.llm.divot.sequences import IGNORED, Packed, depict, describe, follow, narrate
from kinetok.llm.divot.vocabulary import Vocabulary
from kinetok.tokenizers.base import Batch

Clips = Callable[[int], Tensor]
GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def model() -> DivotLM:
    return tiny()


@pytest.fixture(scope="module")
def full_size() -> DivotLM:
    """On the meta device: without memory."""
    with torch.device("meta"):
        return DivotLM.build(DIVOT_7B)


def _samples(model: DivotLM, clips: Clips) -> list[Packed]:
    vocabulary = model.vocabulary
    return [
        describe(vocabulary, clips(2), "a longer caption", limit=200),
        depict(vocabulary, "ab", clips(1), limit=200),
        narrate(vocabulary, "go", [("a", clips(1)), ("b", clips(1))], limit=200),
    ]


def test_a_samples_losses_do_not_depend_on_its_batch(model: DivotLM, clips: Clips) -> None:
    samples = _samples(model, clips)
    together = model(collate(samples, [1, 2, 3]))
    for row, sample in enumerate(samples):
        alone = model(collate([sample], [row + 1], multiple=1))
        labels, tokens = alone.text_BM.shape[1], int(alone.written_BN.sum())
        torch.testing.assert_close(together.text_BM[row, :labels], alone.text_BM[0])
        torch.testing.assert_close(together.head_BN[row, :tokens], alone.head_BN[0, :tokens])
        assert int(together.written_BN[row].sum()) == tokens and int(together.labelled_BM[row].sum()) == labels


def test_text_loss_is_that_of_transformers(model: DivotLM, clips: Clips) -> None:
    sample = describe(model.vocabulary, clips(1), "a caption", limit=200)
    batch = collate([sample], [0], multiple=1)
    theirs = model.llm(inputs_embeds=model.embed(batch), labels=torch.tensor([sample.labels_L])).loss
    torch.testing.assert_close(model(batch).text(), theirs)


def _influence(model: DivotLM, batch: Batch, at: int) -> list[bool]:
    """Which embeddings the output at position `at` depends on."""
    embeds_BLW = model.embed(batch).detach().requires_grad_()
    hidden_BLW = model.hidden(embeds_BLW, model._mask(batch))
    (gradient,) = torch.autograd.grad(hidden_BLW[0, at].sum(), embeds_BLW)
    return [bool(row.any()) for row in gradient[0]]


@pytest.mark.parametrize("mechanism", ["bidirectional", "causal"])
def test_queries_see_each_other_only_where_they_should(mechanism: str, clips: Clips) -> None:
    model = tiny(mechanism=mechanism)
    sample = follow(model.vocabulary, "ab", clips(1), limit=200)
    batch = collate([sample], [0], multiple=1)
    first = sample.codes_L.index(QUERY)
    seen = first + TOKENS if mechanism == "bidirectional" else first + 1
    assert _influence(model, batch, first) == [at < seen for at in range(len(sample))]
    assert _influence(model, batch, first - 1) == [at < first for at in range(len(sample))]


def test_autoregression_predicts_each_token_from_those_before(clips: Clips) -> None:
    model = tiny(mechanism="autoregressive")
    batch = collate([follow(model.vocabulary, "ab", clips(1), limit=200)], [0])
    changed = batch | {"written_BND": batch["written_BND"].clone()}
    changed["written_BND"][0, 3] += 1
    before, after = model(batch).head_BN[0], model(changed).head_BN[0]
    assert torch.equal(before[:3], after[:3])
    assert all(before[at] != after[at] for at in range(3, TOKENS))


def test_an_autoregressive_model_reads_and_writes_in_one_batch(clips: Clips) -> None:
    model = tiny(mechanism="autoregressive")
    shown, made = describe(model.vocabulary, clips(2), "ab", limit=200), depict(model.vocabulary, "ab", clips(1), limit=200)
    together, alone = model(collate([shown, made], [0, 1])), [model(collate([sample], [0])) for sample in (shown, made)]
    torch.testing.assert_close(together.text_BM[0], alone[0].text_BM[0])
    torch.testing.assert_close(together.head_BN[1], alone[1].head_BN[0])


def test_position_dependent_tokens_are_a_matter_of_numbers() -> None:
    model = tiny(clip_tokens=125, token_width=24)
    batch = collate([depict(model.vocabulary, "ab", torch.randn(1, 125, 24), limit=200)], [0])
    assert model(batch).head_BN.shape == (1, 125)


@pytest.mark.parametrize("kind", ["read", "written"])
def test_every_parameter_has_a_gradient_whatever_a_batch_lacks(model: DivotLM, clips: Clips, kind: str) -> None:
    """Under ZeRO a rank without one would make the others wait for ever."""
    read, written = describe(model.vocabulary, clips(1), "ab", limit=200), depict(model.vocabulary, "ab", clips(1), limit=200)
    losses = model(collate([read if kind == "read" else written], [0]))
    gradients = torch.autograd.grad(losses.text() + losses.head(), list(model.parameters()))
    named = dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))
    unused = "to_head" if kind == "read" else "from_tokens"
    assert {name.partition(".")[0] for name, gradient in named.items() if not gradient.any()} == {unused}
    assert losses.head().item() == 0 or kind == "written"


@pytest.mark.parametrize("head", [MSEConfig(), DiffusionConfig(target="v", width=8, depth=1)], ids=lambda head: head.kind)
def test_saved_model_is_the_same(clips: Clips, tmp_path: Path, head: MSEConfig | DiffusionConfig) -> None:
    model = tiny(head=head, mechanism="causal")
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    read = DivotLM.from_pretrained(tmp_path)
    batch = collate(_samples(model, clips), [1, 2, 3])
    assert read.config == model.config and not read.training
    assert torch.equal(read(batch).head_BN, model(batch).head_BN) and torch.equal(read(batch).text_BM, model(batch).text_BM)


def test_a_saved_model_with_another_config_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"head": {"kind": "diffusion", "target": "v"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"differs from its config\.json in head.*take the whole folder"):
        DivotLM.from_pretrained(tmp_path)


def test_full_size_has_the_official_shapes(full_size: DivotLM) -> None:
    """Mistral-7B with 262 rows more, and both MLPs."""
    state = full_size.state_dict()
    shapes = {published: list(state[name].shape) for name, published in official_names(full_size).items()}
    agent = {name: shape for name, shape in shapes.items() if not name.startswith("llm.")}
    assert agent == json.loads((GOLDEN / "divot_full_size_keys.json").read_text())["agent"]
    mistral = sum(parameter.numel() for parameter in full_size.llm.parameters())
    assert mistral == 7_241_732_096 + 2 * 262 * 4096
    assert shapes["llm.model.embed_tokens.weight"] == shapes["llm.lm_head.weight"] == [32262, 4096]


def test_a_pass_never_waits_to_look_at_a_number(full_size: DivotLM, vocabulary: Vocabulary) -> None:
    """On the meta device no number could be looked at: 20 clips read by one sample, one written by the other.

    (Of batches that write nothing transformers itself looks at one number, for packed sequences.)
    """
    shown = describe(vocabulary, torch.zeros(20, 64, 256), "a caption", limit=1400)
    made = depict(vocabulary, "a caption", torch.zeros(1, 64, 256), limit=180)
    for samples, tokens in (([made, made], 64), ([shown, made], 64)):
        seeds = list(range(len(samples)))
        batch = {name: tensor if name == "seed_B" else tensor.to("meta") for name, tensor in collate(samples, seeds).items()}
        losses = full_size(batch)
        assert losses.head_BN.shape == (len(samples), tokens) and losses.text_BM.is_meta
        assert (losses.text() + losses.head()).shape == ()


def test_the_head_is_a_small_part_of_a_full_size_pass(full_size: DivotLM, vocabulary: Vocabulary) -> None:
    batch = collate([depict(vocabulary, "a" * 100, torch.zeros(1, 64, 256), limit=180)], [0])
    batch = {name: tensor if name == "seed_B" else tensor.to("meta") for name, tensor in batch.items()}
    whole = count_flops(lambda: full_size(batch))
    head = count_flops(lambda: full_size.to_head(torch.empty(1, 64, 4096, device="meta")))
    assert head < 0.01 * whole


def test_clips_of_another_tokenizer_are_refused(model: DivotLM) -> None:
    with pytest.raises(ValueError, match="12 tokens are no whole clips of 8"):
        model(collate([depict(model.vocabulary, "ab", torch.randn(1, 12, 6), limit=200)], [0]))


SIZES = {"vocab_size": 522, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3}
UNUSED = UntrainedLanguage(width=32, hidden=48, depth=2, heads=4, key_heads=2)


def _over(base: PreTrainedConfig, vocabulary: Vocabulary) -> DivotLM:
    torch.manual_seed(0)
    return DivotLM(DivotLMConfig(language=UNUSED), AutoModelForCausalLM.from_config(base, attn_implementation="sdpa"), vocabulary).eval()


@pytest.mark.parametrize(
    ("base", "window"),
    [
        (MistralConfig(**SIZES), 3),
        (MistralConfig(**SIZES | {"sliding_window": None}), None),
        (LlamaConfig(**SIZES | {"sliding_window": None}), None),
        (MinistralConfig(**SIZES), 3),
        (Qwen2Config(**SIZES), None),
        (Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=2), None),
        (Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=0), 3),
    ],
    ids=["mistral", "mistral-full", "llama", "ministral", "qwen2", "qwen2-past-its-layers", "qwen2-all-sliding"],
)
def test_the_mask_of_text_is_what_transformers_makes_by_itself(base: PreTrainedConfig, window: int | None, vocabulary: Vocabulary) -> None:
    model, embeds_BLW = _over(base, vocabulary), torch.randn(1, 8, 32)
    assert model.window == window
    masked_BLW = model.hidden(embeds_BLW, model.mask(torch.full((1, 8), TEXT)))
    torch.testing.assert_close(masked_BLW, model.hidden(embeds_BLW, None))


@pytest.mark.parametrize(
    "base",
    [
        Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1),
        Gemma3TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention"]),
    ],
    ids=lambda base: base.model_type,
)
def test_layers_that_see_different_positions_are_refused(base: PreTrainedConfig, vocabulary: Vocabulary) -> None:
    """One mask would hide from the global ones what lies past the window of the others."""
    with pytest.raises(ValueError, match=f"this {base.model_type} model see what full_attention and sliding_attention .* name a model of"):
        _over(base, vocabulary)


def test_gathering_and_placing_without_looking() -> None:
    mask_BL = torch.tensor([[False, True, False, True], [True, False, False, False]])
    assert nth(mask_BL, 2).tolist() == [[1, 3], [0, 4]]
    x_BLW, value_BNW = torch.zeros(2, 4, 1), torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
    placed = place(x_BLW, mask_BL, value_BNW)
    assert placed[..., 0].tolist() == [[0, 1, 0, 2], [3, 0, 0, 0]]
    assert pick(placed, torch.tensor([[1, 3], [0, 0]]))[..., 0].tolist() == [[1, 2], [3, 3]]
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED
