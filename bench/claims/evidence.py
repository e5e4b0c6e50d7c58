"""From trained rungs to rows: each function answers for one claim of docs/results.md, from whichever seeds are trained.

A row is left out where no seed has all that it compares; its seeds and minutes are those of what was read for it. Whether it holds is
`verdicts'` to say. Not covered: training, which is `ladder`'s.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ladder import GROWN, KEPT, KIND, Ladder
from latents import RUNGS
from long import seam_jump, tiling
from rows import Row, mean
from unit import FIGURES, OtherBudget, remembered
from verdicts import LOST, STEPS, Values, judged, number, numbers

Figures = dict[str, object]
Read = Sequence[tuple[Ladder, dict[str, Figures]]]
"""The ladders that a row rests on, and the figures that were read of each."""
STARTS = {"dct": "both started as transform coders", "torch": "both started at random"}


@dataclass(frozen=True)
class Evidence:
    """All ladders of one start, the seeds' in turn, what rows have to beat, and the command that is written beside the figures."""

    ladders: Sequence[Ladder]
    source: Path
    command: str
    references: Mapping[str, float]

    @property
    def start(self) -> str:
        return STARTS[self.ladders[0].start]

    def seeds(self, *names: str) -> Read:
        """The ladders that have trained all of these, and their figures."""
        return [
            (ladder, {name: ladder.train(name) for name in names}) for ladder in self.ladders if all(ladder.trained(name) for name in names)
        ]

    def row(self, claim: str, read: Read, values: Values) -> Row:
        """The row, judged, with what it rests on."""
        return judged(Row(claim, values, "", None, self.command, [ladder.seed for ladder, _ in read], minutes(read)), self.references)

    def all(self) -> Iterator[Row]:
        """Every row there are figures for; the last ones need the transform start only."""
        yield from self.key_observation()
        for name in ("8", "16"):
            yield from self.growing(name)
        for rate in LOST:
            yield from self.lost(rate)
        yield from self.mixing()
        yield from self.levers()
        yield from self.maxima()
        if self.ladders[0].start == "dct":
            yield from self.seams()
            yield from self.tiles()
            yield from self.tokens()

    def key_observation(self) -> Iterator[Row]:
        """The 4x rung on every 4th frame, against the direct 16x model, as far as it is trained, on the same frames of the whole clip."""
        if found := self.furthest("direct16", "base"):
            ours, theirs = average(found, "base", "subsampled"), average(found, "direct16", "kept")
            values: Values = {"4x on every 4th frame": ours, "direct 16x, same frames": theirs, "ahead by": round(ours - theirs, 2)}
            yield self.row(f"key observation ({self.start})", found, values | reached(found, "direct16"))

    def growing(self, rate: str) -> Iterator[Row]:
        """A grown rung against a direct model, with the base's steps counted for both, and with the new blocks' steps for both."""
        grown, direct = f"grown{rate}", f"direct{rate}"
        for accounting, read in (("all steps counted", finished), ("new blocks' steps only", new_blocks)):
            if found := self.beside(direct, read, grown):
                gains = [round(number(figures[grown], "psnr") - number(figures[direct], "psnr"), 2) for _, figures in found]
                values: Values = {"grown": average(found, grown, "psnr"), "direct": average(found, direct, "psnr"), "gain": mean(gains)}
                steps = number(found[0][1][direct], "steps")
                values |= {"by seed": gains, STEPS: [steps, steps]}
                yield self.row(f"growing beats direct extension, {rate}x, {accounting} ({self.start})", found, values)

    def beside(self, direct: str, read: Callable[[Ladder, str], Figures], *names: str) -> Read:
        """Like `seeds`, with what `read` finds of a direct model."""
        return [
            (ladder, trained | {direct: figures}) for ladder, trained in self.seeds(*names) for figures in [read(ladder, direct)] if figures
        ]

    def furthest(self, direct: str, *names: str) -> Read:
        """Like `seeds`, with a direct model after all steps or, where no seed has that, after as many as its rival's new blocks got."""
        return self.beside(direct, finished, *names) or self.beside(direct, new_blocks, *names)

    def lost(self, rate: str) -> Iterator[Row]:
        """What a grown rung is behind the base."""
        name = f"grown{rate[:-1]}"
        if found := self.seeds("base", name):
            base, grown = average(found, "base", "psnr"), average(found, name, "psnr")
            values: Values = {"4x": base, rate: grown, "lost": round(base - grown, 2)}
            yield self.row(f"little is lost, 4x to {rate} ({self.start})", found, values)

    def mixing(self) -> Iterator[Row]:
        """The default mixing against its ablations."""
        names = {
            "AdaNorm and sum": "grown8",
            "sum only (plain residual)": "residual8",
            "AdaNorm only": "modulated8",
            "no key path": "keyless8",
        }
        if found := self.seeds(*names.values()):
            values: Values = {shown: average(found, name, "psnr") for shown, name in names.items()}
            yield self.row(f"mixing matters, 8x ({self.start})", found, values)

    def levers(self) -> Iterator[Row]:
        """What holds a grown rung back: capacity, learning rate, or the frozen decoder below."""
        for name, lever in (
            ("slower8", "the base's learning rate"),
            ("deeper8", "2 blocks instead of 1"),
            ("unfrozen8", "the base's rate, decoder below unfrozen"),
        ):
            if found := self.seeds("grown8", name):
                plain, pulled = average(found, "grown8", "psnr"), average(found, name, "psnr")
                values: Values = {"grown": plain, lever: pulled, "gain": round(pulled - plain, 2)}
                yield self.row(f"lever, grown 8x: {lever} ({self.start})", found, values)

    def maxima(self) -> Iterator[Row]:
        """PSNR of each frame: at the kept frames (but the first, an image of its own), against their neighbours."""
        for name, found in (("grown16", self.seeds("grown16")), ("direct16", self.furthest("direct16"))):
            if found:
                values = peaks([mean(column) for column in zip(*(numbers(figures[name], "frames") for _, figures in found), strict=True)])
                values["whole clip"] = average(found, name, "psnr")
                values |= reached(found, name) if name == "direct16" else {}
                yield self.row(f"key-frame maxima, {name[:-2]} 16x ({self.start})", found, values)

    def seams(self) -> Iterator[Row]:
        """The error's jump at seams."""
        for name, rate in (("base", "4x"), ("grown8", "8x"), ("grown16", "16x")):
            if found := self.seeds(name):
                without, blended = ([self._seam_jump(ladder, name, overlap) for ladder, _ in found] for overlap in (0, KEPT))
                values: Values = {"jump at seams over inside, without overlap": mean(without), "with overlap 4": mean(blended)}
                yield self.row(f"seams, {rate}", found, values)

    def _seam_jump(self, ladder: Ladder, name: str, overlap: int) -> float:
        file = ladder.unit(name).folder / f"seams-{overlap}.json"
        return number(remembered(file, lambda: {"jump": seam_jump(ladder.rung(name), self.source, overlap)}), "jump")

    def tiles(self) -> Iterator[Row]:
        """Both ways of tiling against none."""
        if found := self.seeds("base")[:1]:
            ladder = found[0][0]
            measured = remembered(ladder.unit("base").folder / "tiling.json", lambda: tiling(ladder.rung("base"), self.source))
            values: Values = {
                name: float(f"{number(measured, name):.3g}") if "off" in name else round(number(measured, name), 2) for name in measured
            }
            yield self.row("tiling at 512x512", found, values)

    def tokens(self) -> Iterator[Row]:
        """The diffusion transformer on each rung's latents."""
        names = [f"dit-{rate}" for rate in RUNGS]
        if found := self.seeds(*names):
            values: Values = {
                shown: [average(found, name, key) for name in names]
                for shown, key in (
                    ("tokens at 4x 8x 16x", "tokens"),
                    ("s/step", "step_seconds"),
                    ("MB/step", "step_megabytes"),
                    ("flow loss", "flow_loss"),
                )
            }
            yield self.row("tokens, 68 frames of 64x64", found, values | {"steps": number(found[0][1][names[0]], "steps")})


def average(read: Read, name: str, key: str) -> float:
    """A figure of one unit, over the seeds."""
    return mean([number(figures[name], key) for _, figures in read])


def peaks(frames: list[float]) -> Values:
    """The values of a row about maxima."""
    kept = range(KEPT, len(frames), KEPT)
    neighbours = [frames[place + side] for place in kept for side in (-1, 1) if place + side < len(frames)]
    return {
        "by frame": frames,
        "kept over neighbours": round(mean([frames[place] for place in kept]) - mean(neighbours), 2),
        "maxima at": [float(place) for place in kept if frames[place] == max(frames[place - 1 : place + 2])],
    }


def finished(ladder: Ladder, name: str) -> Figures:
    """Figures after all steps, or none."""
    return ladder.train(name) if ladder.trained(name) else {}


def new_blocks(ladder: Ladder, direct: str) -> Figures:
    """Figures of a direct model after as many steps as its rival's new blocks got, or none."""
    marks = ladder.unit(direct).marks()
    (step,) = ladder.course(direct).measured_at
    if marks and str(step) not in marks:
        raise OtherBudget(f"{ladder.unit(direct).folder} was measured at {' '.join(marks)} steps, not at {step}")
    return {**marks[str(step)], "steps": step} if marks else {}


def reached(read: Read, direct: str) -> Values:
    """At which step the direct model is, of those that it is to get."""
    ladder, figures = read[0]
    return {STEPS: [number(figures[direct], "steps"), float(ladder.course(direct).steps)]}


def minutes(read: Read) -> float:
    """Of what was read, of all rungs below, and of the searches of learning rates."""
    seconds: dict[Path, float] = {}
    for ladder, figures in read:
        for name, found in figures.items():
            rungs = {name: found} | {lower: ladder.train(lower) for lower in below(name)}
            for rung, trained in rungs.items():
                seconds[ladder.unit(rung).folder] = number(trained, "seconds")
                for file in ladder.searched(KIND.get(rung, rung)).glob(f"*/{FIGURES}"):
                    seconds[file.parent] = number(json.loads(file.read_text()), "seconds")
    return round(sum(seconds.values()) / 60, 1)


def below(name: str) -> list[str]:
    """The rungs that one stands on."""
    lower = RUNGS.get(name.removeprefix("dit-")) or (GROWN[name][0] if name in GROWN else None)
    return [lower, *below(lower)] if lower else []
