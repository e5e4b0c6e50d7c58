"""What the driver of a training adds to the card of its model: what it learned from, by which numbers, and its validation figures.

The card itself is written with the model (`kinetok.tokenizers.card`, `kinetok.llm.card`), by a worker that knows neither. Not covered:
speeds, which depend on the machine.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kinetok.infra.artifact import Artifact
from kinetok.infra.fit import FitConfig
from kinetok.infra.stage import StageContext
from kinetok.tokenizers.card import CARD_FILE, figures, training

if TYPE_CHECKING:
    from kinetok.tokenizers.base import DecodeRecipe

CARD = f"model/{CARD_FILE}"


def complete_card(ctx: StageContext, numbers: FitConfig, recipe: "DecodeRecipe", metrics: Mapping[str, float], about: str = "") -> None:
    """Append to the card in `ctx.out`: `about`, the inputs and the clips behind them, `numbers`, the validation figures of `metrics`."""
    clips = f"{recipe.frames} frames of {recipe.height} x {recipe.width} pixels at {recipe.fps:g} frames per second"
    told = training(numbers, [*_inputs(ctx.inputs), ("a clip", clips)])
    ctx.out.write_text(CARD, ctx.out.read_text(CARD) + about + told + figures(metrics))


def _inputs(inputs: Mapping[str, Artifact | tuple[Artifact, ...]]) -> Iterator[tuple[str, str]]:
    for field, found in inputs.items():
        for artifact in found if isinstance(found, tuple) else (found,):
            samples = f", {artifact.record.counts.written:,} samples" if artifact.record.counts.written else ""
            # By its key: the digest of a training holds the times of its log, and a resumed one's model would have another card.
            yield field, f"`{artifact.name}-{artifact.key}`{samples}"
