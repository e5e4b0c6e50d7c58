"""A language model from elsewhere: released files become a folder, the folder an artifact that is asked, tuned and written with."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tests.pipelines.data.token_artifacts import SPEC, TOKENS, WIDTH, make_tokens
from tests.pipelines.stages.running import run_stage

from kinetok.infra.artifact import Store
from kinetok.infra.errors import ContractError, StoreError
from kinetok.infra.storage import Folder
from kinetok.llm.divot import official
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.pipelines.cli import main
from kinetok.pipelines.data.language_feed import LANGUAGE_FILE, LanguageSpec
from kinetok.pipelines.data.verify import problems
from kinetok.pipelines.models import language_spec, open_language
from kinetok.pipelines.stages.language_model import LanguageModel
from kinetok.tokenizers.divot.checkpoints import LoadReport


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


def convert(folder: Path) -> tuple[int, str]:
    for name in ("llm", "vocabulary"):
        (folder / name).mkdir()
    torch.save({}, folder / "agent.bin")
    words = ["convert-language", *(str(folder / name) for name in ("agent.bin", "llm", "vocabulary", "out"))]
    result = CliRunner().invoke(main, words)
    return result.exit_code, result.output


def test_released_files_become_a_folder_with_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them is tested with the converter."""
    report = LoadReport(loaded=3, ignored=(), missing=(), unexpected=(), misshapen=())
    monkeypatch.setattr(official, "open_official", lambda *paths: (tiny(), report))
    code, output = convert(tmp_path)
    assert code == 0 and "llm: 3 tensors read, none missing, none left over" in output
    assert DivotLM.from_pretrained(tmp_path / "out").config == tiny().config


def test_files_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    code, output = convert(tmp_path)
    assert code == 1 and "agent.bin and" in output and "cannot be converted" in output
    assert not (tmp_path / "out").exists()
