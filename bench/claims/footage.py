"""The clips that the claims are measured on: windows of real videos, decoded once into an array of bytes in the work folder.

A source folder has `clips/<videoid>.mp4`, `split.csv` (videoid, split) and `clips_info.csv` (videoid, seconds, fps). Each video is
read at its own rate over the whole number that brings it nearest to `RATE`, so that no frame is shown twice.

Legend: N windows, T H W C frames, rows, columns, channels.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kinetok.pipelines.data.decode import Pixels, decode_clips
from kinetok.pipelines.data.reasons import BadVideo

RATE = 12.0
FRAMES = 17
EDGE = 64
CROP = 32
"""Edge of the quadrants that are trained on; figures are of whole windows."""
PER_VIDEO = {"train": 4, "val": 2}
"""Windows of one video at most, so that a long one does not rule."""


def footage(source: Path, work: Path, split: str) -> Pixels:
    """All windows of a split, (N, 17, 64, 64, 3), from `work` where they were decoded before."""
    cache = work / f"{split}.npy"
    if not cache.exists():
        work.mkdir(parents=True, exist_ok=True)
        windows = np.stack([window for video in videos(source, split) for window in _windows(video, PER_VIDEO[split])])
        part = cache.with_suffix(".part.npy")
        np.save(part, windows)
        part.rename(cache)
    loaded: Pixels = np.load(cache)
    return loaded


def quadrants(windows_NTHWC: Pixels) -> Pixels:
    """The four quadrants of each window as samples of their own, (4N, 17, 32, 32, 3)."""
    N, T, H, W, C = windows_NTHWC.shape
    cut = windows_NTHWC.reshape(N, T, H // CROP, CROP, W // CROP, CROP, C)
    samples: Pixels = cut.transpose(0, 2, 4, 1, 3, 5, 6).reshape(-1, T, CROP, CROP, C)
    return samples


def videos(source: Path, split: str) -> list[tuple[Path, float, float]]:
    """(file, seconds, frames per second) of a split's videos, by id."""
    with (source / "split.csv").open() as file:
        wanted = {row["videoid"] for row in csv.DictReader(file) if row["split"] == split}
    with (source / "clips_info.csv").open() as file:
        rows = sorted((row for row in csv.DictReader(file) if row["videoid"] in wanted), key=lambda row: row["videoid"])
    return [(source / "clips" / f"{row['videoid']}.mp4", float(row["seconds"]), float(row["fps"])) for row in rows]


def long_windows(source: Path, split: str, frames: int, count: int, edge: int) -> NDArray[np.uint8]:
    """The first `count` videos that have `frames` frames, at their own rate, one window each, (N, frames, edge, edge, 3)."""
    found = []
    for path, seconds, fps in videos(source, split):
        if len(found) < count and seconds * fps >= frames:
            found += list(_decoded(path, [0.0], fps, frames, edge))
    return np.stack(found)


def _windows(video: tuple[Path, float, float], most: int) -> Iterator[Pixels]:
    path, seconds, own = video
    fps = own / max(1, round(own / RATE))
    room = int(seconds * fps / FRAMES)
    count = min(room, most)
    spread = [FRAMES / fps * (number * room // count) for number in range(count)]
    yield from _decoded(path, spread, fps, FRAMES, EDGE)


def _decoded(path: Path, starts: list[float], fps: float, frames: int, edge: int) -> Iterator[Pixels]:
    """Windows of one video; those past an end that comes earlier than declared are left out."""
    try:
        yield from decode_clips(path, starts=starts, fps=fps, frames=frames, height=edge, width=edge)
    except BadVideo as bad:
        print(f"{path.name}: {bad}")
