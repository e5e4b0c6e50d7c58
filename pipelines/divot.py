"""`VideoLM`: a Divot-LLM with its tokenizer: videos in, text out; text in, videos out; stories of both. From Python, and for the commands.

```python
model = VideoLM.open("writer")          # the name of an artifact, a folder, or models:/name@alias
model.ask("cat.mp4", "What does the cat do?")
video = model.generate(["a red disc falls"], seeds=[0])       # (1, 3, T, H, W) in [-1, 1]
image = model.generate(["a red disc"], seeds=[0], media="image")   # of a model that learned pictures too; T is 1
parts = model.tell("A story of two discs", clips=3, seed=0)   # pairs of a text and its video
```

Which windows of a video are read is said in `kinetok.tokenizers.divot.frames`; one that is shorter than a window is sampled more densely, a
file of one frame is read as a picture. Imports no Ray. Not covered: many prompts (`stages/write.py`), which model a command takes
(`trained_for.py`), which tokenizer an artifact's model speaks for (`own_tokenizer.py`).

Legend: B videos or windows, C T H W colours, frames, rows, columns, N tokens of a clip, D token width.
"""

import html
import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from kinetok.infra.artifact import Store
from kinetok.infra.errors import ConfigError, ContractError, StoreError
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.llm.divot.generation import Decoding, complete, make_clips, tell
from kinetok.llm.divot.model import DivotLM
from kinetok.llm.divot.sequences import ask, ask_clip
from kinetok.llm.divot.vocabulary import Media
from kinetok.pipelines.data.decode import decode_clips, measure
from kinetok.pipelines.data.language_feed import LANGUAGE_FILE, LanguageSpec
from kinetok.pipelines.data.language_tasks import DESCRIBE
from kinetok.pipelines.data.reasons import BadVideo
from kinetok.pipelines.data.token_shards import DTYPES, require_spec
from kinetok.pipelines.data.token_videos import media_of
from kinetok.pipelines.models import MODEL, REGISTRY, load, on_disk, open_store
from kinetok.pipelines.own_tokenizer import own_tokenizer
from kinetok.pipelines.report.panel import enlarged, mp4, pixels
from kinetok.pipelines.tokens_shown import Shower
from kinetok.tokenizers.base import CONFIG_FILE, DecodeRecipe, Tokenizer, TokenSpec
from kinetok.tokenizers.divot.ddim import SamplerConfig, timesteps
from kinetok.tokenizers.divot.frames import window_starts
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>body{{max-width:44rem;margin:3rem auto;padding:0 1rem;font:1.1rem/1.6 Georgia,serif}}
video{{width:100%;image-rendering:pixelated;border-radius:.5rem}}h1{{font-weight:500;line-height:1.2}}</style>
<h1>{title}</h1>
{parts}</html>
"""


@dataclass(frozen=True)
class VideoLM:
    """A language model of clips and the tokenizer whose tokens it speaks, both in eval mode."""

    model: DivotLM
    tokenizer: Tokenizer
    spec: LanguageSpec
    show: Shower
    chosen: str | None = None
    """Name and key of the tokenizer, where the store told it and nobody named it."""

    @classmethod
    def open(
        cls,
        model: str,
        tokenizer: str | None = None,
        *,
        store: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: Mapping[str, object] | None = None,
        dtype: Literal["fp32", "bf16"] | None = None,
    ) -> "VideoLM":
        """The model at `model`: a folder, an artifact of `store` (default: $KINETOK_STORE, else `./work`), or `models:/name@alias`.

        `tokenizer` is what `kinetok.load` takes; None is that which shows what an artifact's model writes, where the store tells. `steps`
        and `guidance` (1 is none) of sampling videos, and whatever of a `SamplerConfig` is in `sampler`, are the tokenizer's own if left
        out. `dtype` is of the language model's weights; None is bf16 on a GPU and fp32 on a CPU. Raises StoreError where one of the two
        is not there, ContractError where they do not belong together, ConfigError where the tokenizer cannot sample so.
        """
        place = open_store(store)
        made, spec = _open_language(model, place)
        own = own_tokenizer(model, place) if tokenizer is None else None
        read = load(own.folder.url if own is not None else str(tokenizer), store=place.root.url)
        try:
            require_spec(spec.tokens, read.spec())
        except ContractError as error:
            raise ContractError(f"{model} does not speak the tokens of this tokenizer: {error}") from error
        gpu = torch.cuda.is_available()
        show = Shower(read, spec.tokens, Resources(gpus=1.0 if gpu else 0.0), _sampler(read, steps, guidance, sampler or {}))
        for weight in made.parameters():  # weights alone: rotary frequencies must not be rounded
            weight.data = weight.data.to(DTYPES[dtype or ("bf16" if gpu else "fp32")])
        return cls(made.to(show.device), read, spec, show, None if own is None else f"{own.name}-{own.key}")

    def ask(self, video: str | Path, question: str = DESCRIBE, *, decoding: Decoding | None = None, seed: int = 0) -> str:
        """What the model answers to a question about a video or a picture; one that was not tuned on instructions says its caption,
        whatever is asked (`spec.instructed`). BadVideo where the file does not decode."""
        clips_CND, media = self.read(video)
        prompt = ask(self.model.vocabulary, clips_CND, question, media=media, instructed=self.spec.instructed)
        return complete(self.model, [prompt], [seed], decoding or Decoding())[0].strip()

    @torch.no_grad()
    def read(self, video: str | Path) -> tuple[Tensor, Media]:
        """Tokens of the windows of a file, (windows, N, D), and what they are of. BadVideo where it does not decode."""
        picture, window_BCTHW = look(video, self.spec.recipe_of("video"), self.spec.recipe_of("image"))
        token_BND = self.tokenizer.encode(window_BCTHW.to(self.show.device)).values
        tokens_BND = torch.unflatten(token_BND.flatten(0, 1), 0, (-1, self.model.config.clip_tokens)).cpu()
        return tokens_BND, "image" if picture else "video" if self.spec.other is not None else self.spec.media

    def generate(
        self, prompts: Sequence[str], *, seeds: Sequence[int], variance_scale: float | None = None, media: Media | None = None
    ) -> Tensor:
        """A video for each prompt, (B, 3, T, H, W) in [-1, 1]; a picture is one of a single frame.

        `variance_scale` is of the variance of the tokens that are drawn, over the predicted one; None takes that of the model's head.
        `media` is what to make; None makes what the model's first source was. ContractError where it learned no such clips.
        """
        tokens = self.spec.of(media)
        media = media_of(tokens)
        asked = [ask_clip(self.model.vocabulary, text, instructed=self.spec.instructed, media=media) for text in prompts]
        made_BND = make_clips(self.model, asked, seeds, media=media, variance_scale=variance_scale)
        return self._shower(tokens)(list(made_BND), seeds)

    def tell(
        self, request: str, *, clips: int, seed: int = 0, decoding: Decoding | None = None, variance_scale: float | None = None
    ) -> list[tuple[str, Tensor]]:
        """A story of `clips` texts, each with its video (3, T, H, W)."""
        drawing: dict[str, Any] = {"variance_scale": variance_scale, "reread": self.spec.rereads}
        parts = tell(self.model, request, clips=clips, seed=seed, decoding=decoding or Decoding(), **drawing)
        videos = self.show([part.token_ND for part in parts], [seed + number for number in range(clips)])
        return [(part.text.strip(), video_CTHW) for part, video_CTHW in zip(parts, videos, strict=True)]

    def mp4(self, video_CTHW: Tensor) -> bytes:
        """A video as a file."""
        return mp4(enlarged(pixels(video_CTHW)).numpy(), self.spec.recipe.fps)

    def _shower(self, tokens: TokenSpec) -> Shower:
        """What shows clips of this recipe."""
        if tokens.recipe == self.show.recipe:
            return self.show
        return Shower(self.tokenizer, tokens, Resources(gpus=1.0 if self.show.device.type == "cuda" else 0.0), self.show.sampler)


def story_page(model: VideoLM, request: str, parts: Sequence[tuple[str, Tensor]]) -> str:
    """A story as one self-contained page."""
    shown = "\n".join(f"<p>{html.escape(text)}</p>{_player(model.mp4(video_CTHW))}" for text, video_CTHW in parts)
    return PAGE.format(title=html.escape(request), parts=shown)


def _player(data: bytes) -> str:
    return f'<video src="data:video/mp4;base64,{b64encode(data).decode()}" autoplay muted loop playsinline></video>'


def png(video_CTHW: Tensor) -> bytes:
    """The first frame as a file."""
    file = io.BytesIO()
    Image.fromarray(enlarged(pixels(video_CTHW)).numpy()[0]).save(file, "PNG")
    return file.getvalue()


def look(video: str | Path, recipe: DecodeRecipe, pictures: DecodeRecipe | None = None) -> tuple[bool, Tensor]:
    """Whether a file is a picture, which has one frame, and its windows (B, 3, T, H, W) in [-1, 1]; BadVideo where it does not decode.

    The file is decoded twice: what a container declares of its duration may be wrong or missing. A picture is a window of one frame, which
    the tokenizer repeats; `pictures` is how large, where that differs.
    """
    length = measure(video)
    recipe = pictures if pictures is not None and length.frames == 1 else recipe
    frames, rate = (1, recipe.fps) if length.frames == 1 else (recipe.frames, recipe.fps)
    total = length.at(rate)
    starts = [start / rate for start in window_starts(total, frames)]
    if total < frames:
        rate = frames / length.seconds
    clips = list(decode_clips(video, starts=starts, fps=rate, frames=frames, height=recipe.height, width=recipe.width))
    window_BTHWC = torch.stack([torch.from_numpy(clip) for clip in clips])
    return length.frames == 1, window_BTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def answer(model: VideoLM, video: str, question: str | None, decoding: Decoding, seed: int) -> str:
    """What `kinetok ask` prints; ConfigError where the file is no video and no picture."""
    try:
        return model.ask(video, question or DESCRIBE, decoding=decoding, seed=seed)
    except BadVideo as error:
        raise ConfigError(f"{video} {error.message}") from error


def generate_video(model: VideoLM, prompt: str, out: Path, seed: int, variance_scale: float | None, media: Media | None) -> None:
    """Write what `kinetok generate` makes: of one frame a PNG, unless `out` is to be an mp4."""
    video_CTHW = model.generate([prompt], seeds=[seed], variance_scale=variance_scale, media=media)[0]
    out.write_bytes(png(video_CTHW) if video_CTHW.shape[1] == 1 and out.suffix != ".mp4" else model.mp4(video_CTHW))


def tell_story(
    model: VideoLM, request: str, out: Path, *, clips: int, seed: int, decoding: Decoding, variance_scale: float | None
) -> list[str]:
    """Write the page that `kinetok tell` makes; the texts."""
    parts = model.tell(request, clips=clips, seed=seed, decoding=decoding, variance_scale=variance_scale)
    out.write_text(story_page(model, request, parts), encoding="utf-8")
    return [text for text, _ in parts]


def _sampler(tokenizer: Tokenizer, steps: int | None, guidance: float | None, more: Mapping[str, object]) -> SamplerConfig | None:
    """The tokenizer's own way of sampling with what is given changed, None where nothing is; ConfigError where it cannot be."""
    given = {**more, **{name: value for name, value in (("steps", steps), ("guidance", guidance)) if value is not None}}
    if not given:
        return None
    if not isinstance(tokenizer, DivotTokenizer):
        raise ConfigError(f"{', '.join(given)}: a {tokenizer.config.kind!r} model decodes without sampling; leave it out")
    try:
        sampler = SamplerConfig.model_validate(tokenizer.config.sampler.model_dump() | given)
        timesteps(sampler.steps, sampler.spacing)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return sampler


def _open_language(where: str, store: Store) -> tuple[DivotLM, LanguageSpec]:
    if where.startswith(REGISTRY):
        from kinetok.infra.mlflow_store import registered_files

        with registered_files(store, where) as folder:
            return _read(Folder(str(folder)), where)
    for folder_at in (Folder(where), Folder(where) / MODEL):
        if folder_at.exists(CONFIG_FILE):
            return _read(folder_at, where)
    return _read(store.find(where).folder / MODEL, where)


def _read(folder: Folder, where: str) -> tuple[DivotLM, LanguageSpec]:
    if not folder.exists(LANGUAGE_FILE):
        raise StoreError(
            f"{where} holds no {LANGUAGE_FILE}, so it is no language model of a `language` or `language_model` stage; `kinetok "
            "convert-language --tokenizer` writes one for released weights"
        )
    with on_disk(folder) as local:
        return DivotLM.from_pretrained(local), LanguageSpec.model_validate_json(folder.read_bytes(LANGUAGE_FILE))
