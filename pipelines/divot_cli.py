"""The commands of `kinetok` that ask video language models, and that bring released ones along. They import as the others do: inside.

Not covered: what they do (`divot.py`, `convert.py`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kinetok.pipelines.divot import VideoLM
    from kinetok.pipelines.trained_for import Command

VIT = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

_file = click.Path(path_type=Path, exists=True, dir_okay=False)
_folder = click.Path(path_type=Path, exists=True, file_okay=False)
_language = click.option(
    "--model",
    help="A language model: a folder, an artifact of $KINETOK_STORE, or models:/name@alias; without it, the newest there that was trained "
    "for this.",
)
_tokenizer = click.option("--tokenizer", help="Its tokenizer; without it, the one in the store that knows most of an artifact's model.")
_seed = click.option("--seed", default=0, show_default=True)
_temperature = click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="0: the likeliest word.")
_top_p = click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True, help="Share of words to draw from."
)
_max_tokens = click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of one text.")
_steps = click.option("--steps", type=click.IntRange(min=1), help="Of sampling a video; without it, the tokenizer's own.")
_guidance = click.option("--guidance", type=click.FloatRange(min=1), help="How closely a video keeps to its tokens, 1 is none; the same.")
_sampler = click.option(
    "--sampler",
    multiple=True,
    metavar="KEY=VALUE",
    help="More of sampling a video: eta, rescale, spacing, stride; may be given several times.",
)
_dtype = click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), help="Of the language model's weights; without it, bf16 on a GPU and fp32 on a CPU."
)
_variance = click.option("--variance-scale", type=click.FloatRange(min=0), help="How freely tokens are drawn; without it, the model's own.")


@click.command()
@click.argument("tokenizer", type=_file)
@click.argument("detokenizer", type=_file)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--vit", default=VIT, show_default=True, help="Folder or hub id of the vision transformer, which the files do not hold.")
@click.option("--ignore", multiple=True, metavar="PREFIX", help="Leave aside tensors whose names begin so; may be given again.")
def convert(tokenizer: Path, detokenizer: Path, out: Path, vit: str, ignore: tuple[str, ...]) -> None:
    """Turn Divot's released files (Divot_tokenizer.bin, Divot_detokenizer_stage1.bin or stage2) into a model folder."""
    from kinetok.pipelines.convert import convert

    for line in convert(tokenizer, detokenizer, out, vit, ignore).lines():
        click.echo(line)


@click.command()
@click.argument("agent", type=_file)
@click.argument("language", type=_folder)
@click.argument("vocabulary", type=_folder)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--tokenizer", help="The tokenizer whose tokens it speaks, as `convert` wrote it; without it the folder is for jobs alone.")
@click.option("--instructed/--pretrained", default=True, show_default=True, help="Whether it was tuned on instructions.")
def convert_language(agent: Path, language: Path, vocabulary: Path, out: Path, tokenizer: str | None, instructed: bool) -> None:
    """Turn Divot-LLM's released files (agent/pytorch_model.bin, folders of the merged model and its vocabulary) into a model folder."""
    from kinetok.pipelines.convert import convert_language

    for line in convert_language(agent, language, vocabulary, out, tokenizer, instructed=instructed).lines():
        click.echo(line)


@click.command()
@click.argument("video", type=click.Path(exists=True, dir_okay=False))
@click.argument("question", required=False)
@_language
@_tokenizer
@_temperature
@_top_p
@_max_tokens
@_dtype
@_seed
def ask(
    video: str, question: str | None, model: str | None, tokenizer: str | None, seed: int, dtype: str | None, **decoding: float
) -> None:
    """Answer a question about a video or a picture, or describe it where there is none.

    A model that was not tuned on instructions knows no questions: it says a caption.
    """
    from kinetok.llm.divot.generation import Decoding
    from kinetok.pipelines.divot import answer

    opened = _video_lm("ask", model, tokenizer, dtype=dtype)
    if question is not None and not opened.spec.instructed:
        click.echo("the model was not tuned on instructions: this is its caption, and no answer to the question", err=True)
    click.echo(answer(opened, video, question, Decoding.model_validate(decoding), seed))


@click.command()
@click.argument("prompt")
@_language
@_tokenizer
@_steps
@_guidance
@_sampler
@_variance
@_dtype
@_seed
@click.option("--image", is_flag=True, help="A picture, of a model that learned some beside videos.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Default: video.mp4, or image.png.")
def generate(
    prompt: str,
    model: str | None,
    tokenizer: str | None,
    seed: int,
    image: bool,
    out: Path | None,
    variance_scale: float | None,
    **opening: Any,
) -> None:
    """Make a video of a prompt, or a picture."""
    from kinetok.pipelines.divot import generate_video

    opened = _video_lm("generate", model, tokenizer, **opening)
    out = out or Path("image.png" if image or opened.spec.media == "image" else "video.mp4")
    generate_video(opened, prompt, out, seed, variance_scale, "image" if image else None)
    click.echo(out)


@click.command()
@click.argument("request")
@_language
@_tokenizer
@_temperature
@_top_p
@_max_tokens
@_steps
@_guidance
@_sampler
@_variance
@_dtype
@_seed
@click.option("--clips", type=click.IntRange(min=1), default=3, show_default=True, help="Parts of the story, each a text and a clip.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="story.html", show_default=True)
def tell(request: str, model: str | None, tokenizer: str | None, out: Path, **options: Any) -> None:
    """Tell a story in texts and clips, as one page."""
    from kinetok.llm.divot.generation import Decoding
    from kinetok.pipelines.divot import tell_story

    decoding = Decoding.model_validate({name: options.pop(name) for name in Decoding.model_fields})
    opened = _video_lm("tell", model, tokenizer, **{name: options.pop(name) for name in ("steps", "guidance", "sampler", "dtype")})
    for text in tell_story(opened, request, out, decoding=decoding, **options):
        click.echo(text)
    click.echo(out)


def _video_lm(command: "Command", model: str | None, tokenizer: str | None, sampler: tuple[str, ...] = (), **opening: Any) -> "VideoLM":
    """The model with its tokenizer; says which ones where nobody named them."""
    from kinetok.infra.job import apply_override
    from kinetok.pipelines.divot import VideoLM
    from kinetok.pipelines.models import open_store
    from kinetok.pipelines.trained_for import trained_for

    if model is None:
        found = trained_for(command, open_store())
        model = f"{found.name}-{found.key}"
        click.echo(f"model: {model}", err=True)
    settings: dict[str, Any] = {}
    for setting in sampler:
        apply_override(settings, setting)
    opened = VideoLM.open(model, tokenizer, sampler=settings, **opening)
    if opened.chosen is not None:
        click.echo(f"tokenizer: {opened.chosen}", err=True)
    return opened


DIVOT = (convert, convert_language, ask, generate, tell)
"""In the order of a user's day."""
