"""What ProMAG (arXiv 2501.05442) claims, measured on real clips at small scale: `python bench/claims/promag.py --minutes 60`.

Every training run is a unit that is kept in the work folder: a second call continues where the first ran out of time, and one with
nothing left to train only writes the rows. Seeds may be trained by several calls at once, each its own seeds; `--only` narrows a call
to some rungs. Steps are set by `--steps` (the base's; a grown stage gets a third of them) and belong to the units: another number
needs another folder, or another start. Rows: docs/results.md and docs/results/promag.json, from all seeds that the work folder holds.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from evidence import STARTS, Evidence, number
from ladder import Budget, Ladder, Material
from latents import RUNGS, generator
from rows import write
from unit import OutOfTime

ROOT = Path(__file__).parents[2]
ABLATIONS = ("keyless8", "residual8", "modulated8")
LEVERS = ("slower8", "unfrozen8", "deeper8")
COMPARED = ("base", "grown8", "direct8", "grown16", "direct16", *ABLATIONS, *LEVERS, *(f"dit-{rate}" for rate in RUNGS))
"""In the order of training: key rows first."""
STAGE_SHARE = 3
"""A grown stage gets this fraction of the base's steps: most of the budget is the base's, which every grown rung stands on."""
GENERATOR_SHARE = 12


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure ProMAG's claims; writes docs/results.md and docs/results/promag.json.")
    parser.add_argument("--minutes", type=float, required=True, help="time budget of this call; 0 only writes the rows")
    parser.add_argument("--steps", type=int, default=2400, help="training steps of the base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="how base and direct models are initialised")
    parser.add_argument("--only", nargs="+", choices=COMPARED, default=COMPARED)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "claims", help="where units are kept")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("KINETOK_DATA", ROOT.parent / "shared" / "data"),
        help="clips/, split.csv and clips_info.csv",
    )
    return parser.parse_args()


def train(ladder: Ladder, name: str) -> None:
    """One unit and all that it needs."""
    if name.startswith("dit-"):
        generator(ladder, name.removeprefix("dit-"), ladder.budget.base // GENERATOR_SHARE)
    else:
        ladder.train(name)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    deadline = time.monotonic() + options.minutes * 60
    material, budget = Material(options.data, options.work), Budget(options.steps, options.steps // STAGE_SHARE)
    try:
        for seed in options.seeds:
            for start in options.starts:
                for name in options.only:
                    train(Ladder(material, seed, start, budget, deadline), name)
    except OutOfTime as stopped:
        print(f"out of time in {stopped}: call again to continue")
    report(material)


def report(material: Material) -> None:
    """Rows from every seed and start in the work folder, each start with the number of steps that it was trained for."""
    rows = []
    for start in STARTS:
        ladders = [Ladder(material, seed, start, Budget(0, 0), deadline=0.0) for seed in material.seeds(start)]
        if ladders:
            steps = int(number(ladders[0].train("base"), "steps"))
            seeds = " ".join(str(ladder.seed) for ladder in ladders)
            command = f"python bench/claims/promag.py --steps {steps} --seeds {seeds} --starts {start} --minutes 120"
            rows += Evidence(ladders, material.source, command).all()
    write(rows, ROOT / "docs" / "results.md", ROOT / "docs" / "results" / "promag.json")
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
