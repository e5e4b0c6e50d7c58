"""Which frames of a video Divot looks at: windows of 16 frames at 8 a second, and five of each for the tokenizer (arXiv 2412.04432, A.1).

Windows are counted in frames at their own rate; the decoder finds those in a source of any rate, by their times. The published code
counts, frame int(k * rate / 8), which is the same but at NTSC's rates: where a frame begins within a millisecond after its time, the
decoder takes that one, the published code the one before (frame 15 of 29.97 a second for half a second, and not 14). Not covered:
reading them.
"""

RATE = 8.0
"""Frames a second of a window, as published."""
FRAMES = 16
"""Frames of a window: what the de-tokenizer shows, two seconds."""
SPARSE = 5
"""Frames of a window that the tokenizer sees."""
CLIPS = 20
"""Windows of a long video that is to be understood."""


def sparse_indices(frames: int = FRAMES, count: int = SPARSE) -> list[int]:
    """Places in a window of `frames` that the tokenizer sees: equal steps that end with the last frame, so that the last may be shorter.

    0, 4, 8, 12, 15 of 16; 0, 4, 8, 12, 16 of 17; a single frame over and over.
    """
    step = -(-(frames - 1) // (count - 1)) if count > 1 else 1
    return [min(place * step, frames - 1) for place in range(count)]


def window_starts(total: int, frames: int = FRAMES, *, most: int = CLIPS) -> list[float]:
    """Where the windows of `frames` frames begin that are read of a video of `total` frames at the windows' rate, in such frames.

    A video of `most` windows or more is cut into `most` equal parts and gives the window at the beginning of each; a shorter one gives one
    whole window after the other, and what is left over is not read; one shorter than a window gives that one.
    """
    if total >= most * frames:
        return [place * total / most for place in range(most)]
    return [float(place * frames) for place in range(max(1, total // frames))]
