"""The official joint loss, projections and keys, through the converter that loads the released checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from tests import golden_files
from tests.golden_files import Golden
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from kinetok.llm.divot.heads import GMMConfig
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.mask import QUERY, READ
from kinetok.llm.divot.model import DivotLM, DivotLMConfig, Projection
from kinetok.llm.divot.official import PARTS, agent_config, load_state, official_names, open_official, read_folder
from kinetok.llm.divot.sequences import IGNORED
from kinetok.llm.divot.vocabulary import Vocabulary, byte_tokenizer
from kinetok.tokenizers.base import Batch

LANGUAGE = UntrainedLanguage(width=64, hidden=96, depth=2, heads=4, key_heads=2, vocabulary=176)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return golden_files.read("11_divot_llm")


@pytest.fixture(scope="module")
def model(golden: Golden, vocabulary: Vocabulary) -> DivotLM:
    numbers = golden.constructor["mistral"]
    assert isinstance(numbers, dict)
    numbers["rope_parameters"] = {"rope_type": "default", "rope_theta": numbers.pop("rope_theta")}
    language = MistralForCausalLM._from_config(MistralConfig(**numbers), attn_implementation="sdpa")
    config = agent_config(golden.under("state"), LANGUAGE, clip_tokens=64)
    assert config == DivotLMConfig(language=LANGUAGE, token_width=8, head=GMMConfig(components=4))
    model = DivotLM(config, language, vocabulary)
    report = load_state(model, golden.under("state"))
    assert report.loaded == len(model.state_dict())
    return model


def _batch(official: dict[str, Tensor]) -> Batch:
    """The official arguments as a batch of ours."""
    codes_BL, labels_BL = official["attention_mask"].clone(), official["labels"]
    token_BND = official["video_embeds"].flatten(1, 2)
    codes_BL[official["ids_cmp_mask"]] = READ
    labelled = [row != IGNORED for row in labels_BL]
    batch = {
        "ids_BL": official["input_ids"],
        "codes_BL": codes_BL,
        "label_BM": nn.utils.rnn.pad_sequence([row[mask] for row, mask in zip(labels_BL, labelled, strict=True)], True, IGNORED),
        "label_at_BM": nn.utils.rnn.pad_sequence([mask.nonzero()[:, 0] - 1 for mask in labelled], True),
        "seed_B": torch.zeros(len(codes_BL), dtype=torch.int64),
    }
    assert torch.equal(codes_BL == QUERY, official["ids_gen_mask"])
    return batch | {"written_BND" if official["ids_gen_mask"].any() else "read_BND": token_BND}


@pytest.mark.parametrize("name", ["gen", "cmp"])
def test_joint_loss_and_gradients(golden: Golden, model: DivotLM, name: str) -> None:
    batch = _batch(golden.under(f"in.{name}"))
    model.zero_grad()
    losses = model(batch)
    total = losses.text() + losses.head()
    golden.check(losses.text()[None], f"{name}.lm_loss")
    golden.check(total[None], f"{name}.total_loss")
    if name == "gen":
        golden.check(losses.head()[None], "gen.gmm_loss")
        query_BND = model.hidden(model.embed(batch), model._mask(batch))[batch["codes_BL"] == QUERY].unflatten(0, (-1, 64))
        golden.check(model.to_head(query_BND), "gen.gmm_params")
    hidden_BLW = model.hidden(model.embed(batch), model._mask(batch)) * (batch["codes_BL"] != 0)[..., None]
    golden.check(hidden_BLW, f"{name}.last_hidden")
    parameters = dict(model.named_parameters())
    ours = {published: own for own, published in official_names(model).items()}
    for key, expected in golden.under(f"out.{name}.grad").items():
        (gradient,) = torch.autograd.grad(total, parameters[ours[key]], retain_graph=True)
        torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=1e-5)


def test_projections() -> None:
    """Of sizes that no one model has: the two stand by themselves."""
    golden = golden_files.read("10_projections")
    pair = nn.ModuleDict({"from_tokens": Projection(16, 48), "to_head": Projection(48, 68)})
    report = load_state(pair, golden.under("state"), tuple(PARTS.values()))  # type: ignore[arg-type]
    assert report.loaded == len(pair.state_dict())
    golden.check(pair["from_tokens"](golden.tensors["in.tokens"]), "input")
    golden.check(pair["to_head"](golden.tensors["in.hidden"]), "output")


def test_a_misfit_is_refused_by_name(golden: Golden, model: DivotLM) -> None:
    state = golden.under("state")
    state["llm.extra"] = state.pop("llm.lm_head.weight")
    with pytest.raises(ValueError, match=r"missing \(llm.lm_head.weight\); 1 unexpected \(llm.extra\)"):
        load_state(model, state)


@pytest.mark.parametrize(("width", "components"), [(1, 1), (6, 3), (8, 17)])
def test_numbers_of_a_model_follow_from_its_agents_sizes(width: int, components: int) -> None:
    made = DivotLMConfig(language=LANGUAGE, clip_tokens=8, token_width=width, head=GMMConfig(components=components))
    model = DivotLM.build(made.model_copy(update={"language": LANGUAGE.model_copy(update={"vocabulary": None})}))
    state = {official_names(model)[name]: tensor for name, tensor in model.state_dict().items()}
    assert agent_config(state, LANGUAGE, clip_tokens=8) == made


def test_an_agent_without_a_mixture_is_refused(golden: Golden) -> None:
    state = golden.under("state")
    with pytest.raises(ValueError, match=r"proj\.2\.weight has 67 rows: tokens of 8 numbers need a multiple of 17"):
        agent_config(state | {"output_resampler.proj.2.weight": torch.zeros(67, 68)}, LANGUAGE, clip_tokens=64)
    del state["input_resampler.proj.0.weight"]
    assert agent_config(state, LANGUAGE, clip_tokens=64) == DivotLMConfig(language=LANGUAGE)


def test_released_layout_is_read_without_unpickling(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """An agent file, a folder of `.bin` shards as old versions of transformers wrote them, and the tokenizer's folder; of other sizes."""
    sizes = UntrainedLanguage(width=32, hidden=48, depth=1, heads=4, key_heads=2)
    torch.manual_seed(0)
    model = DivotLM.build(DivotLMConfig(language=sizes, clip_tokens=16, token_width=12, head=GMMConfig(components=5)))
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text(json.dumps(model.llm.config.to_dict() | {"architectures": ["MistralForCausalLM"]}))
    state = model.llm.state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "layers" in name}, tmp_path / "llm/pytorch_model-00001-of-00002.bin")
    torch.save({name: tensor for name, tensor in state.items() if "layers" not in name}, tmp_path / "llm/pytorch_model-00002-of-00002.bin")
    names = {"from_tokens": "input_resampler.proj", "to_head": "output_resampler.proj"}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("llm.")}
    torch.save({f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": value for key, value in own.items()}, tmp_path / "agent.bin")
    vocabulary.save_pretrained(tmp_path / "tokenizer")
    opened = open_official(tmp_path / "agent.bin", tmp_path / "llm", tmp_path / "tokenizer", clip_tokens=16)
    assert opened.model.config.model_copy(update={"language": sizes}) == model.config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in opened.model.state_dict().items())
    assert (opened.agent.loaded, opened.language.loaded) == (len(own), len(state))
    with pytest.raises(ValueError, match="neither"):
        read_folder(tmp_path / "tokenizer")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"base lacks 262 of the 262 visual tokens, .* name the tokenizer folder that was released beside"):
        open_official(tmp_path / "agent.bin", tmp_path / "llm", tmp_path / "base")
    vocabulary.tokenizer.save_pretrained(tmp_path / "large")
    large = Vocabulary.from_pretrained(tmp_path / "large")
    large.tokenizer.add_tokens(["<more>"], special_tokens=True)
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="large has ids up to 522, the model 522 rows"):
        open_official(tmp_path / "agent.bin", tmp_path / "llm", tmp_path / "large")
