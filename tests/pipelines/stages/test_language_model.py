"""A language model from elsewhere: released files become a folder, the folder an artifact that is asked, tuned and written with."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tests.pipelines.data.token_artifacts import SPEC, TOKENS, WIDTH, make_tokens
from tests.pipelines.data.videos import moving, picture
from tests.pipelines.stages.running import run_stage
from tests.tokenizers.divot.tiny import tiny_divot

from kinetok.infra.artifact import Store
from kinetok.infra.errors import ContractError, StoreError
from kinetok.infra.storage import Folder
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.pipelines.cli import main
from kinetok.pipelines.data.language_feed import LANGUAGE_FILE, LanguageSpec
from kinetok.pipelines.data.verify import problems
from kinetok.pipelines.models import language_spec, open_language
from kinetok.pipelines.stages.language_model import LanguageModel
from kinetok.tokenizers.base import DecodeRecipe
from kinetok.tokenizers.card import CARD_FILE
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer


def tiny() -> DivotLM:
    torch.manual_seed(0)
    sizes = UntrainedLanguage(width=32, hidden=48, depth=1, heads=4, key_heads=2)
    return DivotLM.build(DivotLMConfig(language=sizes, clip_tokens=TOKENS, token_width=WIDTH))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_folder_becomes_an_artifact_that_is_known_by_its_content(folder: Path) -> None:
    store, tokens = Store(Folder(str(folder / "store"))), make_tokens(folder / "tokens", 4)
    stage = LanguageModel(where=str(folder / "model"), tokens="t")  # type: ignore[arg-type]
    made = run_stage(store, stage, "released", {"tokens": tokens})
    assert not list(problems(made)) and language_spec(made) == LanguageSpec(tokens=SPEC, instructed=True)
    assert all(torch.equal(tensor, tiny().state_dict()[name]) for name, tensor in open_language(made).state_dict().items())
    (folder / "model").rename(folder / "moved")
    moved = LanguageModel(where=str(folder / "moved"), tokens="t")  # type: ignore[arg-type]
    assert moved.key({"tokens": tokens.key}) == made.key
    (folder / "moved" / CARD_FILE).write_text("figures were added")
    assert moved.key({"tokens": tokens.key}) == made.key, "what is said of a model is not the model"
    (folder / "moved" / "config.json").write_text((folder / "moved" / "config.json").read_text() + " ")
    assert moved.key({"tokens": tokens.key}) != made.key


def test_what_a_folder_says_of_its_tokens_counts(folder: Path) -> None:
    store, tokens = Store(Folder(str(folder / "store"))), make_tokens(folder / "tokens", 4)
    stage = LanguageModel(where=str(folder / "model"), tokens="t")  # type: ignore[arg-type]
    known = LanguageSpec(tokens=SPEC, instructed=False)
    (folder / "model" / LANGUAGE_FILE).write_text(known.model_dump_json())
    assert language_spec(run_stage(store, stage, "released", {"tokens": tokens})) == known
    other = known.model_copy(update={"tokens": SPEC.model_copy(update={"weights": "b" * 64})})
    (folder / "model" / LANGUAGE_FILE).write_text(other.model_dump_json())
    with pytest.raises(ContractError, match="another tokenizer than the rest: weights"):
        run_stage(store, stage, "released", {"tokens": tokens})
    wide = make_tokens(folder / "wide", 4, spec=SPEC.model_copy(update={"channels": 9}))
    with pytest.raises(ContractError, match="tokens of 8 numbers, the data have 9"):
        run_stage(store, stage, "released", {"tokens": wide})


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no config\.json: name a folder"):
        LanguageModel(where=str(tmp_path), tokens="t").facts()  # type: ignore[arg-type]


def released(folder: Path) -> DivotLM:
    """A model as it would be published: `agent.bin`, `llm/` and `vocabulary/`, of 64 tokens of 256 numbers."""
    torch.manual_seed(0)
    sizes = UntrainedLanguage(width=32, hidden=48, depth=1, heads=4, key_heads=2)
    model = DivotLM.build(DivotLMConfig(language=sizes)).eval()
    names = {"from_tokens.": "input_resampler.proj.", "to_head.": "output_resampler.proj."}
    state = model.state_dict()
    agent = {new + name.removeprefix(old): state[name] for old, new in names.items() for name in state if name.startswith(old)}
    torch.save(agent, folder / "agent.bin")
    model.llm.save_pretrained(folder / "llm")
    model.vocabulary.save_pretrained(folder / "vocabulary")
    return model


def convert(folder: Path, *options: object) -> tuple[int, str]:
    words = ["convert-language", *(folder / name for name in ("agent.bin", "llm", "vocabulary", "out")), *options]
    result = CliRunner().invoke(main, list(map(str, words)))
    return result.exit_code, result.output


def divot(folder: Path, *, width: int = 256) -> DivotTokenizer:
    torch.manual_seed(1)
    rung = CausalTokenizer(CausalConfig(channels=8, mult=(1, 2), strides=((2, 2),), blocks=1, z=4, patch=2, groups=4)).eval()
    made = DivotTokenizer.build(tiny_divot(tokens=64, width=width), rung).eval()
    made.save_pretrained(folder)
    return made


def test_released_files_become_a_folder_with_a_report_of_each(tmp_path: Path) -> None:
    model = released(tmp_path)
    code, output = convert(tmp_path)
    assert code == 0 and "agent.bin: 8 tensors read, none missing, none left over" in output
    assert f"llm: {len(model.llm.state_dict())} tensors read, none missing, none left over" in output
    assert "for a job alone: --tokenizer makes it one that can be asked" in output and not (tmp_path / "out" / LANGUAGE_FILE).exists()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in DivotLM.from_pretrained(tmp_path / "out").state_dict().items())


def test_a_converted_folder_can_be_asked(tmp_path: Path) -> None:
    released(tmp_path)
    tokenizer = divot(tmp_path / "tokenizer")
    code, output = convert(tmp_path, "--tokenizer", tmp_path / "tokenizer", "--pretrained")
    assert code == 0 and f"which speak the tokens of {tmp_path}/tokenizer" in output
    spec = LanguageSpec.model_validate_json((tmp_path / "out" / LANGUAGE_FILE).read_bytes())
    assert not spec.instructed and spec.recipe == DecodeRecipe(fps=8, frames=5, height=16, width=16)
    assert spec.tokens.weights == tokenizer.digest()
    (tmp_path / "a.jpg").write_bytes(picture(moving(1)[0]))
    named = ["--model", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer"), "--max-tokens", "2"]
    asked = CliRunner().invoke(main, ["ask", str(tmp_path / "a.jpg"), "What is it?", *named])
    assert asked.exit_code == 0, asked.output


def test_a_tokenizer_of_other_tokens_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    released(tmp_path)
    divot(tmp_path / "narrow", width=8)
    code, output = convert(tmp_path, "--tokenizer", tmp_path / "narrow")
    assert code == 1 and "narrow makes 64 tokens of 8 numbers, the language model takes 64 of 256" in output
    code, output = convert(tmp_path, "--tokenizer", tmp_path / "narrow" / "lower")
    assert code == 1 and "is a 'causal' model; name a folder that `kinetok convert` wrote" in output
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name in ("llm", "vocabulary"):
        (tmp_path / name).mkdir()
    torch.save({}, tmp_path / "agent.bin")
    code, output = convert(tmp_path)
    assert code == 1 and "agent.bin and" in output and "cannot be converted" in output
    released(tmp_path)
    torch.save({"input_resampler.proj.0.weight": torch.zeros(1)}, tmp_path / "agent.bin")
    code, output = convert(tmp_path)
    assert code == 1 and "7 missing (input_resampler.proj.0.bias, " in output and "1 of another size" in output
    assert not (tmp_path / "out").exists()
