"""One video to clip windows: cut, scored and filtered, as `recipe.py` says.

Windows hold `frames` frames at `fps` and begin every `stride` frames; each video is decoded once, to its end or to the last window
asked for, so that a window in the index is known to decode. Scores come from those frames at the final size. Filters judge the
video (size, aspect, duration) before its windows, or each window (motion, brightness) by itself. Not covered: scene detection.
"""

from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from kinetok.pipelines.data.clip_index import Row
from kinetok.pipelines.data.decode import Pixels, VideoReader
from kinetok.pipelines.data.reasons import Reason
from kinetok.pipelines.data.recipe import CutRecipe

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass
class _Scores:
    """Per sampled frame: brightness, its spread, and the change since the frame before (0 for the first)."""

    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    motion: list[float] = field(default_factory=list)
    _last: tuple[Pixels, NDArray[np.float32]] | None = None

    def add(self, pixels: Pixels) -> None:
        if self._last is not None and self._last[0] is pixels:
            self.mean.append(self.mean[-1])
            self.std.append(self.std[-1])
            self.motion.append(0.0)
            return
        luma = pixels.reshape(-1, 3).astype(np.float32) @ _LUMA
        mean = float(luma.sum()) / luma.size
        self.mean.append(mean)
        self.std.append(max(float(luma @ luma) / luma.size - mean * mean, 0.0) ** 0.5)
        self.motion.append(float(np.abs(luma - self._last[1]).sum()) / luma.size if self._last is not None else 0.0)
        self._last = (pixels, luma)

    def of(self, begin: int, end: int) -> dict[str, float]:
        """Scores of the window of frames `begin` to `end`; motion leaves out the change into its first frame."""
        return {
            "motion": float(np.mean(self.motion[begin + 1 : end])) if end - begin > 1 else 0.0,
            "luma_mean": float(np.mean(self.mean[begin:end])),
            "luma_std": float(np.mean(self.std[begin:end])),
        }


def cut_video(data: bytes, video: str, recipe: CutRecipe) -> list[Row]:
    """Rows of the windows of one video, or one row where the whole video is filtered. Raises BadVideo."""
    with VideoReader(data) as reader:
        info = reader.info
        shape: Row = {"id": video, "source_fps": info.fps, "width": info.width, "height": info.height}
        verdict = recipe.filters.of_video(info)
        scores = _Scores() if verdict else _score(reader, recipe)
    verdict = verdict or _length_verdict(len(scores.mean), recipe)
    if verdict is not None:
        return [{**shape, **_filtered(verdict)}]
    rows: list[Row] = []
    for begin in _starts(len(scores.mean), recipe):
        start, end = begin / recipe.fps, (begin + recipe.frames) / recipe.fps
        found = scores.of(begin, begin + recipe.frames)
        verdict = recipe.filters.of_window(**found, still=recipe.frames == 1)
        row: Row = {**shape, "id": f"{video}/{round(start * 1000)}", "start": start, "end": end, **found}
        rows.append({**row, **(_filtered(verdict) if verdict else {"decision": "kept"})})
    return rows


def _score(reader: VideoReader, recipe: CutRecipe) -> _Scores:
    """Decode every frame that a window can need."""
    last = None
    if recipe.max_clips_per_video is not None:
        last = (recipe.max_clips_per_video - 1) * (recipe.stride or recipe.frames) + recipe.frames
    scores = _Scores()
    times = (k / recipe.fps for k in (count() if last is None else range(last)))
    for pixels in reader.frames_at(times, height=recipe.height, width=recipe.width):
        scores.add(pixels)
    return scores


def _length_verdict(frames: int, recipe: CutRecipe) -> tuple[Reason, str] | None:
    seconds, filters = frames / recipe.fps, recipe.filters
    if frames < recipe.frames:
        return Reason.TOO_SHORT, f"{frames} frames at {recipe.fps:g} fps, a window has {recipe.frames}"
    if seconds < filters.min_seconds:
        return Reason.TOO_SHORT, f"{seconds:.1f} s, at least {filters.min_seconds:g} s are wanted"
    if filters.max_seconds is not None and seconds > filters.max_seconds:
        return Reason.DURATION, f"{seconds:.1f} s, at most {filters.max_seconds:g} s are wanted"
    return None


def _starts(frames: int, recipe: CutRecipe) -> list[int]:
    return list(range(0, frames - recipe.frames + 1, recipe.stride or recipe.frames))[: recipe.max_clips_per_video]


def _filtered(verdict: tuple[Reason, str]) -> Row:
    return {"decision": "filtered", "reason": verdict[0].value, "message": verdict[1]}
