"""A language model and its tokenizer from folders: videos in, text out; prompts in, videos out; a story as a page; and the commands."""

import io
import re
import shutil
import struct
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tests.pipelines.data.token_artifacts import SPEC, TOKENS, WIDTH
from tests.tokenizers.divot.tiny import tiny_divot

import kinetok
from kinetok.infra.artifact import InputInfo, Record, Store, publish
from kinetok.infra.errors import ConfigError, ContractError, StoreError
from kinetok.infra.storage import Folder
from kinetok.llm.divot.generation import Decoding, complete
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.llm.divot.sequences import Packed, ask_caption, ask_clip
from kinetok.llm.divot.vocabulary import Media
from kinetok.pipelines import divot
from kinetok.pipelines.cli import main
from kinetok.pipelines.data.cut import cut_video
from kinetok.pipelines.data.decode import probe
from kinetok.pipelines.data.language_feed import LANGUAGE_FILE, LanguageSpec
from kinetok.pipelines.data.language_tasks import DESCRIBE
from kinetok.pipelines.data.recipe import CutRecipe, Filters
from kinetok.pipelines.divot import VideoLM, look, story_page
from kinetok.pipelines.report.panel import enlarged, pixels
from kinetok.tokenizers.base import DecodeRecipe
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.divot.frames import CLIPS
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


def test_the_package_offers_it() -> None:
    assert kinetok.VideoLM is VideoLM and set(kinetok.__all__) == {"VideoLM", "load", "read_video"}


def frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as video:
        return sum(1 for _ in video.decode(video=0))


def test_videos_of_prompts_come_from_the_seed(model: VideoLM) -> None:
    one, again, other = (model.generate(["a red disc"], seeds=[seed]) for seed in (3, 3, 4))
    assert one.shape == (1, 3, 5, 16, 16) and torch.equal(one, again) and not torch.equal(one, other)
    both = model.generate(["a red disc", "a blue square"], seeds=[3, 4])
    torch.testing.assert_close(both[:1], one, atol=1e-4, rtol=1e-4)


def test_a_video_is_read_in_windows_of_the_tokenizer(model: VideoLM, video_bytes: Callable[[int, int], bytes], tmp_path: Path) -> None:
    for windows, read in ((1, 1), (3, 3), (CLIPS + 5, CLIPS)):
        file = tmp_path / f"{windows}.mp4"
        file.write_bytes(video_bytes(0, windows))
        token_CND, media = model.read(file)
        assert token_CND.shape == (read, TOKENS, WIDTH) and media == "video"
    said = model.ask(tmp_path / "3.mp4", "What is it?", decoding=SHORT)
    assert isinstance(said, str) and said == model.ask(tmp_path / "3.mp4", "What is it?", decoding=SHORT)


def counting(frames: int, **options: str) -> bytes:
    """A video of 24 frames a second, whose frame number n is as bright as n tells."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska", options=options) as box:
        stream = box.add_stream("mpeg4", rate=24)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            box.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), brightness(number), np.uint8), format="rgb24")))
        box.mux(stream.encode(None))
    return file.getvalue()


def brightness(number: int) -> int:
    return 20 + number * 7 % 200


RECIPE = DecodeRecipe(fps=8, frames=16, height=16, width=16)


def grey(window_BCTHW: torch.Tensor) -> torch.Tensor:
    """Brightness of each frame, (B, T)."""
    return (window_BCTHW.mean((1, 3, 4)) + 1) * 127.5


@pytest.mark.parametrize("frames", [93, 168, 1440])
def test_the_windows_of_a_video_are_those_of_the_reference_and_of_the_clip_index(frames: int, tmp_path: Path) -> None:
    """3.9, 7 and 60 seconds at 24 frames a second: which frames are seen is told by their brightness."""
    file = tmp_path / "v.mkv"
    file.write_bytes(counting(frames))
    _, window_BCTHW = look(file, RECIPE)
    starts = [place * frames // 20 for place in range(20)] if frames >= 960 else list(range(0, frames - 47, 48))
    expected = torch.tensor([[brightness(start + 3 * place) for place in range(16)] for start in starts])
    assert grey(window_BCTHW).shape == expected.shape
    assert (grey(window_BCTHW) - expected).abs().max() < 6
    if frames < 960:
        rows = cut_video(file.read_bytes(), "v", CutRecipe(fps=8, frames=16, height=16, width=16, filters=Filters(min_motion=0)))
        assert [row["start"] for row in rows] == [start / 24 for start in starts]


def test_a_short_video_is_sampled_more_densely(tmp_path: Path) -> None:
    (tmp_path / "v.mkv").write_bytes(counting(24))
    picture, window_BCTHW = look(tmp_path / "v.mkv", RECIPE)
    expected = torch.tensor([[brightness(place * 24 // 16) for place in range(16)]])
    assert not picture and (grey(window_BCTHW) - expected).abs().max() < 6


def test_what_is_declared_of_a_duration_does_not_count(tmp_path: Path) -> None:
    data, name = counting(168), b"\x44\x89\x88"  # Matroska's Duration: its id, and 8 for the bytes that follow
    at = data.index(name) + len(name)
    (seconds,) = struct.unpack(">d", data[at : at + 8])
    (tmp_path / "long.mkv").write_bytes(data[:at] + struct.pack(">d", 10 * seconds) + data[at + 8 :])
    (tmp_path / "none.mkv").write_bytes(counting(168, live="1"))
    assert [probe(tmp_path / f"{file}.mkv").seconds for file in ("long", "none")] == [pytest.approx(70, abs=1), None]
    assert [len(look(tmp_path / f"{file}.mkv", RECIPE)[1]) for file in ("long", "none")] == [3, 3]


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
    with pytest.raises(StoreError, match=r"tokenizer holds no language\.json.*convert-language --tokenizer"):
        VideoLM.open(str(folder / "tokenizer"), str(folder / "tokenizer"))


def run(*words: Any) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_say_which_model_and_tokenizer_they_found(
    folder: Path, video_bytes: Callable[[int, int], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of a tokenizer, its tokens, a model that learned from them, what it wrote, and the training on that."""
    store = Store(Folder(str(tmp_path)))
    monkeypatch.setenv("KINETOK_STORE", str(tmp_path))

    def made(kind: str, name: str, copied: str | None = None, stage: str | None = None, **inputs: str) -> None:
        out = store.folder(kind, name, name)
        if copied is not None:
            shutil.copytree(folder / copied, out.local / "model")
        behind = {field: (InputInfo(kind=of, name=other, key=other, digest=""),) for field, (of, other) in pairs(inputs)}
        config: dict[str, object] = {"objective": {"kind": "divot", "stage": stage}} if stage else {}
        if kind == "language":
            config["tasks"] = [{"kind": "captioning"}, {"kind": "generation"}]
        publish(out, Record(kind=kind, name=name, key=name, version=1, config=config, inputs=behind, digest="", started="2026", seconds=1))

    def pairs(inputs: dict[str, str]) -> list[tuple[str, tuple[str, str]]]:
        return [(field, (where.split("/")[0], where.split("/")[1])) for field, where in inputs.items()]

    made("train", "joint", "tokenizer", "joint")
    made("encode", "tokens", model="train/joint")
    made("language", "tuned", "language", tokens="encode/tokens")
    options = ("--steps", 1, "--guidance", 1, "--out", tmp_path / "v.mp4")
    words = ("generate", "a red disc", "--model", "tuned", *options)
    assert "tokenizer: joint-joint\n" in run(*words) and "model:" not in run(*words)
    assert "model: tuned-tuned\n" in run("generate", "a red disc", *options)
    (tmp_path / "read.mp4").write_bytes(video_bytes(0, 1))
    assert "model: tuned-tuned\n" in run("ask", tmp_path / "read.mp4", "What is it?", "--max-tokens", 2)
    refused = CliRunner().invoke(main, ["tell", "a story", "--clips", "1"])
    assert refused.exit_code == 1 and "was trained on storytelling; it holds tuned (captioning, generation)" in refused.output
    made("write", "written", model="language/tuned")
    made("train", "adapted", "tokenizer", "adapt", tokens="write/written")
    assert "tokenizer: adapted-adapted\n" in run(*words)
    assert "tokenizer:" not in run(*words, "--tokenizer", "joint")


def test_options_reach_the_sampler_and_the_decoding(folder: Path, model: VideoLM, tmp_path: Path) -> None:
    named = ("--model", folder / "language", "--tokenizer", folder / "tokenizer", "--seed", 3)
    changed = VideoLM.open(str(folder / "language"), str(folder / "tokenizer"), steps=4, guidance=1.5)
    assert (changed.show.steps, changed.show.guidance) == (4, 1.5) and (model.show.steps, model.show.guidance) == (2, 2.0)
    run("generate", "a disc", *named, "--steps", 4, "--guidance", 1.5, "--variance-scale", 0.25, "--out", tmp_path / "v.mp4")
    assert (tmp_path / "v.mp4").read_bytes() == changed.mp4(changed.generate(["a disc"], seeds=[3], variance_scale=0.25)[0])
    options = ("--temperature", 0, "--max-tokens", 4, "--top-p", 1)
    run("tell", "A story", *named, *options, "--clips", 1, "--variance-scale", 0.25, "--out", tmp_path / "story.html")
    parts = model.tell("A story", clips=1, seed=3, decoding=SHORT, variance_scale=0.25)
    assert (tmp_path / "story.html").read_text() == story_page(model, "A story", parts)
    (tmp_path / "v.mkv").write_bytes(counting(24))
    said = run("ask", tmp_path / "v.mkv", "What?", *named, *options).rstrip("\n")
    assert said == model.ask(tmp_path / "v.mkv", "What?", decoding=SHORT)
    with pytest.raises(ConfigError, match="the schedule has 1000 steps, 2000 cannot be taken"):
        VideoLM.open(str(folder / "language"), str(folder / "tokenizer"), steps=2000)


def test_more_of_the_sampler_and_the_type_of_the_weights(folder: Path, model: VideoLM, tmp_path: Path) -> None:
    named = ("--model", folder / "language", "--tokenizer", folder / "tokenizer", "--seed", 3)
    settings = ("--sampler", "eta=0.5", "--sampler", "rescale=0", "--sampler", "spacing=uniform", "--steps", 4)
    run("generate", "a disc", *named, *settings, "--dtype", "bf16", "--out", tmp_path / "v.mp4")
    more = {"eta": 0.5, "rescale": 0, "spacing": "uniform"}
    changed = VideoLM.open(str(folder / "language"), str(folder / "tokenizer"), steps=4, sampler=more, dtype="bf16")
    assert changed.show.sampler == model.tokenizer.config.sampler.model_copy(update=more | {"steps": 4})
    assert (tmp_path / "v.mp4").read_bytes() == changed.mp4(changed.generate(["a disc"], seeds=[3])[0])
    assert {weight.dtype for weight in changed.model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in model.model.parameters()} == {torch.float32}, "the default of a CPU"
    kept, rounded = (dict(each.model.named_buffers()) for each in (model, changed))
    assert kept and all(torch.equal(rounded[name], buffer) for name, buffer in kept.items()), "rotary frequencies"
    changed.tell("A story", clips=1, seed=3, decoding=SHORT)
    for wrong, message in (("etha=1", "etha"), ("eta", "write it as")):
        refused = CliRunner().invoke(main, ["generate", "a disc", *map(str, named), "--sampler", wrong])
        assert refused.exit_code == 1 and message in refused.output


def respecified(folder: Path, target: Path, **changes: Any) -> Path:
    """The language model with another `language.json`."""
    shutil.copytree(folder / "language", target)
    spec = LanguageSpec.model_validate_json((target / LANGUAGE_FILE).read_text())
    (target / LANGUAGE_FILE).write_text(spec.model_copy(update=changes).model_dump_json())
    return target


def test_a_model_that_was_not_tuned_on_instructions_says_its_caption(folder: Path, model: VideoLM, tmp_path: Path) -> None:
    named = ("--model", respecified(folder, tmp_path / "m", instructed=False), "--tokenizer", folder / "tokenizer")
    (tmp_path / "v.mkv").write_bytes(counting(24))
    short = ("--temperature", 0, "--max-tokens", 4)
    asked, alone = (run("ask", tmp_path / "v.mkv", *words, *named, *short) for words in (["What?"], []))
    assert asked == "the model was not tuned on instructions: this is its caption, and no answer to the question\n" + alone
    token_CND, _ = model.read(tmp_path / "v.mkv")
    assert alone.rstrip("\n") == complete(model.model, [ask_caption(model.model.vocabulary, token_CND)], [0], SHORT)[0].strip()
    named = ("--model", folder / "language", "--tokenizer", folder / "tokenizer")
    described = [run("ask", tmp_path / "v.mkv", *words, *named, *short) for words in ([], [DESCRIBE])]
    assert described[0] == described[1]


def test_a_model_of_videos_and_pictures_makes_either(folder: Path, model: VideoLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def spy(*words: Any, media: Media, **form: Any) -> Packed:
        asked.append(media)
        return ask_clip(*words, media=media, **form)

    monkeypatch.setattr(divot, "ask_clip", spy)
    tokens = model.spec.tokens
    assert tokens.recipe is not None
    still = tokens.model_copy(update={"recipe": tokens.recipe.model_copy(update={"frames": 1})})
    named = ("--model", respecified(folder, tmp_path / "m", other=still), "--tokenizer", folder / "tokenizer", "--seed", 3)
    both = VideoLM.open(str(tmp_path / "m"), str(folder / "tokenizer"))
    picture, video = (both.generate(["a disc"], seeds=[3], media=media) for media in ("image", None))
    assert picture.shape == (1, 3, 1, 16, 16) and video.shape == (1, 3, 5, 16, 16)
    assert asked == ["image", "video"]
    run("generate", "a disc", *named, "--image", "--out", tmp_path / "i.png")
    shown = torch.from_numpy(np.array(Image.open(tmp_path / "i.png")))
    assert torch.equal(shown, enlarged(pixels(picture[0]))[0])
    with pytest.raises(ContractError, match="learned tokens of videos alone: train it on a source of images too, or ask for videos"):
        model.generate(["a disc"], seeds=[3], media="image")


def test_options_left_out_are_the_models_own() -> None:
    shown = {option.name: option.default for option in main.commands["ask"].params}
    assert Decoding.model_validate({name: shown[name] for name in Decoding.model_fields}) == Decoding()


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
