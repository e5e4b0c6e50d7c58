"""A language model and its tokenizer from folders: videos in, text out; prompts in, videos out; a story as a page; and the commands."""

import io
import re
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from click.testing import CliRunner
from tests.pipelines.data.token_artifacts import SPEC, TOKENS, WIDTH
from tests.tokenizers.divot.tiny import tiny_divot

from kinetok.infra.errors import ContractError, StoreError
from kinetok.llm.divot.generation import Decoding
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.pipelines.cli import main
from kinetok.pipelines.data.language_feed import LANGUAGE_FILE, LanguageSpec
from kinetok.pipelines.divot import MOST_WINDOWS, VideoLM, story_page
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

SHORT = Decoding(temperature=0, max_tokens=4)


def tokenizer() -> DivotTokenizer:
    """5 frames of 16 x 16 pixels to 4 tokens of 8 numbers."""
    torch.manual_seed(0)
    rung = CausalTokenizer(CausalConfig(channels=8, mult=(1, 2), strides=((2, 2),), blocks=1, z=4, patch=2, groups=4)).eval()
    return DivotTokenizer.build(tiny_divot(tokens=TOKENS, width=WIDTH), rung).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer/` and `language/`, which belong together, and `other/`, a tokenizer that does not."""
    target, made = tmp_path_factory.mktemp("divot"), tokenizer()
    made.save_pretrained(target / "tokenizer")
    torch.manual_seed(1)
    language = UntrainedLanguage(width=32, hidden=48, depth=1, heads=4, key_heads=2)
    DivotLM.build(DivotLMConfig(language=language, clip_tokens=TOKENS, token_width=WIDTH)).save_pretrained(target / "language")
    spec = LanguageSpec(tokens=made.spec().model_copy(update={"recipe": SPEC.recipe}), instructed=True)
    (target / "language" / LANGUAGE_FILE).write_text(spec.model_dump_json())
    torch.nn.init.normal_(next(made.encoder.parameters()))
    made.save_pretrained(target / "other")
    return target


@pytest.fixture(scope="module")
def model(folder: Path) -> VideoLM:
    return VideoLM.open(str(folder / "language"), str(folder / "tokenizer"))


def frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as video:
        return sum(1 for _ in video.decode(video=0))


def test_videos_of_prompts_come_from_the_seed(model: VideoLM) -> None:
    one, again, other = (model.generate(["a red disc"], seeds=[seed]) for seed in (3, 3, 4))
    assert one.shape == (1, 3, 5, 16, 16) and torch.equal(one, again) and not torch.equal(one, other)
    both = model.generate(["a red disc", "a blue square"], seeds=[3, 4])
    torch.testing.assert_close(both[:1], one, atol=1e-4, rtol=1e-4)


def test_a_video_is_read_in_windows_of_the_tokenizer(model: VideoLM, video_bytes: Callable[[int, int], bytes], tmp_path: Path) -> None:
    for windows, read in ((1, 1), (3, 3), (MOST_WINDOWS + 5, MOST_WINDOWS)):
        file = tmp_path / f"{windows}.mp4"
        file.write_bytes(video_bytes(0, windows))
        assert model.read(file).shape == (read, TOKENS, WIDTH)
    said = model.ask(tmp_path / "3.mp4", "What is it?", decoding=SHORT)
    assert isinstance(said, str) and said == model.ask(tmp_path / "3.mp4", "What is it?", decoding=SHORT)


def test_a_story_is_a_page_that_holds_its_clips(model: VideoLM) -> None:
    parts = model.tell("A <b>story</b>", clips=2, decoding=SHORT)
    assert [video.shape for _, video in parts] == [(3, 5, 16, 16)] * 2
    page = story_page(model, "A <b>story</b>", parts)
    assert "<b>" not in page and "http" not in page
    assert [frames(b64decode(data)) for data in re.findall(r"data:video/mp4;base64,([^\"]+)", page)] == [5, 5]


def test_what_does_not_belong_together_is_refused(folder: Path) -> None:
    with pytest.raises(ContractError, match=r"language does not speak the tokens of this tokenizer: .*weights"):
        VideoLM.open(str(folder / "language"), str(folder / "other"))
    with pytest.raises(StoreError, match=r"--tokenizer: .*language does not say which tokenizer it speaks for; name it"):
        VideoLM.open(str(folder / "language"))
    with pytest.raises(StoreError, match=r"tokenizer holds no language\.json"):
        VideoLM.open(str(folder / "tokenizer"), str(folder / "tokenizer"))


def run(*words: Any) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_commands(folder: Path, video_bytes: Callable[[int, int], bytes], tmp_path: Path) -> None:
    named = ("--model", folder / "language", "--tokenizer", folder / "tokenizer")
    assert run("generate", "a red disc", *named, "--out", tmp_path / "made.mp4").strip() == str(tmp_path / "made.mp4")
    assert frames((tmp_path / "made.mp4").read_bytes()) == 5
    (tmp_path / "v.mp4").write_bytes(video_bytes(0, 1))
    run("ask", tmp_path / "v.mp4", "What is it?", *named)
    run("tell", "A story", *named, "--clips", 1, "--out", tmp_path / "story.html")
    assert (tmp_path / "story.html").read_text().count("<video") == 1
    (tmp_path / "no.mp4").write_bytes(b"nothing")
    refused = CliRunner().invoke(main, ["ask", str(tmp_path / "no.mp4"), "What?", *map(str, named)])
    assert refused.exit_code == 1 and "no.mp4 cannot be opened" in refused.output
