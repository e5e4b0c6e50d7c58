"""From trained rungs to rows: each function answers for one claim of docs/results.md, from whichever seeds are trained.

A row is left out where no seed has all that it compares. Not covered: training, which is `ladder`'s.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ladder import KEPT, Ladder
from latents import RUNGS
from long import seam_jump, tiling
from rows import Row, mean

Figures = dict[str, object]
GAIN = 1.5
LOST = {"grown8": 0.5, "grown16": 1.3}
SEAM = 1.2
EXACT = 1e-4
COMPARABLE = 1.1
STARTS = {"dct": "both started as transform coders", "torch": "both started at random"}


@dataclass(frozen=True)
class Evidence:
    """All ladders of one start, the seeds' in turn, and the command that is written beside the figures."""

    ladders: Sequence[Ladder]
    source: Path
    command: str

    @property
    def start(self) -> str:
        return STARTS[self.ladders[0].start]

    def seeds(self, *names: str) -> list[tuple[Ladder, dict[str, Figures]]]:
        """The ladders that have trained all of these, and their figures."""
        return [
            (ladder, {name: ladder.train(name) for name in names}) for ladder in self.ladders if all(ladder.trained(name) for name in names)
        ]

    def row(self, claim: str, names: Sequence[str], values: dict[str, float | list[float]], aim: str, holds: bool) -> Row:
        """The row with what it rests on."""
        found = self.seeds(*names)
        seconds = sum(number(figures, "seconds") for _, trained in found for figures in trained.values())
        return Row(claim, values, aim, holds, self.command, [ladder.seed for ladder, _ in found], round(seconds / 60, 1))

    def all(self) -> Iterator[Row]:
        """Every row there are figures for; the last ones need the transform start only."""
        yield from self.key_observation()
        for name in ("8", "16"):
            yield from self.growing(name)
        for name in LOST:
            yield from self.lost(name)
        yield from self.mixing()
        yield from self.levers()
        yield from self.maxima()
        if self.ladders[0].start == "dct":
            yield from self.seams()
            yield from self.tiles()
            yield from self.tokens()

    def key_observation(self) -> Iterator[Row]:
        """The 4x rung on every 4th frame, against the direct 16x model, as far as it is trained, on the same frames of the whole clip."""
        found = [(ladder, latest(ladder, "direct16")) for ladder in self.ladders if latest(ladder, "direct16")]
        if found:
            ours = mean([number(ladder.train("base"), "subsampled") for ladder, _ in found])
            theirs = mean([number(figures, "kept") for _, figures in found])
            values: dict[str, float | list[float]] = {"4x on every 4th frame": ours, "direct 16x, same frames": theirs}
            values["ahead by"] = round(ours - theirs, 2)
            yield self.row(f"key observation ({self.start})", ("base",), values, "4x ahead", ours > theirs)

    def growing(self, rate: str) -> Iterator[Row]:
        """A grown rung against a direct model, with the base's steps counted for both, and with the new blocks' steps for both."""
        grown, direct = f"grown{rate}", f"direct{rate}"
        for accounting, read in (("all steps counted", finished), ("new blocks' steps only", new_blocks)):
            found = [ladder for ladder in self.ladders if ladder.trained(grown) and read(ladder, direct)]
            if not found:
                continue
            pairs = [(number(ladder.train(grown), "psnr"), number(read(ladder, direct), "psnr")) for ladder in found]
            gains = [round(ours - theirs, 2) for ours, theirs in pairs]
            values: dict[str, float | list[float]] = {
                "grown": mean([ours for ours, _ in pairs]),
                "direct": mean([theirs for _, theirs in pairs]),
            }
            values |= {"gain": mean(gains), "by seed": gains}
            claim = f"growing beats direct extension, {rate}x, {accounting} ({self.start})"
            rests_on = (grown, direct) if found[0].trained(direct) else (grown,)
            yield self.row(claim, rests_on, values, f">= +{GAIN}", mean(gains) >= GAIN)

    def lost(self, name: str) -> Iterator[Row]:
        """What a grown rung is behind the base."""
        if found := self.seeds("base", name):
            base, grown = (mean([number(trained[one], "psnr") for _, trained in found]) for one in ("base", name))
            values: dict[str, float | list[float]] = {"4x": base, f"{name[5:]}x": grown, "lost": round(base - grown, 2)}
            yield self.row(
                f"little is lost, 4x to {name[5:]}x ({self.start})", ("base", name), values, f"<= {LOST[name]}", base - grown <= LOST[name]
            )

    def mixing(self) -> Iterator[Row]:
        """The default mixing against its ablations."""
        names = ("grown8", "residual8", "modulated8", "keyless8")
        if found := self.seeds(*names):
            default, residual, modulated, keyless = (mean([number(trained[name], "psnr") for _, trained in found]) for name in names)
            values: dict[str, float | list[float]] = {
                "AdaNorm and sum": default,
                "sum only (plain residual)": residual,
                "AdaNorm only": modulated,
                "no key path": keyless,
            }
            yield self.row("mixing matters, 8x", names, values, "ordered", default > residual > keyless and default > modulated > keyless)

    def levers(self) -> Iterator[Row]:
        """What holds a grown rung back: capacity, learning rate, or the frozen decoder below."""
        for name, lever in (
            ("slower8", "the base's learning rate"),
            ("deeper8", "2 blocks instead of 1"),
            ("unfrozen8", "the base's rate, decoder below unfrozen"),
        ):
            if found := self.seeds("grown8", name):
                plain, pulled = (mean([number(trained[one], "psnr") for _, trained in found]) for one in ("grown8", name))
                values: dict[str, float | list[float]] = {"grown": plain, lever: pulled, "gain": round(pulled - plain, 2)}
                yield self.row(f"lever, grown 8x: {lever} ({self.start})", ("grown8", name), values, "a gain", pulled > plain)

    def maxima(self) -> Iterator[Row]:
        """PSNR of each frame: at the kept frames (but the first, an image of its own), against their neighbours."""
        for name in ("grown16", "direct16"):
            if found := [figures for ladder in self.ladders if (figures := latest(ladder, name))]:
                frames = [mean(column) for column in zip(*(numbers(figures, "frames") for figures in found), strict=True)]
                kept = range(KEPT, len(frames), KEPT)
                peaks = [place for place in kept if frames[place] == max(frames[place - 1 : place + 2])]
                neighbours = [frames[place + side] for place in kept for side in (-1, 1) if place + side < len(frames)]
                values: dict[str, float | list[float]] = {
                    "by frame": frames,
                    "kept over neighbours": round(mean([frames[place] for place in kept]) - mean(neighbours), 2),
                }
                values["maxima at"] = [float(place) for place in peaks]
                claim = f"key-frame maxima, {name[:-2]} 16x ({self.start})"
                aim = "maxima at 4 8 12 16" if name == "grown16" else "for comparison"
                yield self.row(claim, (name,) if self.ladders[0].trained(name) else ("base",), values, aim, len(peaks) == len(kept))

    def seams(self) -> Iterator[Row]:
        """The error's jump at seams."""
        for name, rate in (("base", "4x"), ("grown8", "8x"), ("grown16", "16x")):
            if found := self.seeds(name):
                without, blended = ([self._seam_jump(ladder, name, overlap) for ladder, _ in found] for overlap in (0, KEPT))
                values: dict[str, float | list[float]] = {
                    "jump at seams over inside, without overlap": mean(without),
                    "with overlap 4": mean(blended),
                }
                yield self.row(f"seams, {rate}", (name,), values, f"<= {SEAM} with", mean(blended) <= SEAM)

    def _seam_jump(self, ladder: Ladder, name: str, overlap: int) -> float:
        file = ladder.unit(name).folder / f"seams-{overlap}.json"
        return number(remembered(file, lambda: {"jump": seam_jump(ladder.rung(name), self.source, overlap)}), "jump")

    def tiles(self) -> Iterator[Row]:
        """Both ways of tiling against none."""
        if found := self.seeds("base"):
            ladder = found[0][0]
            measured = remembered(ladder.unit("base").folder / "tiling.json", lambda: tiling(ladder.rung("base"), self.source))
            values: dict[str, float | list[float]] = {
                name: float(f"{number(measured, name):.3g}") if "off" in name else round(number(measured, name), 2) for name in measured
            }
            yield self.row(
                "tiling at 512x512",
                ("base",),
                values,
                "layer-wise exact, latent not",
                number(measured, "layer-wise off") < EXACT < number(measured, "latent off"),
            )

    def tokens(self) -> Iterator[Row]:
        """The diffusion transformer on each rung's latents."""
        names = [f"dit-{rate}" for rate in RUNGS]
        found = self.seeds(*names)
        if not found:
            return

        def read(key: str) -> list[float]:
            return [mean([number(trained[name], key) for _, trained in found]) for name in names]

        values: dict[str, float | list[float]] = {
            "tokens at 4x 8x 16x": read("tokens"),
            "s/step": read("step_seconds"),
            "MB/step": read("step_megabytes"),
            "flow loss": read("flow_loss"),
        }
        seconds, loss = read("step_seconds"), read("flow_loss")
        holds = seconds[0] > seconds[1] > seconds[2] and max(loss[1:]) <= COMPARABLE * loss[0]
        yield self.row(
            "tokens, 68 frames of 64x64", names, values, f"cost falls with tokens, loss within {COMPARABLE - 1:.0%} of 4x's", holds
        )


def remembered(file: Path, measure: Callable[[], Figures]) -> Figures:
    """What was measured on a finished unit, measured once."""
    if not file.exists():
        file.write_text(json.dumps(measure()))
    found: Figures = json.loads(file.read_text())
    return found


def number(figures: Figures, name: str) -> float:
    """A figure that is a number."""
    value = figures[name]
    assert isinstance(value, int | float)
    return float(value)


def numbers(figures: Figures, name: str) -> list[float]:
    """A figure that is a list of numbers."""
    value = figures[name]
    assert isinstance(value, list)
    return value


def finished(ladder: Ladder, name: str) -> Figures:
    """Figures after all steps, or none."""
    return ladder.train(name) if ladder.trained(name) else {}


def new_blocks(ladder: Ladder, direct: str) -> Figures:
    """Figures of a direct model after as many steps as its rival's new blocks got, or none: its first mark."""
    return next(iter(ladder.unit(direct).marks().values()), {})


def latest(ladder: Ladder, name: str) -> Figures:
    """Figures after all steps, or after those that are done."""
    return finished(ladder, name) or new_blocks(ladder, name)
