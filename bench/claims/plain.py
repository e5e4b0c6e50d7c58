"""Plain scenes for Divot's claims: one shape of one colour that moves one way over a plain ground, and the sentence that says so.

Shape, colour, direction and ground are what a caption tells and what questions ask for, so understanding and generation can be scored
exactly. The ground is the easiest: it covers most of a frame, and tokens carry it first. What a caption leaves out (size, a shade of the
ground, where across its way the shape moves) differs from clip to clip: a caption has many true videos. All follows from a seed; drawn
by signed distance, with edges one pixel wide.

Legend: N scenes, T frames, H W pixels, C colour channels; coordinates run from -1 to 1.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

FRAMES: Final = 9
EDGE: Final = 32
SHAPES: Final = ("disc", "bar", "triangle", "ring")
COLOURS: Final = {
    "red": (0.86, 0.15, 0.13),
    "yellow": (0.96, 0.85, 0.20),
    "green": (0.18, 0.65, 0.27),
    "blue": (0.16, 0.33, 0.80),
    "pink": (0.94, 0.47, 0.86),
    "white": (0.96, 0.96, 0.94),
}
GROUNDS: Final = {
    "black": (0.06, 0.06, 0.08),
    "grey": (0.50, 0.50, 0.52),
    "brown": (0.42, 0.26, 0.14),
    "teal": (0.10, 0.48, 0.48),
    "violet": (0.42, 0.20, 0.62),
    "orange": (0.94, 0.55, 0.16),
}
DIRECTIONS: Final = {"moves left": (-1, 0), "moves right": (1, 0), "rises": (0, -1), "falls": (0, 1)}
FACTORS: Final[dict[str, tuple[str, ...]]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "direction": tuple(DIRECTIONS),
    "ground": tuple(GROUNDS),
}
"""What is told of a scene, and its values."""
QUESTIONS: Final = {
    "shape": "What shape is it?",
    "colour": "What colour is it?",
    "direction": "How does it move?",
    "ground": "On what ground?",
}
COMBINATIONS: Final = math.prod(map(len, FACTORS.values()))
SHADE = 0.04
"""A clip's ground is lighter or darker than its colour by up to so much."""
REACH = 0.4
"""A shape moves from so far on one side of the middle to so far on the other."""


@dataclass(frozen=True)
class Scenes:
    """Drawn clips."""

    video_NTHWC: Tensor
    """Bytes."""
    labels: dict[str, Tensor]
    """Index of each factor's value, (N,)."""

    def __len__(self) -> int:
        return len(self.video_NTHWC)

    def word(self, factor: str, row: int) -> str:
        """A factor's value in a scene."""
        return FACTORS[factor][int(self.labels[factor][row])]

    def caption(self, row: int) -> str:
        """What is to be seen."""
        return f"a {self.word('colour', row)} {self.word('shape', row)} {self.word('direction', row)} on {self.word('ground', row)}"


def draw(count: int, seed: int) -> Scenes:
    """Scenes in random order; of `COMBINATIONS`, or a multiple, all combinations of the factors equally often."""
    rng = np.random.default_rng(seed)
    combination = np.concatenate([rng.permutation(COMBINATIONS) for _ in range(-(-count // COMBINATIONS))])[:count]
    shape, colour, direction, ground = np.unravel_index(combination, [len(values) for values in FACTORS.values()])
    radius, shade, across = rng.uniform(0.5, 0.6, count), rng.uniform(-SHADE, SHADE, count), rng.uniform(-0.25, 0.25, count)
    time_T = np.linspace(-REACH, REACH, FRAMES)
    axis = np.linspace(-1, 1, EDGE)
    video = np.empty((count, FRAMES, EDGE, EDGE, 3), np.uint8)
    ways, paints, grounds = list(DIRECTIONS.values()), np.array(list(COLOURS.values())), np.array(list(GROUNDS.values()))
    for n in range(count):
        along_x, along_y = ways[direction[n]]
        x_T, y_T = (along * time_T if along else np.full(FRAMES, across[n]) for along in (along_x, along_y))
        dx_THW, dy_THW = axis[None, None, :] - x_T[:, None, None], axis[None, :, None] - y_T[:, None, None]
        cover_THW1 = np.clip(0.5 - _distance(SHAPES[shape[n]], dx_THW, dy_THW, radius[n]) * EDGE / 2, 0, 1)[..., None]
        below = grounds[ground[n]] + shade[n]
        video[n] = 255 * (below + cover_THW1 * (paints[colour[n]] - below)) + 0.5
    values = dict(zip(FACTORS, (shape, colour, direction, ground), strict=True))
    return Scenes(torch.from_numpy(video), {name: torch.from_numpy(value.astype(np.int64)) for name, value in values.items()})


def _distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the edge, negative inside."""
    if shape == "bar":
        return np.maximum(np.abs(dx) - 0.45 * radius, np.abs(dy) - 1.1 * radius)
    if shape == "triangle":
        return np.maximum(np.abs(dx) * 0.866 + dy * -0.5, dy) - 0.62 * radius
    away = np.hypot(dx, dy)
    return away - radius if shape == "disc" else np.abs(away - 0.8 * radius) - 0.22 * radius
