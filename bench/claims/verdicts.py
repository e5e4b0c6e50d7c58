"""When a row of ProMAG's table holds: a function of its claim and its values alone, for fresh figures and for stored rows alike.

A row carries what it has to beat (`Rule.beside`). A standing picture, the mean over time of the held-out clip itself, is what a model of
video must beat before it is worth comparing with another. Not covered: where values come from (`evidence`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rows import Row

Values = dict[str, float | list[float]]
CLIP_MEAN = "clip mean frame"
KEPT_MEAN = "mean of those frames"
FLOOR = "loss knowing N(0,1) alone"
STEPS = "direct at step, of"
GAIN = 1.5
APART = 0.25
"""dB that rows of one seed must differ by to tell two models apart: half of what the gains of two seeds differed by (0.19 and 0.68)."""
LOST = {"8x": 0.5, "16x": 1.3}
SEAM = 1.2
EXACT = 1e-4
COMPARABLE = 1.1
CLEARLY = 0.9
"""Times the floor: a loss above that has learned little of the latents beyond their mean and deviation."""
KEPT_PLACES = [4.0, 8.0, 12.0, 16.0]
"""Frames of a chunk that a 16x rung keeps, but the first, an image of its own."""


@dataclass(frozen=True)
class Rule:
    """How the claims begin that it is for, what they aim at, and whether a row's values reach it; none where there is nothing to reach."""

    claim: str
    aim: str
    holds: Callable[[Values], bool] | None
    beside: tuple[str, ...] = ()
    """Names of the references that stand in the row."""


def number(values: Mapping[str, object], name: str) -> float:
    """A value that is one number."""
    value = values[name]
    assert isinstance(value, int | float)
    return float(value)


def numbers(values: Mapping[str, object], name: str) -> list[float]:
    """A value that is a list of numbers."""
    value = values[name]
    assert isinstance(value, list)
    return value


def beat(values: Values, reference: str, *names: str) -> bool:
    """Whether all of these are above the reference."""
    return all(number(values, name) > number(values, reference) for name in names)


def complete(values: Values) -> bool:
    """Whether the direct model had all the steps that the row is about."""
    done, wanted = numbers(values, STEPS)
    return done >= wanted


def key_observation(values: Values) -> bool:
    sides = ("4x on every 4th frame", "direct 16x, same frames")
    return number(values, "ahead by") >= APART and beat(values, KEPT_MEAN, *sides) and complete(values)


def growing(values: Values) -> bool:
    return number(values, "gain") >= GAIN and beat(values, CLIP_MEAN, "grown", "direct") and complete(values)


def lost(rate: str) -> Callable[[Values], bool]:
    return lambda values: number(values, "lost") <= LOST[rate] and beat(values, CLIP_MEAN, rate)


def mixing(values: Values) -> bool:
    names = ("AdaNorm and sum", "sum only (plain residual)", "AdaNorm only", "no key path")
    default, residual, modulated, keyless = (number(values, name) for name in names)
    return default > residual > keyless and default > modulated > keyless and beat(values, CLIP_MEAN, names[0])


def lever(values: Values) -> bool:
    grown, pulled = list(values)[:2]
    return number(values, "gain") >= APART and beat(values, CLIP_MEAN, grown, pulled)


def maxima(values: Values) -> bool:
    return numbers(values, "maxima at") == KEPT_PLACES


def seams(values: Values) -> bool:
    return number(values, "with overlap 4") <= SEAM


def tiling(values: Values) -> bool:
    return number(values, "layer-wise off") < EXACT < number(values, "latent off")


def tokens(values: Values) -> bool:
    cheaper = all(first > second > third for first, second, third in (numbers(values, cost) for cost in ("s/step", "MB/step")))
    loss = numbers(values, "flow loss")
    return cheaper and max(loss[1:]) <= COMPARABLE * loss[0] and max(loss) <= CLEARLY * number(values, FLOOR)


ABOVE = f"above the {CLIP_MEAN}"
RULES = (
    Rule(f"{CLIP_MEAN} (baseline)", "to be beaten", None),
    Rule("untrained transform coders (baseline)", "for comparison", None, (CLIP_MEAN,)),
    Rule("key observation", f"4x {APART} ahead, both above the {KEPT_MEAN}, all steps", key_observation, (KEPT_MEAN,)),
    Rule("growing beats direct extension", f">= +{GAIN}, both {ABOVE}", growing, (CLIP_MEAN,)),
    *(Rule(f"little is lost, 4x to {rate}", f"<= {LOST[rate]}, {rate} {ABOVE}", lost(rate), (CLIP_MEAN,)) for rate in LOST),
    Rule("mixing matters", f"ordered, the default {ABOVE}", mixing, (CLIP_MEAN,)),
    Rule("lever, grown 8x", f">= +{APART}, both {ABOVE}", lever, (CLIP_MEAN,)),
    Rule("key-frame maxima, grown", "maxima at 4 8 12 16", maxima, (CLIP_MEAN,)),
    Rule("key-frame maxima, direct", "for comparison", None, (CLIP_MEAN,)),
    Rule("seams", f"<= {SEAM} with", seams),
    Rule("tiling", "layer-wise exact, latent not", tiling),
    Rule(
        "tokens",
        f"time and memory fall with tokens, loss within {COMPARABLE - 1:.0%} of 4x's and {1 - CLEARLY:.0%} below that of N(0,1)",
        tokens,
        (FLOOR,),
    ),
)


def judged(row: Row, references: Mapping[str, float]) -> Row:
    """The row beside its references, with the aim and the verdict of its claim's rule.

    A row that carries another value of a reference already is of other clips, and refused.
    """
    (rule,) = [rule for rule in RULES if row.claim.startswith(rule.claim)]
    values = dict(row.values)
    for name in rule.beside:
        if values.setdefault(name, references[name]) != references[name]:
            raise ValueError(f"{row.claim}: {name} is {values[name]} in the row, and {references[name]} on these clips")
    return replace(row, values=values, aim=rule.aim, holds=rule.holds(values) if rule.holds else None)
