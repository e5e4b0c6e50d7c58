"""`make bench`: every speed that matters as a ratio against its floor, measured in the same run on the same machine.

Prints a table and writes results.json. `run.py decode loader` runs only those groups. $KINETOK_DATA points the data lines at real
videos; without it they run on drawn scenes. Figures mean something on an otherwise idle machine only.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import caches
import decode
import encode
import fit
import language
import loader
import memory
import plan
import s3
import tokenizer
import unet
from clips import make_encoding, make_index
from line import Line
from rich.console import Console
from rich.table import Table

from kinetok.infra.launch import start_ray

RESULTS = Path(__file__).with_name("results.json")


def data_lines(work: Path, wanted: set[str]) -> list[Line]:
    """The lines that share one cluster, one index and one model."""
    start_ray(cpus=2)
    index = make_index(work)
    encoding = make_encoding(index, work)
    found: list[Line] = []
    if "decode" in wanted:
        found += decode.lines(index, encoding)
    if wanted & {"encode", "loader"}:
        found += encode.lines(index, encoding, work)
    if "loader" in wanted:
        found += loader.lines(work)
    if "s3" in wanted:
        found += s3.lines(index, work)
    import ray

    ray.shutdown()
    return found


def show(lines: list[Line], seconds: float) -> Table:
    table = Table("line", "value", "floor", "ratio", "aim", "", title=f"bench, {seconds:.0f} s", title_justify="left")
    for line in lines:
        floor = f"{line.floor:.1f}" if line.floor is not None else "-"
        ratio = f"{line.ratio:.2f}" if line.ratio is not None else "-"
        met = "[green]met[/]" if line.met else "[red]missed[/]"
        table.add_row(line.name, f"{line.value:.1f} {line.unit}", floor, ratio, line.aim, met)
    return table


def main() -> None:
    alone: dict[str, Callable[[Path], list[Line]]] = {
        "caches": caches.lines,
        "fit": fit.lines,
        "language": language.lines,
        "memory": memory.lines,
        "plan": plan.lines,
        "tokenizer": tokenizer.lines,
        "unet": unet.lines,
    }
    wanted = set(sys.argv[1:]) or {"decode", "encode", "loader", "s3", *alone}
    began = time.perf_counter()
    with TemporaryDirectory(prefix="kinetok-bench-") as folder:
        lines = data_lines(Path(folder), wanted) if wanted & {"decode", "encode", "loader", "s3"} else []
        for name in sorted(wanted & alone.keys()):
            lines += alone[name](Path(folder))
    Console().print(show(lines, time.perf_counter() - began))
    RESULTS.write_text(json.dumps([{**asdict(line), "ratio": line.ratio} for line in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()
