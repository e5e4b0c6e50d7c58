"""What Divot (arXiv 2412.04432) claims, measured at small scale on plain drawn scenes: `python bench/claims/divot.py --minutes 60`.

Every training run is a unit that is kept in the work folder: a second call continues where the first ran out of time, and one with
nothing left to train only writes the rows. `--steps` are those of the joint stage, to which all others are in proportion; they belong to
the units, so another number needs another folder. Rows: docs/results.md and docs/results/divot.json, from all seeds the work folder holds.
What caches save is measured by `bench/caches.py`, once for a work folder, with all cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from divot_evidence import Evidence
from rows import Row, kept, write
from study import ORDER, Budget, Material, Study
from unit import OutOfTime, aside

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "results" / "divot.json"
SAVED = 3.0
COSTS = "costs.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure Divot's claims; writes docs/results.md and docs/results/divot.json.")
    parser.add_argument("--minutes", type=float, required=True, help="time budget of this call; 0 only writes the rows")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of the joint stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "claims_divot", help="where units are kept")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    deadline = time.monotonic() + options.minutes * 60
    material, budget = Material(options.work), Budget.of(options.steps)
    try:
        for seed in options.seeds:
            for name in options.only:
                Study(material, seed, budget, deadline).train(name)
        measure_costs(options.work / COSTS)
    except OutOfTime as stopped:
        print(f"out of time in {stopped}: call again to continue")
    report(material, budget, options.steps)


def measure_costs(file: Path) -> None:
    """Run the bench of caches, once."""
    if not file.exists():
        said = subprocess.run([sys.executable, ROOT / "bench" / "caches.py"], check=True, capture_output=True, text=True).stdout
        with aside(file) as part:
            part.write_text(json.dumps([json.loads(line) for line in said.splitlines() if line.startswith("{")], indent=1))


def report(material: Material, budget: Budget, steps: int) -> None:
    """Rows from every seed in the work folder, and the stored others."""
    studies = [Study(material, seed, budget, deadline=0.0) for seed in material.seeds()]
    seeds = " ".join(str(study.seed) for study in studies)
    rows = [
        *Evidence(studies, f"python bench/claims/divot.py --steps {steps} --seeds {seeds} --minutes 120").all(),
        *costs(material.work / COSTS),
    ]
    rows += kept(FIGURES, rows)
    write(rows, ROOT / "docs" / "results.md", FIGURES)
    print(f"{len(rows)} rows")


def costs(file: Path) -> Iterator[Row]:
    """What pre-tokenizing saves, measured at small size and on paper at the published one."""
    for line in json.loads(file.read_text()) if file.exists() else []:
        paper = line["unit"] == "TFLOP"
        values = (
            {"encoding in the loop": line["value"], "from caches": line["floor"]}
            if paper
            else {"from caches": line["value"], "encoding in the loop": line["floor"]}
        )
        name, ratio = line["name"].split(" (")[0], round(line["value"] / line["floor"], 2)
        shown: dict[str, float | list[float]] = {f"{what}, {line['unit']}": float(f"{value:.3g}") for what, value in values.items()}
        yield Row(
            f"pre-tokenizing pays: {name}",
            shown | {"times": ratio},
            f">= {SAVED:g} times",
            ratio >= SAVED,
            "python bench/caches.py",
            [0],
            0.0,
        )


if __name__ == "__main__":
    main()
