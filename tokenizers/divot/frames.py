"""Which frames of a video Divot looks at: windows of 16 frames at 8 a second, and five of each for the tokenizer (arXiv 2412.04432, A.1).

All indices count frames of the source, at whatever rate it runs. Not covered: reading them.
"""

from dataclasses import dataclass

import numpy as np
import torch

RATE = 8.0
"""Frames a second of a window."""
FRAMES = 16
"""Frames of a window: what the de-tokenizer shows, two seconds."""
SPARSE = 5
"""Frames of a window that the tokenizer sees."""
CLIPS = 20
"""Windows of a long video that is to be understood."""


@dataclass(frozen=True)
class Windows:
    """Windows of one video for comprehension."""

    indices: tuple[tuple[int, ...], ...]
    """Frames of each window."""
    mask: tuple[bool, ...]
    """True for each window, then False up to the number of windows asked for: those are to be filled with zeros."""


def sparse_indices(frames: int = FRAMES, count: int = SPARSE) -> list[int]:
    """Places in a window of `frames` that the tokenizer sees: equal steps that end with the last frame, so that the last may be shorter.

    0, 4, 8, 12, 15 of 16; 0, 4, 8, 12, 16 of 17; a single frame over and over.
    """
    step = -(-(frames - 1) // (count - 1)) if count > 1 else 1
    return [min(place * step, frames - 1) for place in range(count)]


def dense_indices(total: int, fps: float, *, start: int = 0) -> list[int]:
    """The 16 frames of the window that starts at `start`, out of a video of `total` frames at `fps`.

    A video that ends too early is sampled more densely, so that 16 fit. Raises ValueError where `start` is not in it.
    """
    if not 0 <= start < total:
        raise ValueError(f"start: frame {start} is not one of the {total} frames of the video")
    return _window(start, total, fps)


def comprehension_windows(
    total: int, fps: float, *, clips: int = CLIPS, exact: bool = False, generator: torch.Generator | None = None
) -> Windows:
    """Up to `clips` windows over a whole video of `total` frames at `fps`.

    A long video is cut into `clips` equal segments and gives one window of each, from its beginning or, with a `generator`, from
    anywhere in it (training). A short one gives one whole window after the other, at least one, and a mask that says how many; with
    `exact`, as for question answering, it is cut into segments all the same, which are sampled more densely.
    """
    window = FRAMES * fps / RATE
    if exact or total >= clips * window:
        segment = total / clips
        room = max(segment - window, 0.0)
        offsets = torch.rand(clips, generator=generator).mul(room).tolist() if generator is not None else [0.0] * clips
        indices = [_window(place * segment + offset, (place + 1) * segment, fps) for place, offset in enumerate(offsets)]
    else:
        indices = [_window(place * window, total, fps) for place in range(max(1, int(total // window)))]
    return Windows(tuple(map(tuple, indices)), tuple(place < len(indices) for place in range(clips)))


def _window(start: float, end: float, fps: float) -> list[int]:
    """16 frames at 8 a second from `start`, closer together where `end` comes before the last."""
    span = min(FRAMES * fps / RATE, end - start)
    places: list[int] = np.linspace(start, start + span, FRAMES, endpoint=False).astype(int).tolist()
    return places
