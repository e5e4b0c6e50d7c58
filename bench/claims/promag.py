"""What ProMAG (arXiv 2501.05442) claims, measured on real clips at small scale: `python bench/claims/promag.py --minutes 60`.

Every training run is a unit that is kept in the work folder: a second call continues where the first ran out of time, and one with
nothing left to train only writes the rows. Seeds may be trained by several calls at once, each its own seeds; `--only` narrows a call
to some rungs. Steps are set by `--steps` (the base's; a grown stage gets a third of them) and belong to the units: another number
needs another folder, or another start, and is refused. Rows: docs/results.md and docs/results/promag.json, from all seeds that the
work folder holds; rows of the JSON file that it does not hold stay, each with its own command. `--stored` needs no unit: it measures
the baselines and judges the rows of the JSON file by the rules of today.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from baselines import baselines
from evidence import STARTS, Evidence
from ladder import Budget, Ladder, Material
from latents import RUNGS, generator
from rows import Row, kept, write
from unit import OtherBudget, OutOfTime
from verdicts import judged

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "results" / "promag.json"
DATA = ROOT.parent / "shared" / "data"
SCRIPT = "python bench/claims/promag.py"
ABLATIONS = ("keyless8", "residual8", "modulated8")
LEVERS = ("slower8", "unfrozen8", "deeper8")
COMPARED = ("base", "grown8", "direct8", "grown16", "direct16", *ABLATIONS, *LEVERS, *(f"dit-{rate}" for rate in RUNGS))
"""In the order of training: key rows first."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure ProMAG's claims; writes docs/results.md and docs/results/promag.json.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--minutes", type=float, help="time budget of this call; 0 only writes the rows")
    what.add_argument("--stored", action="store_true", help="train nothing: judge the stored rows anew, beside baselines measured today")
    parser.add_argument("--steps", type=int, default=2400, help="training steps of the base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="how base and direct models are initialised")
    parser.add_argument("--only", nargs="+", choices=COMPARED, default=COMPARED)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "claims", help="where units are kept")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("KINETOK_DATA", DATA),
        help="clips/, split.csv and clips_info.csv",
    )
    return parser.parse_args()


def train(ladder: Ladder, name: str) -> None:
    """One unit and all that it needs; diffusion transformers on the transform start only, which their row is of."""
    if name.startswith("dit-"):
        if ladder.start != "dct":
            print(f"{name}: trained with --starts dct alone, which its row is of")
            return
        generator(ladder, name.removeprefix("dit-"))
    else:
        ladder.train(name)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    material = Material(options.data, options.work)
    if options.stored:
        again(material)
        return
    deadline = time.monotonic() + options.minutes * 60
    try:
        for seed in options.seeds:
            for start in options.starts:
                for name in options.only:
                    train(Ladder(material, seed, start, Budget.of(options.steps), deadline), name)
    except OutOfTime as stopped:
        print(f"out of time in {stopped}: call again to continue")
    except OtherBudget as other:
        sys.exit(str(other))
    report(material)


def again(material: Material) -> None:
    """The stored rows, judged anew beside today's baselines."""
    found = baselines(material, f"{SCRIPT} --stored")
    put([*found.rows, *stored(found.rows, found.references)])


def stored(measured: Sequence[Row], references: Mapping[str, float]) -> list[Row]:
    """Rows of the JSON file whose claims are not among those measured now, judged anew."""
    return [judged(row, references) for row in kept(FIGURES, measured)]


def report(material: Material) -> None:
    """Rows from every seed and start in the work folder, each start with the number of steps it was trained for, and the stored others."""
    try:
        started = {start: ladders for start in STARTS if (ladders := material.ladders(start))}
        if not started:
            sys.exit(f"nothing is trained in {material.work}: the rows stay as they are; --stored judges them anew")
        found = baselines(material, f"{SCRIPT} --stored")
        evidence = [
            Evidence(ladders, material.source, command(material, start, ladders), found.references) for start, ladders in started.items()
        ]
        rows = [*found.rows, *(row for each in evidence for row in each.all())]
        rows += stored(rows, found.references)
    except OtherBudget as other:
        sys.exit(str(other))
    put(rows)


def command(material: Material, start: str, ladders: Sequence[Ladder]) -> str:
    """What trains the ladders of one start anew, in an empty work folder of that name."""
    work, data = (path.resolve() for path in (material.work, material.source))
    shown = work.relative_to(ROOT) if work.is_relative_to(ROOT) else work
    seeds = " ".join(str(ladder.seed) for ladder in ladders)
    elsewhere = "" if data == DATA.resolve() else f" --data {data}"
    return f"{SCRIPT} --steps {ladders[0].budget.base} --seeds {seeds} --starts {start} --minutes 120 --work {shown}{elsewhere}"


def put(rows: Sequence[Row]) -> None:
    write(rows, ROOT / "docs" / "results.md", FIGURES)
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
