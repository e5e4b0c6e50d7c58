"""The model card: `README.md` beside a saved model's weights, as the Hugging Face hub shows it.

Made of the model alone (its config, the docstrings of the config's fields, its digests and those of the models below it) and of the
objective where the saver knows it, so that equal models have equal cards, byte for byte. Figures of a training are appended by
whoever has them (`figures`). Not covered: cards of anything but tokenizers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel

if TYPE_CHECKING:
    from kinetok.tokenizers.base import Tokenizer

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

_OTHERS = "Weights that others trained are used under the licence they were published with.\n"

_NOTICE = """## Before commercial use

This model follows ProMAG (arXiv 2501.05442). The published method may be covered by a patent of its authors' employer; commercial users
should check. The code was written from the public description alone: no code or weights of the authors are in it.
"""


def model_card(model: "Tokenizer", objective: BaseModel | None = None) -> str:
    """The card of `model`, with the loss it was trained by where `objective` is given."""
    rungs, spec = lineage(model), model.spec()
    ours = [_is_promag(rung) for rung in rungs]
    size = f"{spec.temporal}x{spec.spatial}x{spec.spatial}"
    parts = [
        f"---\nlibrary_name: kinetok\ntags:\n- video\n- tokenizer\n- {spec.tokenizer}\n---\n",
        f"# {size} video tokenizer, {spec.channels} channels\n\nA `{spec.tokenizer}` tokenizer of kinetok: one token of {spec.channels} "
        f"numbers stands for {spec.temporal} frames of {spec.spatial} x {spec.spatial} pixels.\n",
        _table(("", ""), _numbers(rungs)),
        _USE,
        "## Lineage\n\nThis model, then each frozen model below it. Equal digests are equal weights.\n",
        _table(("model", "compression", "weights (sha256)"), (_place(rung) for rung in rungs)),
        *([] if all(ours) else [_OTHERS]),
        "## Configuration\n",
        *([_CHOICES] if any(ours) else []),
        *(f"### `{rung.config.kind}`, {rung.spec().temporal}x\n\n{_fields(rung.config)}" for rung in rungs),
    ]
    if objective is not None:
        parts += ["## Loss\n", _fields(objective)]
    if any(ours):
        parts.append(_NOTICE)
    return "\n".join(parts)


def figures(metrics: Mapping[str, float]) -> str:
    """A section with the validation figures among `metrics`; empty where there are none. Speeds depend on the machine and stay out."""
    rows = [(name.removeprefix(_VALIDATION), f"{metrics[name]:.6g}") for name in sorted(metrics) if name.startswith(_VALIDATION)]
    if not rows:
        return ""
    return "\n## Figures\n\nOn the validation split of the training clips, after the last step.\n\n" + _table(("figure", "value"), rows)


def lineage(model: "Tokenizer") -> "list[Tokenizer]":
    """`model` and what it stands on, the lowest last."""
    from kinetok.tokenizers.causal.rung import Rung  # imports this module

    rungs: list[Tokenizer] = [model]
    while isinstance(model, Rung) and model.lower is not None:
        model = model.lower
        rungs.append(model)
    return rungs


def _is_promag(model: "Tokenizer") -> bool:
    from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
    from kinetok.tokenizers.causal.grown import GrownTokenizer

    return isinstance(model, CausalTokenizer | GrownTokenizer)


def _numbers(rungs: "Sequence[Tokenizer]") -> Iterator[tuple[str, str]]:
    spec = rungs[0].spec()
    counts = [sum(parameter.numel() for parameter in rung.parameters()) for rung in rungs]
    yield "frames of one token", str(spec.temporal)
    yield "pixels of one token", f"{spec.spatial} x {spec.spatial}"
    yield "channels", str(spec.channels)
    yield "numbers of pixels for one of the latent", f"{3 * spec.temporal * spec.spatial**2 / spec.channels:.4g}"
    yield "parameters of its own", f"{counts[0]:,}"
    if len(rungs) > 1:
        yield "parameters of frozen models below", f"{sum(counts[1:]):,}"


def _place(model: "Tokenizer") -> tuple[str, str, str]:
    spec = model.spec()
    return f"`{spec.tokenizer}`", f"{spec.temporal}x{spec.spatial}x{spec.spatial}", f"`{spec.weights}`"


def _fields(config: BaseModel) -> str:
    return _table(("field", "value", "meaning"), _rows(config, ""))


def _rows(config: BaseModel, path: str) -> Iterator[tuple[str, str, str]]:
    """Every field but `kind` with its value and docstring; sections are entered."""
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _rows(value, f"{path}{name}.")
        elif name != "kind":
            shown = json.dumps(config.model_dump(mode="json", include={name})[name])
            yield f"`{path}{name}`", f"`{shown}`", " ".join((info.description or "").split())


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
