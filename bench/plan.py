"""`plan` of a job whose source lists 10,000 shards: seconds and peak memory of a fresh process.

As a script: `plan.py FOLDER` prints both.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

from line import Line

SHARDS = 10_000


def measure(folder: str) -> tuple[float, float]:
    """Seconds and MB of planning ingest and clips over the tars in `folder`, imports included."""
    began = time.perf_counter()
    from kinetok.infra.artifact import Store
    from kinetok.infra.job import parse_job
    from kinetok.infra.plan import plan
    from kinetok.infra.storage import Folder
    from kinetok.pipelines.catalog import STAGES

    clips = {"kind": "clips", "videos": "videos", "fps": 8, "frames": 17, "height": 64, "width": 64}
    source = f"{folder}/{{000000..{SHARDS - 1:06d}}}.tar"
    job = parse_job({"name": "bench", "stages": {"videos": {"kind": "ingest", "source": source}, "clips": clips}}, STAGES)
    plan(job, Store(Folder(f"{folder}/store")))
    seconds = time.perf_counter() - began
    # Not ru_maxrss: that one counts the parent that forked this process.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return seconds, int(peak[1]) / 1e3


def lines(work: Path) -> list[Line]:
    folder = work / "many"
    folder.mkdir()
    for number in range(SHARDS):
        (folder / f"{number:06d}.tar").touch()
    said = subprocess.run([sys.executable, __file__, str(folder)], check=True, capture_output=True, text=True).stdout
    seconds, megabytes = map(float, said.split()[-2:])
    return [Line("plan of 10,000 shards", seconds, "s", None, "< 5"), Line("plan of 10,000 shards, peak", megabytes, "MB", None, "< 500")]


if __name__ == "__main__":
    print(*measure(sys.argv[1]))
