"""What needs no training: a standing picture, the untrained transform coders, and a flow loss that knows nothing of the latents.

Legend: B clips, C channels, T H W frames, rows, columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from ladder import KEPT, STANDING, Material, measure
from rows import Row, mean
from unit import remembered
from verdicts import CLIP_MEAN, FLOOR, KEPT_MEAN, Values, judged, number

from kinetok.llm.training import EVALUATION_TIMES
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.metrics import clip_psnr, mean_frame

CODERS = {"base": "4x", "direct8": "8x", "direct16": "16x"}


@dataclass(frozen=True)
class Baselines:
    """What rows have to beat, and the rows of its own."""

    references: Mapping[str, float]
    rows: list[Row]


def baselines(material: Material, command: str) -> Baselines:
    """Measured on the held-out windows, once for a work folder."""
    still = remembered(material.work / "standing.json", lambda: standing(material.val_pixels))
    coders = remembered(material.work / "coders.json", lambda: untrained(material.val_pixels))
    clip, kept = (round(number(still, name), 2) for name in ("clip", "kept"))
    references = {CLIP_MEAN: clip, KEPT_MEAN: kept, FLOOR: round(flow_floor(), 2)}
    shown: dict[str, Values] = {
        f"{CLIP_MEAN} (baseline)": {"whole clip": clip, "kept frames": kept, "windows": number(still, "windows")},
        "untrained transform coders (baseline)": coder_values(coders),
    }
    rows = [judged(Row(claim, values, "", None, command, [], 0.0), references) for claim, values in shown.items()]
    return Baselines(references, rows)


def standing(val_BCTHW: torch.Tensor) -> dict[str, object]:
    """PSNR of each clip's mean over time, and of its kept frames' mean on those, means over clips."""
    kept_BCTHW = val_BCTHW[:, :, ::KEPT]
    clip, kept = (float(clip_psnr(mean_frame(part), part).mean()) for part in (val_BCTHW, kept_BCTHW))
    return {"clip": clip, "kept": kept, "windows": len(val_BCTHW)}


def untrained(val_BCTHW: torch.Tensor) -> dict[str, object]:
    """Figures of the base and of the direct models where their training starts."""
    figures = {name: measure(CausalTokenizer(STANDING[name]), val_BCTHW) for name in CODERS}
    return {f"{name} {figure}": value for name, found in figures.items() for figure, value in found.items() if isinstance(value, float)}


def coder_values(coders: Mapping[str, object]) -> Values:
    """The row's values."""
    values: Values = {rate: mean([number(coders, f"{name} psnr")]) for name, rate in CODERS.items()}
    lost = [mean([number(coders, "base psnr") - number(coders, f"{name} psnr")]) for name in ("direct8", "direct16")]
    key = {"4x on every 4th frame": mean([number(coders, "base subsampled")]), "16x, same frames": mean([number(coders, "direct16 kept")])}
    return values | {"lost at 8x 16x": lost} | key


def flow_floor() -> float:
    """Loss of a model that only knows latents to be independent and of N(0, 1): the velocity's variance where x_t is given."""
    return sum(1 / ((1 - time) ** 2 + time**2) for time in EVALUATION_TIMES) / len(EVALUATION_TIMES)
