"""`VideoLM`: a Divot-LLM with its tokenizer: videos in, text out; text in, videos out; stories of both. From Python, and for the commands.

```python
model = VideoLM.open("tuned", "adapted")           # names of artifacts, folders, or models:/name@alias
model.ask("cat.mp4", "What does the cat do?")
video = model.generate(["a red disc falls"], seeds=[0])       # (1, 3, T, H, W) in [-1, 1]
parts = model.tell("A story of two discs", clips=3, seed=0)   # pairs of a text and its video
```

A video longer than the windows that are read is seen in equal parts, a window of each. Imports no Ray. Not covered: many prompts
(`stages/write.py`).

Legend: B videos, C T H W colours, frames, rows, columns, N tokens of a clip, D token width.
"""

import html
import os
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.errors import ConfigError, ContractError, StoreError
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.llm.divot.generation import Decoding, complete, make_clips, tell
from kinetok.llm.divot.model import DivotLM
from kinetok.llm.divot.sequences import ask, ask_clip
from kinetok.pipelines.data.decode import decode_clips, probe, read_video
from kinetok.pipelines.data.language_feed import LANGUAGE_FILE, LanguageSpec
from kinetok.pipelines.data.reasons import BadVideo
from kinetok.pipelines.data.token_shards import require_spec
from kinetok.pipelines.models import DEFAULT_STORE, MODEL, REGISTRY, STORE_VARIABLE, load, on_disk
from kinetok.pipelines.report.panel import enlarged, mp4, pixels
from kinetok.pipelines.tokens_shown import Shower
from kinetok.tokenizers.base import CONFIG_FILE, Tokenizer

if TYPE_CHECKING:
    from kinetok.infra.artifact import InputInfo

MOST_WINDOWS: Final = 20
"""Windows of a video that are read, as in the paper."""
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

    @classmethod
    def open(cls, model: str, tokenizer: str | None = None, *, store: str | None = None) -> "VideoLM":
        """The model at `model`: a folder, an artifact of `store` (default: $KINETOK_STORE, else `./work`), or `models:/name@alias`.

        `tokenizer` is what `kinetok.load` takes; None is that which made the tokens the model learned from, where the store tells. Raises
        StoreError where one of the two is not there, ContractError where they do not belong together.
        """
        place = Store(Folder(store or os.environ.get(STORE_VARIABLE, DEFAULT_STORE)))
        made, spec = _open_language(model, place)
        read = load(tokenizer or _own_tokenizer(model, place), store=place.root.url)
        try:
            require_spec(spec.tokens, read.spec())
        except ContractError as error:
            raise ContractError(f"{model} does not speak the tokens of this tokenizer: {error}") from error
        gpu = torch.cuda.is_available()
        show = Shower(read, spec.tokens, Resources(gpus=1.0 if gpu else 0.0))
        return cls(made.to(show.device), read, spec, show)

    def ask(self, video: str | Path, question: str, *, decoding: Decoding | None = None, seed: int = 0) -> str:
        """What the model answers to a question about a video file."""
        prompt = ask(self.model.vocabulary, self.read(video), question, media=self.spec.media)
        return complete(self.model, [prompt], [seed], decoding or Decoding())[0].strip()

    @torch.no_grad()
    def read(self, video: str | Path) -> Tensor:
        """Tokens of a video file's windows, (windows, N, D). BadVideo where it does not decode."""
        recipe = self.spec.recipe
        shape = {"height": recipe.height, "width": recipe.width}
        seconds, window = probe(video).seconds or 0.0, recipe.frames / recipe.fps
        if seconds < 2 * window:
            video_BCTHW = read_video(video, fps=recipe.fps, frames=None, **shape)[:, :, : recipe.frames]
        else:
            count = min(MOST_WINDOWS, int(seconds / window))
            starts = [number * seconds / count for number in range(count)]
            clips = list(decode_clips(video, starts=starts, fps=recipe.fps, frames=recipe.frames, **shape))
            video_BCTHW = torch.stack([torch.from_numpy(clip) for clip in clips]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        token_BND = self.tokenizer.encode(video_BCTHW.to(self.show.device)).values
        return torch.unflatten(token_BND.flatten(0, 1), 0, (-1, self.model.config.clip_tokens)).cpu()

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], variance_scale: float | None = None) -> Tensor:
        """A video for each prompt, (B, 3, T, H, W) in [-1, 1]."""
        asked = [ask_clip(self.model.vocabulary, text, instructed=self.spec.instructed, media=self.spec.media) for text in prompts]
        return self.show(list(make_clips(self.model, asked, seeds, media=self.spec.media, variance_scale=variance_scale)), seeds)

    def tell(self, request: str, *, clips: int, seed: int = 0, decoding: Decoding | None = None) -> list[tuple[str, Tensor]]:
        """A story of `clips` texts, each with its video (3, T, H, W)."""
        parts = tell(self.model, request, clips=clips, seed=seed, decoding=decoding or Decoding())
        videos = self.show([part.token_ND for part in parts], [seed + number for number in range(clips)])
        return [(part.text.strip(), video_CTHW) for part, video_CTHW in zip(parts, videos, strict=True)]

    def mp4(self, video_CTHW: Tensor) -> bytes:
        """A video as a file."""
        return mp4(enlarged(pixels(video_CTHW)).numpy(), self.spec.recipe.fps)


def story_page(model: VideoLM, request: str, parts: Sequence[tuple[str, Tensor]]) -> str:
    """A story as one self-contained page."""
    shown = "\n".join(f"<p>{html.escape(text)}</p>{_player(model.mp4(video_CTHW))}" for text, video_CTHW in parts)
    return PAGE.format(title=html.escape(request), parts=shown)


def _player(data: bytes) -> str:
    return f'<video src="data:video/mp4;base64,{b64encode(data).decode()}" autoplay muted loop playsinline></video>'


def ask_video(model: str, tokenizer: str | None, video: str, question: str, seed: int) -> str:
    """What `kinetok ask` prints; ConfigError where the file is no video."""
    try:
        return VideoLM.open(model, tokenizer).ask(video, question, seed=seed)
    except BadVideo as error:
        raise ConfigError(f"{video} {error.message}") from error


def generate_video(model: str, tokenizer: str | None, prompt: str, out: Path, seed: int) -> None:
    """Write what `kinetok generate` makes."""
    opened = VideoLM.open(model, tokenizer)
    out.write_bytes(opened.mp4(opened.generate([prompt], seeds=[seed])[0]))


def tell_story(model: str, tokenizer: str | None, request: str, out: Path, clips: int, seed: int) -> list[str]:
    """Write the page that `kinetok tell` makes; the texts."""
    opened = VideoLM.open(model, tokenizer)
    parts = opened.tell(request, clips=clips, seed=seed)
    out.write_text(story_page(opened, request, parts), encoding="utf-8")
    return [text for text, _ in parts]


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
        raise StoreError(f"{where} holds no {LANGUAGE_FILE}, so it is no language model of a `language` or `language_model` stage")
    with on_disk(folder) as local:
        return DivotLM.from_pretrained(local), LanguageSpec.model_validate_json(folder.read_bytes(LANGUAGE_FILE))


def _own_tokenizer(model: str, store: Store) -> str:
    """Where the tokenizer is that made the tokens an artifact's model learned from; StoreError where the store does not tell."""
    try:
        tokens = _made_of(store.find(model), "tokens", store)
        return _made_of(tokens, "model", store).folder.url
    except (StoreError, LookupError) as error:
        raise StoreError(f"--tokenizer: {model} does not say which tokenizer it speaks for; name it") from error


def _made_of(artifact: Artifact, field: str, store: Store) -> Artifact:
    """The artifact behind a field of another one; LookupError where it is gone."""
    info: InputInfo = artifact.record.inputs[field][0]
    found = store.get(info.kind, info.name, info.key)
    if found is None:
        raise LookupError(info.name)
    return found
