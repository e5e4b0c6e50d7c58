"""From trained models to rows: each function answers for one claim of Divot's table in docs/results.md, from whichever seeds are trained.

A row is left out where no seed has all that it compares. Shares are of clips or answers, in percent; the share right is the mean over what
a caption tells, and what is told of the ground stands beside it. A share is ahead of another where chance would not put it there
(`Evidence.margin`). Not covered: training (`study`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Final

import plain
from rows import Row, mean
from study import SPLITS, WRITER, Study

AHEAD_DB: Final = 3.0
HEADS: Final = {"mixture": "gmm", "regression": "mse", "diffusion, eps": "eps", "diffusion, v": "v"}
LISTENING: Final = {"one Gaussian": WRITER, "mixture": "gmm", "mixture, 4 times the steps": "gmm_long"}
MECHANISMS: Final = {"bidirectional": WRITER, "causal": "causal", "autoregressive": "autoregressive"}
Values = dict[str, float | list[float]]


@dataclass(frozen=True)
class Evidence:
    """The seeds' models, and the command that is written beside the figures."""

    studies: Sequence[Study]
    command: str

    def all(self) -> Iterator[Row]:
        """Every row there are figures for."""
        yield from self.judge()
        yield from self.carried()
        yield from self.compared("the mixture is the right head", HEADS, "mixture first")
        yield from self.compared("components keep a mixture from listening", LISTENING, "one Gaussian first")
        yield from self.compared("queries beat autoregression", MECHANISMS, "in that order")
        yield from self.adapted()
        yield from self.understood()

    def row(self, claim: str, names: Sequence[str], values: Values, aim: str, holds: bool) -> Row:
        """The row with what it rests on."""
        found = self.seeds(names)
        seconds = sum(figure(study, name, "seconds") for study in found for name in names)
        return Row(claim, values, aim, holds, self.command, [study.seed for study in found], round(seconds / 60, 1))

    def seeds(self, names: Sequence[str]) -> list[Study]:
        """Those that have trained all of these."""
        return [study for study in self.studies if all(study.trained(name) for name in names)]

    def mean(self, names: Sequence[str], name: str, *path: str, scale: float = 1.0) -> float:
        """A figure of one unit, over the seeds that have all of them."""
        return mean([scale * figure(study, name, *path) for study in self.seeds(names)])

    def margin(self, names: Sequence[str]) -> float:
        """Points by which the shares of two equally good models differ in nineteen of twenty comparisons, at most: two standard errors."""
        judged = SPLITS["val"][0] * len(plain.FACTORS) * len(self.seeds(names))
        return round(100 * 2 * sqrt(2 * 0.25 / judged), 2)

    def judge(self) -> Iterator[Row]:
        """What bounds every share below: how often the judge is right about held-out renders."""
        names = ["judge"]
        if self.seeds(names):
            values: Values = {part: self.mean(names, "judge", "decoded", part, scale=100) for part in (*plain.FACTORS, "all")}
            yield self.row("the judge of clips sees what is drawn, %", names, values, "all >= 90", mean_of(values["all"]) >= 90)
        names = ["token_judge"]
        if self.seeds(names):
            values = {part: self.mean(names, "token_judge", "tokens", part, scale=100) for part in (*plain.FACTORS, "all")}
            yield self.row("the judge of tokens sees what is drawn, %", names, values, "all >= 90", mean_of(values["all"]) >= 90)

    def carried(self) -> Iterator[Row]:
        """What is shown from a clip's own tokens, another's, none, and by a model that never had tokens, where there is one."""
        for stage, name in (("T1", "joint"), ("T2", "refine")):
            names = [name, "unconditional"] if self.seeds([name, "unconditional"]) else [name]
            if not self.seeds(names):
                continue
            shown = {"own": (name, "own"), "another clip's": (name, "shuffled"), "none": (name, "none")}
            if len(names) > 1:
                shown["none ever"] = ("unconditional", "none")
            values: Values = {tokens: self.mean(names, *where, "psnr") for tokens, where in shown.items()}
            own, *others = [mean_of(value) for value in values.values()]
            values["ahead"] = round(own - max(others), 2)
            values["v-loss"] = [self.mean(names, *where, "v_loss") for where in shown.values()]
            values["% right"] = [self.mean(names, *where, "mean", scale=100) for where in shown.values()]
            values["% of grounds right"] = [self.mean(names, *where, "ground", scale=100) for where in shown.values()]
            yield self.row(
                f"tokens carry the video, {stage}, dB", names, values, f">= {AHEAD_DB:g} ahead", mean_of(values["ahead"]) >= AHEAD_DB
            )

    def compared(self, claim: str, variants: dict[str, str], aim: str) -> Iterator[Row]:
        """What models that differ in one thing write: share of clips, and of token sets, that show all that was asked, and distances."""
        present = {label: name for label, name in variants.items() if self.seeds([name])}
        if len(present) < 2 or next(iter(variants)) not in present:
            return
        names = list(present.values())
        complete = len(present) == len(variants)
        for what, path, apart in (("clips", (), "distance"), ("token sets", ("tokens",), "token_distance")):
            values: Values = {label: self.mean(names, name, *path, "mean", scale=100) for label, name in present.items()}
            order = [mean_of(value) for value in values.values()]
            values |= {f"grounds, {label}": self.mean(names, name, *path, "ground", scale=100) for label, name in present.items()}
            values |= {f"distance, {label}": self.mean(names, name, apart) for label, name in present.items()}
            values["certain to"] = margin = self.margin(names)
            pairs = [(order[0], max(order[1:]))] if aim.endswith("first") else list(pairwise(order))
            right = all(before > after + margin for before, after in pairs)
            yield self.row(f"{claim}, % of {what} right", names, values, aim, right and complete)

    def adapted(self) -> Iterator[Row]:
        """Clips written by the language model, shown by the de-tokenizer before and after it saw what the language model draws."""
        names = [WRITER, "adapt", "refined"]
        if self.seeds(names):
            shown = {"T2": (WRITER,), "T2 for as many steps more": ("refined", "written"), "T3": ("adapt", "written")}
            values: Values = {label: self.mean(names, unit, *path, "mean", scale=100) for label, (unit, *path) in shown.items()}
            order = [mean_of(value) for value in values.values()]
            values |= {f"grounds, {label}": self.mean(names, unit, *path, "ground", scale=100) for label, (unit, *path) in shown.items()}
            values |= {f"distance, {label}": self.mean(names, unit, *path, "distance") for label, (unit, *path) in shown.items()}
            values["certain to"] = margin = self.margin(names)
            yield self.row("adaptation helps, % of clips right", names, values, "T3 ahead", order[2] > max(order[:2]) + margin)

    def understood(self) -> Iterator[Row]:
        """One model on the same tokens: answers, against one that sees clips of other scenes, and clips it writes."""
        names = ["both", "blind"]
        if self.seeds(names):
            values: Values = {}
            for label, unit, how in (
                ("said", "both", "exact"),
                ("chosen", "both", "choice"),
                ("said without the clip", "blind", "exact"),
                ("chosen without the clip", "blind", "choice"),
                ("chance", "both", "chance"),
            ):
                values[label] = mean([self.mean(names, unit, factor, how, scale=100) for factor in plain.FACTORS])
            values |= {f"said, {factor}": self.mean(names, "both", factor, "exact", scale=100) for factor in plain.FACTORS}
            values["clips it writes"] = self.mean(names, "both", "generation", "mean", scale=100)
            values["grounds it writes"] = self.mean(names, "both", "generation", "ground", scale=100)
            rivals = max(mean_of(values["said without the clip"]), mean_of(values["chance"]))
            claim = "one tokenizer serves both, % of answers and clips right"
            yield self.row(claim, names, values, "answers twice as often right as without the clip", mean_of(values["said"]) >= 2 * rivals)


def figure(study: Study, name: str, *path: str) -> float:
    """A number among a unit's figures."""
    found: object = study.unit(name).read()
    for part in path:
        assert isinstance(found, dict)
        found = found[part]
    assert isinstance(found, int | float)
    return float(found)


def mean_of(value: float | list[float]) -> float:
    """A value that is one number."""
    assert not isinstance(value, list)
    return value
