"""Drawn moving scenes with captions that are true by construction: one to three shapes that move on a moving background, or `plain` ones.

A plain scene's background has one colour, and its shapes are large, never turn and go straight across the middle, always in view: what a
caption says is most of what there is to see, so that small models learn it in minutes.

Everything follows from one integer per scene; shapes are drawn by signed distance, so that edges are antialiased and motion is
smooth below a pixel. What was drawn is told twice: as a sentence, and as the facts it is made of (`Shape`), for questions and judges.
Encoded to H.264 and packed into tars like any other source. Also where the embedded real clips lie.

Legend: T frames, H W pixels, C colour; coordinates run from -1 to 1, `time_T11` from 0 to 1.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from kinetok.infra.storage import Folder
from kinetok.pipelines.data.pack import Packed, PackVideo, write_tars

EMBEDDED = Path(__file__).parent / "embedded" / "metadata.csv"
"""The CSV of the real clips that come with kinetok; see ATTRIBUTION.md beside it."""

Floats = NDArray[np.float32]
Colour = tuple[str, tuple[float, float, float]]

COLOURS: tuple[Colour, ...] = (
    ("red", (0.86, 0.15, 0.13)),
    ("orange", (0.95, 0.55, 0.10)),
    ("yellow", (0.96, 0.85, 0.20)),
    ("green", (0.18, 0.65, 0.27)),
    ("teal", (0.10, 0.62, 0.62)),
    ("blue", (0.16, 0.33, 0.80)),
    ("violet", (0.51, 0.22, 0.70)),
    ("pink", (0.94, 0.47, 0.66)),
    ("brown", (0.45, 0.29, 0.16)),
    ("white", (0.96, 0.96, 0.94)),
    ("black", (0.08, 0.08, 0.10)),
)


SHAPES = ("disc", "square", "bar", "ring", "triangle")
TURNS = ("square", "bar", "triangle")
"""Shapes that may turn: of the others it would not be seen."""
MOTIONS = ("moves from left to right", "moves from right to left", "falls", "rises", "circles", "bounces")
STRAIGHT = MOTIONS[:4]


@dataclass(frozen=True)
class Manner:
    """How shapes are drawn and move."""

    radius: tuple[float, float]
    """Least and most."""
    turning: bool
    """Whether some turn."""
    motions: tuple[str, ...]
    aside: float
    """How far from the middle, at most, a shape passes that goes straight."""
    reach: float
    """How far before the middle that begins, and beyond it that ends, before any of the radius is added."""
    beyond: float
    """Part of the radius that is."""


LIVELY = Manner((0.2, 0.42), turning=True, motions=MOTIONS, aside=0.6, reach=1.0, beyond=0.3)
PLAIN = Manner((0.5, 0.6), turning=False, motions=STRAIGHT, aside=0.1, reach=0.3, beyond=0.0)


class Canvas:
    """Coordinates of one clip."""

    def __init__(self, frames: int, size: int) -> None:
        self.frames = frames
        self.size = size
        self.pixel = 2.0 / size
        self.time_T11: Floats = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None]
        self.x_1W: Floats = np.linspace(-1, 1, size, dtype=np.float32)[None, :]
        self.y_H1: Floats = self.x_1W.T


@dataclass(frozen=True)
class Shape:
    """What is true of one shape from the first frame to the last."""

    colour: str
    shape: str
    motion: str
    turning: bool
    background: str = ""
    """The colour behind it, where that is one."""

    @property
    def phrase(self) -> str:
        """As captions say it."""
        return f"{_a(f'turning {self.colour}' if self.turning else self.colour)} {self.shape} {self.motion}"


@dataclass(frozen=True)
class Scene:
    """A drawn clip, uint8 (T, H, W, C), the sentence that says what is in it, and the shapes that the sentence names."""

    pixels_THWC: NDArray[np.uint8]
    caption: str
    shapes: tuple[Shape, ...]


def draw_scene(seed: int, number: int, *, frames: int, size: int, most: int = 3, plain: bool = False) -> Scene:
    """Scene `number` of a data set of at most `most` shapes each, a plain one where `plain`; only its length depends on `frames`."""
    rng = np.random.default_rng([seed, number])
    canvas = Canvas(frames, size)
    background = _plain if plain else BACKGROUNDS[number % len(BACKGROUNDS)]
    manner = PLAIN if plain else LIVELY
    colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))]
    video_THWC, place = background(rng, canvas, colours[:2])
    shapes = []
    # No two shapes go the same way: one could hide the other in every frame.
    for colour, way in zip(colours[2 : 2 + int(rng.integers(1, most + 1))], rng.permutation(len(manner.motions)), strict=False):
        cover_THW, shape = _actor(rng, canvas, colour[0], int(way), manner)
        video_THWC += cover_THW[..., None] * (np.array(colour[1], np.float32) - video_THWC)
        shapes.append(replace(shape, background=colours[0][0]) if plain else shape)
    more = (f" {word} {shape.phrase}" for word, shape in zip(("while", "and", "and"), shapes[1:], strict=False))
    return Scene((np.clip(video_THWC, 0, 1) * 255 + 0.5).astype(np.uint8), f"{shapes[0].phrase} {place}{''.join(more)}", tuple(shapes))


def encode_mp4(pixels_THWC: NDArray[np.uint8], fps: int) -> bytes:
    """H.264 in MP4; one thread, so that the bytes do not depend on the machine's cores."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # With macroblock trees or adaptive quantisation x264 now and then gives other bytes for the same frames, even on one thread.
        options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0:aq-mode=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.codec_context.thread_count = 1
        stream.height, stream.width = pixels_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels_HWC in pixels_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@dataclass(frozen=True)
class SceneSet:
    """Which scenes: numbers 0 to `count` of `seed`."""

    count: int
    seed: int
    frames: int
    size: int
    fps: int
    most: int = 3
    """Shapes of one scene."""
    plain: bool = False
    """Whether they are plain scenes."""

    @property
    def motions(self) -> tuple[str, ...]:
        """Ways to move that there are."""
        return (PLAIN if self.plain else LIVELY).motions

    def scene(self, number: int, frames: int | None = None) -> Scene:
        """One of them; with other `frames`, what is in it stays the same."""
        return draw_scene(self.seed, number, frames=frames or self.frames, size=self.size, most=self.most, plain=self.plain)


def write_scenes(drawn: SceneSet, out: Folder, *, shard_videos: int, progress: Callable[[int, int], None]) -> Packed:
    """Draw, encode and pack scenes into `scenes-*.tar`; `progress` hears (done, total)."""

    def videos() -> Iterator[PackVideo]:
        for number in range(drawn.count):
            scene = drawn.scene(number)
            yield PackVideo(f"{number:06d}", "mp4", encode_mp4(scene.pixels_THWC, drawn.fps), scene.caption, f"scene-{drawn.seed}-{number}")
            progress(number + 1, drawn.count)

    return write_tars(videos(), out, prefix="scenes", shard_videos=shard_videos)


def _plain(rng: np.random.Generator, canvas: Canvas, colours: list[Colour]) -> tuple[Floats, str]:
    """One colour, which stays."""
    name, rgb = colours[0]
    return np.zeros((canvas.frames, canvas.size, canvas.size, 3), np.float32) + np.array(rgb, np.float32), f"on plain {name}"


def _gradient(rng: np.random.Generator, canvas: Canvas, colours: list[Colour]) -> tuple[Floats, str]:
    """Two colours blended across the frame, the direction turning slowly."""
    (one, rgb_one), (two, rgb_two) = colours
    angle_T11 = rng.uniform(0, 2 * np.pi) + rng.choice([-1, 1]) * np.pi / 2 * canvas.time_T11
    mix_THW = 0.5 + 0.4 * (np.cos(angle_T11) * canvas.x_1W + np.sin(angle_T11) * canvas.y_H1)
    return _blend(mix_THW, rgb_one, rgb_two), f"over a gradient of {one} and {two}"


def _stripes(rng: np.random.Generator, canvas: Canvas, colours: list[Colour]) -> tuple[Floats, str]:
    """Stripes sliding across."""
    (one, rgb_one), (two, rgb_two) = colours
    angle, width, sign = rng.uniform(0, np.pi), rng.uniform(0.25, 0.5), int(rng.choice([-1, 1]))
    along_HW = np.cos(angle) * canvas.x_1W + np.sin(angle) * canvas.y_H1
    mix_THW = _square_wave(along_HW + sign * rng.uniform(0.5, 1.2) * canvas.time_T11, width, canvas)
    return _blend(mix_THW, rgb_one, rgb_two), f"over sliding {one} and {two} stripes"


def _checkerboard(rng: np.random.Generator, canvas: Canvas, colours: list[Colour]) -> tuple[Floats, str]:
    """A checkerboard that the camera nears or leaves."""
    (one, rgb_one), (two, rgb_two) = colours
    near = bool(rng.integers(2))
    zoom_T11 = np.exp((canvas.time_T11 if near else 1 - canvas.time_T11) * np.float32(0.8))
    width_T11 = np.float32(rng.uniform(0.25, 0.4)) * zoom_T11
    x_T1W, y_TH1 = (_square_wave(axis + np.float32(0.1), width_T11, canvas) for axis in (canvas.x_1W[None], canvas.y_H1[None]))
    mix_THW = x_T1W + y_TH1 - 2 * x_T1W * y_TH1
    return _blend(mix_THW, rgb_one, rgb_two), f"over a checkerboard of {one} and {two} that {'comes closer' if near else 'moves away'}"


def _clouds(rng: np.random.Generator, canvas: Canvas, colours: list[Colour]) -> tuple[Floats, str]:
    """Smooth noise drifting."""
    (one, rgb_one), (two, rgb_two) = colours
    wide = 2 * canvas.size
    ring = np.hypot(np.fft.fftfreq(wide)[:, None], np.fft.fftfreq(wide)[None, :])
    ring[0, 0] = np.inf
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((wide, wide))) / ring**1.8).real
    mix_HW = np.clip(0.5 + 0.25 * noise / noise.std(), 0, 1).astype(np.float32)
    speed = rng.uniform(0.3, 0.8, 2) * rng.choice([-1, 1], 2) * canvas.size
    return _pan(_blend(mix_HW, rgb_one, rgb_two), speed, canvas), f"over drifting {one} and {two} clouds"


def _landscape(rng: np.random.Generator, canvas: Canvas, colours: list[Colour]) -> tuple[Floats, str]:
    """Hills, a sun and trees that the camera pans along."""
    (hill, rgb_hill), (sky, rgb_sky) = colours
    wide = 2 * canvas.size
    x_W = np.linspace(0, 2 * np.pi, wide, endpoint=False, dtype=np.float32)
    y_H1 = np.linspace(0, 1, canvas.size, dtype=np.float32)[:, None]
    soft = np.float32(canvas.size)
    picture = _blend(np.clip(y_H1 * 1.3, 0, 1) + np.zeros((1, wide), np.float32), rgb_sky, (0.98, 0.93, 0.85))
    sun = np.clip((0.12 - np.hypot((x_W - 2.0) / np.pi, y_H1 - 0.2)) * soft + 0.5, 0, 1)
    _paint(picture, sun, (1.0, 0.95, 0.55))
    for depth, shade in ((0.45, 1.0), (0.6, 0.75), (0.75, 0.5)):
        waves = sum(rng.uniform(0.02, 0.07) * np.sin(k * x_W + rng.uniform(0, 6.3)) for k in (1, 2, 3, 5))
        _paint(picture, np.clip((y_H1 - depth - waves) * soft + 0.5, 0, 1), tuple(shade * part for part in rgb_hill))
    for place in rng.uniform(0, 2 * np.pi, 6):
        away = np.abs((x_W - place + np.pi) % (2 * np.pi) - np.pi)
        tree = np.clip((np.minimum(y_H1 - 0.55, 0.95 - y_H1) * 0.35 - away * 0.3) * soft + 0.5, 0, 1)
        _paint(picture, tree, (0.05, 0.25, 0.12))
    left = bool(rng.integers(2))
    speed = np.array([0.0, (-1 if left else 1) * rng.uniform(0.5, 0.9) * canvas.size])
    return _pan(picture, speed, canvas), f"over {hill} hills below {_a(sky)} sky as the camera pans {'left' if left else 'right'}"


BACKGROUNDS = (_gradient, _clouds, _stripes, _landscape, _checkerboard)


def _actor(rng: np.random.Generator, canvas: Canvas, colour: str, way: int, manner: Manner) -> tuple[Floats, Shape]:
    """Coverage of one moving shape, and what it is; `way` is its place in the manner's motions."""
    radius, shape = rng.uniform(*manner.radius), SHAPES[int(rng.integers(len(SHAPES)))]
    turns = manner.turning and shape in TURNS and bool(rng.integers(2))
    x_T, y_T = _path(rng, canvas, float(radius), way, manner)
    angle_T = rng.uniform(0, np.pi) + (rng.choice([-1, 1]) * rng.uniform(1.5, 3.5) * canvas.time_T11 if turns else 0 * canvas.time_T11)
    dx, dy = canvas.x_1W - x_T, canvas.y_H1 - y_T
    if shape in ("disc", "ring"):
        distance = np.hypot(dx, dy)
        distance = (
            distance - np.float32(radius) if shape == "disc" else np.abs(distance - np.float32(0.8 * radius)) - np.float32(0.2 * radius)
        )
    else:
        cos, sin = np.cos(angle_T).astype(np.float32), np.sin(angle_T).astype(np.float32)
        distance = _polygon(shape, cos * dx + sin * dy, cos * dy - sin * dx, np.float32(radius))
    cover_THW = np.clip(0.5 - distance / np.float32(canvas.pixel), 0, 1).astype(np.float32)
    return cover_THW, Shape(colour, shape, manner.motions[way], turns)


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _polygon(shape: str, u: Floats, v: Floats, radius: np.float32) -> Floats:
    """Signed distance, up to rounding at corners, of a shape with straight edges."""
    if shape == "triangle":
        return np.maximum(np.abs(u) * np.float32(0.866) + v * np.float32(0.5), -v) - radius * np.float32(0.6)
    long, short = (radius * np.float32(0.85), radius * np.float32(0.85)) if shape == "square" else (radius * 2, radius * np.float32(0.3))
    return np.maximum(np.abs(u) - long, np.abs(v) - short)


def _path(rng: np.random.Generator, canvas: Canvas, radius: float, way: int, manner: Manner) -> tuple[Floats, Floats]:
    """Centre over time."""
    time = canvas.time_T11
    rest, reach = rng.uniform(-manner.aside, manner.aside), manner.reach + manner.beyond * radius
    if way < 4:
        moving = ((2 * time - 1) * reach * (1 if way % 2 == 0 else -1)).astype(np.float32)
        resting = np.full_like(time, rest)
        return (moving, resting) if way < 2 else (resting, moving)
    phase, speed = rng.uniform(0, 6.3), rng.uniform(4, 7)
    if way == 4:
        return (np.cos(phase + speed * time) * 0.55).astype(np.float32), (np.sin(phase + speed * time) * 0.55).astype(np.float32)
    bounce = 0.7 - 1.3 * np.abs(np.sin(phase + speed * time))
    return ((2 * time - 1) * 0.5).astype(np.float32), bounce.astype(np.float32)


def _square_wave(phase: Floats, width: float | Floats, canvas: Canvas) -> Floats:
    """0 and 1 in turn every `width`, with edges one pixel wide."""
    inside = np.abs((phase / (2 * width)) % 1 - 0.5) - 0.25
    wave: Floats = np.clip(0.5 + inside * 2 * width / np.float32(canvas.pixel), 0, 1).astype(np.float32)
    return wave


def _blend(mix: Floats, one: tuple[float, ...], two: tuple[float, ...]) -> Floats:
    """Colours between `one` (mix 0) and `two` (mix 1), with a last axis C."""
    first, second = np.array(one, np.float32), np.array(two, np.float32)
    return first + np.clip(mix, 0, 1).astype(np.float32)[..., None] * (second - first)


def _paint(picture_HWC: Floats, cover_HW: Floats, colour: tuple[float, ...]) -> None:
    picture_HWC += cover_HW.astype(np.float32)[..., None] * (np.array(colour, np.float32) - picture_HWC)


def _pan(picture_HWC: Floats, speed: NDArray[np.float64], canvas: Canvas) -> Floats:
    """Windows of a picture that repeats at its edges, moving by `speed` (rows, columns) over the clip; linear below a pixel."""
    video = np.empty((canvas.frames, canvas.size, canvas.size, 3), np.float32)
    for frame, time in enumerate(np.linspace(0, 1, canvas.frames)):
        shift = time * speed
        whole = np.floor(shift).astype(int)
        down, right = (shift - whole).astype(np.float32)
        rows, columns = (np.arange(canvas.size + 1) + whole[axis] for axis in (0, 1))
        window = picture_HWC.take(rows, 0, mode="wrap").take(columns, 1, mode="wrap")
        window = window[:-1] + down * (window[1:] - window[:-1])
        video[frame] = window[:, :-1] + right * (window[:, 1:] - window[:, :-1])
    return video
