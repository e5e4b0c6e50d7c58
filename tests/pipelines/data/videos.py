"""Small videos made for tests: every frame shows its own number, so that a decoded picture says which frame it came from."""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

LEVELS = 16
"""Brightness steps; two cells (units and sixteens) show numbers up to 255."""


def numbered(number: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A grey picture: its left half shows `number % 16` as brightness, its right half `number // 16`."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[:, : width // 2] = 8 + 15 * (number % LEVELS)
    picture[:, width // 2 :] = 8 + 15 * (number // LEVELS)
    return picture


def number_of(picture: NDArray[np.uint8]) -> int:
    """The number that a decoded picture shows."""
    height, width = picture.shape[:2]
    rows = slice(height // 4, 3 * height // 4)
    left, right = picture[rows, width // 8 : 3 * width // 8].mean(), picture[rows, 5 * width // 8 : 7 * width // 8].mean()
    return round((left - 8) / 15) + LEVELS * round((right - 8) / 15)


def encode(
    pictures: Sequence[NDArray[np.uint8]],
    *,
    rate: Fraction | int = 30,
    times: Sequence[Fraction] | None = None,
    container: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
) -> bytes:
    """`pictures` as a video at a constant `rate`, or shown at `times` (seconds)."""
    file = io.BytesIO()
    base = Fraction(1, 90_000) if times is not None else 1 / Fraction(rate)
    with av.open(file, "w", format=container) as box:
        options = {"crf": "4", "preset": "veryfast", "bf": "3", "g": "12"} if codec == "libx264" else {}
        stream = box.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = base
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index if times is None else round(times[index] / base)
            frame.time_base = base
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    return file.getvalue()


PICTURES = {"jpg": ("mjpeg", "yuvj420p"), "png": ("png", "rgb24"), "webp": ("libwebp", "yuv420p")}
"""Codec and pixels of picture files by their extension."""


def picture(pixels: NDArray[np.uint8], extension: str = "jpg") -> bytes:
    """`pixels` as a file."""
    codec, pix_fmt = PICTURES[extension]
    context = av.VideoCodecContext.create(codec, "w")
    context.height, context.width = pixels.shape[:2]
    context.pix_fmt, context.time_base = pix_fmt, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in (*context.encode(frame), *context.encode(None)))


def moving(frames: int = 24, height: int = 48, width: int = 64, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Smooth noise sliding sideways: passes every filter."""
    noise = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = noise.repeat(8, 0).repeat(8, 1)
    return [np.roll(picture, 3 * frame, axis=1) for frame in range(frames)]
