"""Peak memory of `encode` on N and on 8N clips: all processes of the run together, shared pages counted once (PSS), in a fresh process.

As a script: `memory.py CLIPS WORK` prints the peak in MB.
"""

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from clips import make_encoding, make_index, repeated
from line import Line

from kinetok.infra.launch import start_ray
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.encoding import encode_shards

CLIPS = 320
"""Enough to fill the pipeline: before that, what is measured is how far it is filled."""
INTERVAL_SECONDS = 0.2


class Peak(threading.Thread):
    """Samples the memory of this process and all below it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(INTERVAL_SECONDS):
            self.bytes = max(self.bytes, self.sample())

    def sample(self) -> int:
        here = psutil.Process()
        total = 0
        for process in [here, *here.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                total += process.memory_full_info().pss
        return total


def peak_megabytes(clips: int, work: Path) -> float:
    """Run one encode of `clips` clips and watch it."""
    start_ray(cpus=2)
    index = make_index(work)
    encoding = make_encoding(index, work)
    many = repeated(index, clips)
    watch = Peak()
    watch.start()
    with TemporaryDirectory(dir=work) as out:
        for _ in encode_shards(many, range(len(many.shards)), encoding, Folder(out), threading.Event()):
            pass
    watch.done.set()
    watch.join()
    return watch.bytes / 1e6


def lines(work: Path) -> list[Line]:
    def peak(clips: int) -> float:
        command = [sys.executable, __file__, str(clips), str(work)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    few, many = peak(CLIPS), peak(8 * CLIPS)
    return [Line(f"peak memory of encode, {8 * CLIPS} clips against {CLIPS}", many, "MB", few, "<= 1.10")]


if __name__ == "__main__":
    print(peak_megabytes(int(sys.argv[1]), Path(sys.argv[2])))
