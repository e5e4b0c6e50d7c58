"""The model card: `README.md` beside a saved model's weights, as the Hugging Face hub shows it.

Made of the model alone (its config, the docstrings of the config's fields, its digests and those of the models below it) and of the
objective where the saver knows it, so that equal models have equal cards, byte for byte. How it was trained (`training`) and to what
end (`figures`) is appended by whoever knows. The parts that a card of any model has are public. Not covered: cards of generators and
language models (`kinetok.llm.card`).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

if TYPE_CHECKING:
    from kinetok.tokenizers.base import Tokenizer
    from kinetok.tokenizers.causal.autoencoder import CausalConfig
    from kinetok.tokenizers.causal.grown import GrownConfig
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

CARD_FILE = "README.md"
_VALIDATION = "val/"

_USE = """## Use

```python
import kinetok

model = kinetok.load("FOLDER")   # this folder
tokens = model.encode(video)     # video: (B, 3, T, H, W) in [-1, 1], any T
video = model.decode(tokens)     # T frames again
```

Meant for research: compressing video to tokens that a generator is trained on, and turning generated tokens into video. A decoded video
is an approximation, and shows what the training clips showed: do not take it for evidence of what was filmed.
"""

_CHOICES = """The published description leaves widths, depths, loss weights and several details of the wiring open. Below is what this
model took: every field of its configuration, with what it decides.
"""

_OPEN = """## What the description leaves open

The published description of ProMAG does not say these, or can be read in more than one way. Beside each is what this model does, and the
field of its configuration that decides it, where one does.
"""

_IMAGE_PATH = {
    "none": "no image model",
    "inflate": "an image model's kernels stand at the latest tap of the video kernels, and all weights are trained from there",
    "frozen2d": "an image model's kernels stand at the latest tap, and its frozen encoder stays: it computes the first frame's features",
}
_START = {
    "transform": "a cosine transform of each cell, which the description does not have",
    "random": "torch's default initialisation of every convolution",
}
_NORM = {
    "rms": "division by the root mean square of each group in each frame",
    "std": "division by the deviation of each group in each frame, taken about its mean, while the mean stays in",
    "group": "GroupNorm of each frame, which subtracts the mean: for comparison",
}
_ADAGN = {
    False: "left out, so that a decoder frozen under a grown rung needs nothing of the base's own rate",
    True: "in front of each level, by deviations and means over each frame of what the latent head gives the decoder, as a grown rung "
    "gives a frozen one too; Open-MAGVIT2's are the latent's own, over the clip",
}
_MIX = {
    "add": "a sum",
    "concat": "a trained projection of both back to the trunk's width, which starts as the sum",
    "dual": "kept apart, each with a latent head of its own",
}
_ADA = {"scale": "a scale", "scale_shift": "a scale and a shift", "none": "nothing: an ablation"}
_DECODER = {
    "none": "the decoder stays frozen as a whole; there is no joint training",
    "last": "a copy of the decoder's finest level, with what makes pixels, is trained along; there is no joint training of the encoder",
    "all": "a copy of the whole decoder is trained along; there is no joint training of the encoder",
}
_POSTERIOR = {
    "sample": "a sample, whose noise is drawn by the clip's own seed; encoding and evaluation take the mean",
    "mode": "its mean, as in encoding and evaluation",
}
_COND = {"pooled_per_frame": "the key features pooled over each frame", "spatial": "the key features at each position"}

_DIVOT = """## How it decodes

Tokens are read by a frozen vision transformer and an encoder after it ({vit}). Decoding is diffusion: it draws noise from a seed, and
shows what the tokens say, not the very pixels that were encoded. Another seed gives another video. The method is Divot's (arXiv
2412.04432); the code was written from its description, and its authors publish their own weights for academic use.
"""

_ADAPTED = """## What it is

diffusers' `{name}`, trained by others and unchanged, in diffusers' own format: the folder opens in diffusers too. {licence}
"""

LOSS = "## Loss\n"
OTHERS = "Weights that others trained are used under the licence they were published with.\n"

NOTICE = """## Before commercial use

{what} follows ProMAG (arXiv 2501.05442). The published method may be covered by a patent of its authors' employer; commercial users
should check. The code was written from the public description alone: no code or weights of the authors are in it.
"""


def model_card(model: "Tokenizer", objective: BaseModel | None = None) -> str:
    """The card of `model`, with the loss it was trained by where `objective` is given."""
    rungs, spec = lineage(model), model.spec()
    ours = [_is_promag(rung) for rung in rungs]
    divot = _divot(model)
    parts = [
        f"---\nlibrary_name: kinetok\ntags:\n- video\n- tokenizer\n- {spec.tokenizer}\n---\n",
        _grid_title(model) if divot is None else _set_title(divot),
        table(("", ""), [*(_grid(model) if divot is None else _set(divot)), *_parameters(rungs)]),
        *_adapted(model),
        _USE,
        *([] if divot is None else [_DIVOT.format(vit=divot.config.vit.title)]),
        "## Lineage\n\nThis model, then each frozen model below it. Equal digests are equal weights.\n",
        table(("model", "compression", "weights (sha256)"), (_place(rung) for rung in rungs)),
        *([OTHERS] if any(map(_is_foreign, rungs)) else []),
        "## Configuration\n",
        *([_CHOICES] if any(ours) else []),
        *(f"### `{rung.config.kind}`{_rate(rung)}\n\n{fields(rung.config)}" for rung in rungs),
    ]
    if objective is not None:
        parts += [LOSS, fields(objective)]
    if any(ours):
        parts += [_OPEN, table(("open", "this model", "field"), _choices(rungs, objective))]
        parts.append(NOTICE.format(what="This model" if ours[0] else "The autoencoder below this model"))
    return "\n".join(parts)


def training(config: BaseModel, data: Iterable[tuple[str, str]]) -> str:
    """A section that says what the weights were fitted to, rows of (what, which), and the numbers of the fit, as `config` has them."""
    told = table(("learned from", ""), data)
    return f"\n## How it was trained\n\n{told}\nBy AdamW, with these numbers; `optimizers` has a player for each loss.\n\n{fields(config)}"


def figures(metrics: Mapping[str, float]) -> str:
    """A section with the validation figures among `metrics`; empty where there are none. Speeds depend on the machine and stay out."""
    rows = [(name.removeprefix(_VALIDATION), f"{metrics[name]:.6g}") for name in sorted(metrics) if name.startswith(_VALIDATION)]
    if not rows:
        return ""
    return "\n## Figures\n\nOn the validation split of the training clips, after the last step.\n\n" + table(("figure", "value"), rows)


def fields(config: BaseModel) -> str:
    """A table of every field of `config` with its value and its docstring."""
    return table(("field", "value", "meaning"), _rows(config, ""))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def lineage(model: "Tokenizer") -> "list[Tokenizer]":
    """`model` and what it stands on, the lowest last."""
    from kinetok.tokenizers.causal.rung import Rung  # imports this module
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

    rungs: list[Tokenizer] = [model]
    while isinstance(model, Rung | DivotTokenizer) and model.lower is not None:
        model = model.lower
        rungs.append(model)
    return rungs


def _is_promag(model: "Tokenizer") -> bool:
    from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
    from kinetok.tokenizers.causal.grown import GrownTokenizer

    return isinstance(model, CausalTokenizer | GrownTokenizer)


def _is_foreign(model: "Tokenizer") -> bool:
    """Whether weights that others trained are in it."""
    divot = _divot(model)
    return not _is_promag(model) if divot is None else divot.config.vit.path is not None


def _adapted(model: "Tokenizer") -> Iterator[str]:
    """What an adapter holds, and under which licence as far as its settings say."""
    from kinetok.tokenizers.pretrained.base import Pretrained

    if isinstance(model, Pretrained):
        licence = (model.config.model_extra or {}).get("license")
        told = f"Its settings name the licence `{licence}`." if licence else "Its settings name no licence: see where it was published."
        yield _ADAPTED.format(name=model.class_name, licence=told)


def _divot(model: "Tokenizer") -> "DivotTokenizer | None":
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

    return model if isinstance(model, DivotTokenizer) else None


def _grid_title(model: "Tokenizer") -> str:
    spec = model.spec()
    return (
        f"# {spec.temporal}x{spec.spatial}x{spec.spatial} video tokenizer, {spec.channels} channels\n\nA `{spec.tokenizer}` tokenizer of "
        f"kinetok: one token of {spec.channels} numbers stands for {spec.temporal} frames of {spec.spatial} x {spec.spatial} pixels.\n"
    )


def _set_title(model: "DivotTokenizer") -> str:
    config = model.config
    return (
        f"# Video tokenizer: {config.encoder.tokens} tokens a window\n\nA `{config.kind}` tokenizer of kinetok: "
        f"{config.encoder.tokens} tokens of {config.encoder.token_width} numbers stand for a window of {config.frames} frames of "
        f"{config.edge} x {config.edge} pixels, all of them together.\n"
    )


def _grid(model: "Tokenizer") -> Iterator[tuple[str, str]]:
    spec = model.spec()
    yield "frames of one token", str(spec.temporal)
    yield "pixels of one token", f"{spec.spatial} x {spec.spatial}"
    yield "channels", str(spec.channels)
    yield "numbers of pixels for one of the latent", f"{3 * spec.temporal * spec.spatial**2 / spec.channels:.4g}"


def _set(model: "DivotTokenizer") -> Iterator[tuple[str, str]]:
    config, encoder = model.config, model.config.encoder
    yield "frames of a window", f"{config.frames}, {encoder.frames} of them seen by the encoder"
    yield "pixels of a frame", f"{config.edge} x {config.edge}"
    yield "tokens of a window", str(encoder.tokens)
    yield "numbers of a token", str(encoder.token_width)
    yield "numbers of pixels for one of the tokens", f"{3 * config.frames * config.edge**2 / (encoder.tokens * encoder.token_width):.4g}"
    yield "vision transformer, frozen", f"{config.vit.title}, sha256 `{model.vit.digest()}`"


def _parameters(rungs: "Sequence[Tokenizer]") -> Iterator[tuple[str, str]]:
    counts = [sum(parameter.numel() for parameter in rung.parameters()) for rung in rungs]
    yield "parameters of its own", f"{counts[0]:,}"
    if len(rungs) > 1:
        yield "parameters of frozen models below", f"{sum(counts[1:]):,}"


def _place(model: "Tokenizer") -> tuple[str, str, str]:
    spec = model.spec()
    size = f"{spec.temporal}x{spec.spatial}x{spec.spatial}"
    return f"`{spec.tokenizer}`", size if spec.layout == "grid" else f"windows of {size}", f"`{spec.weights}`"


def _rate(model: "Tokenizer") -> str:
    return f", {model.spec().temporal}x" if _divot(model) is None else ""


def _rows(config: BaseModel, path: str) -> Iterator[tuple[str, str, str]]:
    """Every field but `kind` with its value and docstring; sections are entered, also where they have names of the user's."""
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _rows(value, f"{path}{name}.")
        elif isinstance(value, dict) and value and all(isinstance(section, BaseModel) for section in value.values()):
            for key, section in value.items():
                yield from _rows(section, f"{path}{name}.{key}.")
        elif name != "kind":
            yield f"`{path}{name}`", f"`{json.dumps(to_jsonable_python(value))}`", " ".join((info.description or "").split())


def _choices(rungs: "Sequence[Tokenizer]", objective: BaseModel | None) -> Iterator[tuple[str, str, str]]:
    """What ProMAG's description does not say: (question, what was taken, field), of each of its rungs, and of the loss."""
    from kinetok.tokenizers.causal.autoencoder import CausalConfig
    from kinetok.tokenizers.causal.grown import GrownConfig

    for rung in rungs:
        if isinstance(rung.config, GrownConfig):
            yield from _of_growth(rung.config, _rate(rung).removeprefix(", "))
        elif isinstance(rung.config, CausalConfig):
            yield from _of_base(rung.config)
            break  # below it is its own image model
    drawn = getattr(objective, "posterior", None)
    told = _POSTERIOR[drawn] if drawn is not None else f"{_POSTERIOR['sample']}, unless the objective said `mode`"
    yield "the posterior while training", told, "`objective.posterior`"
    named = f'listed under "{LOSS.strip("# ").strip()}"' if drawn is not None else "as the objective of the training said"
    yield "the weight of the KL term, LPIPS, the GAN term", named, "`objective.kl`, `objective.perceptual`, `objective.adversarial`"


def _of_base(config: "CausalConfig") -> Iterator[tuple[str, str, str]]:
    yield (
        "widths and depths",
        "levels, widths and strides as in Open-MAGVIT2's video network (arXiv 2409.04410), but no blocks in the middle, no norm before "
        "a latent head or the pixels; convolutions between levels change the width; all have biases, and each block's last starts at zero",
        "`channels`, `mult`, `blocks`",
    )
    begun = f"; training starts at {_START[config.start]}" if config.image_path == "none" else ""
    yield "where training starts, and what an image model is for", _IMAGE_PATH[config.image_path] + begun, "`image_path`, `start`"
    yield "the norm without mean subtraction", _NORM[config.norm], "`norm`"
    yield "AdaGN in the decoder, which MagViT-v2 has", _ADAGN[config.adagn], "`adagn`"
    yield (
        "what stands before the first frame in a convolution",
        "the first frame, repeated; Open-MAGVIT2 has zeros there: a departure from its layout",
        "",
    )
    yield (
        "which frame is dropped after a temporal upsampling of the first",
        "the earlier of its two, so that the frame stands for the end of its step as all others do; Open-MAGVIT2 keeps the earlier one "
        "and drops the later: a departure from its layout",
        "",
    )


def _of_growth(config: "GrownConfig", rate: str) -> Iterator[tuple[str, str, str]]:
    mixed = _MIX[config.mix] if config.key else "the residual alone: an ablation"
    yield f"{rate}: how key features and residual are mixed", mixed, "`mix`, `key`"
    yield f"{rate}: what AdaNorm does to the normalised features", _ADA[config.ada], "`ada`"
    if config.ada != "none":
        yield f"{rate}: what AdaNorm sees", _COND[config.cond], "`cond`"
    yield f"{rate}: new residual blocks of each side", str(config.blocks), "`blocks`"
    yield f"{rate}: the norm without mean subtraction", _NORM[config.norm], "`norm`"
    if config.key:
        yield (
            f"{rate}: where training starts",
            "as the rung below on every second frame: its heads are copied, new blocks start as the identity",
            "",
        )
    yield f"{rate}: the decoder below, and a last joint training", _DECODER[config.unfreeze_decoder], "`unfreeze_decoder`"
