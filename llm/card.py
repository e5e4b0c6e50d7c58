"""The model card of a generator and of a language model: `README.md` beside the weights, as the Hugging Face hub shows it.

Made of the model alone, and of the objective where the saver knows it, so that equal models have equal cards. Whose tokens a model makes,
which text it listens to and how it was trained is not in its weights: whoever knows appends it (`belongs`, and `training` and `figures`
of `kinetok.tokenizers.card`, which also makes the cards of tokenizers).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel

from kinetok.tokenizers.base import TokenSpec
from kinetok.tokenizers.card import LOSS, NOTICE, OTHERS, fields, table

if TYPE_CHECKING:
    from torch import nn

    from kinetok.llm.dit import DiTConfig, VideoDiT
    from kinetok.llm.divot.model import DivotLM
    from kinetok.llm.text import TextConfig

_HEAD = """---
library_name: kinetok
tags:
- video
- {tag}
---

# {title}

{what}
"""

_GENERATOR_USE = """## Use

A `generate` stage with `model` samples it, and its tokenizer decodes what it drew; its weights are those of `kinetok.llm.dit.VideoDiT`.

Meant for research. A generated video shows what the training clips and their captions showed, biases included: nothing in it was filmed.
"""

_GENERATOR_OPEN = """## What the description leaves open

ProMAG (arXiv 2501.05442) trains a latent diffusion transformer on its tokens and does not describe it. What was chosen here:

"""

_LANGUAGE_USE = """## Use

```
kinetok ask cat.mp4 "What moves?" --model FOLDER --tokenizer TOKENIZER
kinetok generate "a red circle moves to the left" --model FOLDER --tokenizer TOKENIZER --out circle.mp4
```

Meant for research. Answers may be wrong, and a generated video shows what the training clips showed: nothing in it was filmed.
"""

_DIVOT = """## Where it comes from

The method is Divot's (arXiv 2412.04432); the code was written from its description, and its authors publish their own weights for academic
use.
"""

PROMAG = "Where the tokens are those of a `causal` or a `grown` tokenizer, or decoded by one, that tokenizer"


def generator_card(model: "VideoDiT", objective: BaseModel | None = None) -> str:
    """The card of a diffusion transformer, with what it was trained by where `objective` is given."""
    config = model.config
    what = (
        f"A diffusion transformer of kinetok: it draws latents of {config.z} channels, {config.chunk} steps a chunk, to text embeddings "
        f"of {config.text_width} numbers. A video tokenizer decodes them.\n"
    )
    return "\n".join(
        [
            _HEAD.format(tag="text-to-video", title="Video generator", what=what),
            table(("", ""), [_parameters(model)]),
            _GENERATOR_USE,
            _GENERATOR_OPEN + table(("left open", "chosen", "field"), list(_of_generator(config))),
            *_numbers(config, objective),
            NOTICE.format(what=PROMAG),
        ]
    )


def language_card(model: "DivotLM", objective: BaseModel | None = None) -> str:
    """The card of a Divot-LLM, with what it was trained by where `objective` is given."""
    config, path = model.config, getattr(model.config.language, "path", None)
    what = (
        f"A `{config.kind}` model of kinetok: a language model that reads and writes video, {config.clip_tokens} tokens of "
        f"{config.token_width} numbers a clip.\n"
    )
    stands = "untrained: random weights over bytes" if path is None else f"`{path}`"
    return "\n".join(
        [
            _HEAD.format(tag="video-language", title="Video language model", what=what),
            table(("", ""), [_parameters(model), ("language model that it started from", stands)]),
            _LANGUAGE_USE,
            *([] if path is None else [OTHERS]),
            _DIVOT,
            *_numbers(config, objective),
            NOTICE.format(what=PROMAG),
        ]
    )


def belongs(tokens: TokenSpec, text: "tuple[TextConfig, str] | None" = None) -> str:
    """A section that names the tokenizer of a model's tokens and, with `text`, its text encoder and the digest of that one's weights."""
    place = f"`{tokens.tokenizer}`, {tokens.temporal}x{tokens.spatial}x{tokens.spatial}, {tokens.channels} channels"
    rows = [("tokenizer", place), ("its weights (sha256)", f"`{tokens.weights}`")]
    if text is not None:
        config, weights = text
        encoder = (
            f"`{config.path}` ({config.encoder})" if config.path else "untrained: it tells captions apart, it does not understand them"
        )
        rows += [("text encoder", f"{encoder}, {config.max_tokens} tokens"), ("its weights (sha256)", f"`{weights}`")]
    return "\n## What it belongs to\n\nIt is of no use with another one.\n\n" + table(("", ""), rows)


def _of_generator(config: "DiTConfig") -> Iterator[tuple[str, str, str]]:
    """What is open of the transformer, what stands for it, and where that is set."""
    yield "its size", f"{config.depth} blocks of {config.width} channels and {config.heads} heads", "`width`, `depth`, `heads`, `mlp_ratio`"
    yield "how latents become tokens", f"{config.patch[0]} steps x {config.patch[1]} x {config.patch[1]} cells a token", "`patch`"
    yield (
        "positions",
        f"rotary on three axes; a step's place in its chunk of {config.chunk}, and the chunk's number, are embedded",
        "`chunk`",
    )
    yield "how time and text enter", "AdaLN-zero whose projection all blocks share; cross-attention to the text", ""
    yield (
        "what it is trained by",
        "flow matching; its sampler is Euler's, with classifier-free guidance",
        "`steps` and `guidance` of a `generate` stage",
    )


def _parameters(model: "nn.Module") -> tuple[str, str]:
    """Adapters are not counted: they are saved as part of what they stand beside."""
    return "parameters", f"{sum(weight.numel() for name, weight in model.named_parameters() if '.lora_' not in name):,}"


def _numbers(config: BaseModel, objective: BaseModel | None) -> list[str]:
    return ["## Configuration\n", fields(config), *([] if objective is None else [LOSS, fields(objective)])]
