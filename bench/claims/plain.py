"""Plain scenes for Divot's claims: one shape of one colour that moves one way over a grey ground, and the sentence that says so.

Shape, colour and direction are what a caption tells and what questions ask for, so understanding and generation can be scored exactly.
What it leaves out (size, brightness of the ground, where across its way the shape moves) differs from clip to clip: a caption has many
true videos. All follows from a seed; drawn by signed distance, with edges one pixel wide.

Legend: N scenes, T frames, H W pixels, C colour channels; coordinates run from -1 to 1.
"""

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
DIRECTIONS: Final = {"moves left": (-1, 0), "moves right": (1, 0), "rises": (0, -1), "falls": (0, 1)}
FACTORS: Final[dict[str, tuple[str, ...]]] = {"shape": SHAPES, "colour": tuple(COLOURS), "direction": tuple(DIRECTIONS)}
"""What is told of a scene, and its values."""
QUESTIONS: Final = {"shape": "What shape is it?", "colour": "What colour is it?", "direction": "How does it move?"}
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
        return f"a {self.word('colour', row)} {self.word('shape', row)} {self.word('direction', row)}"


def draw(count: int, seed: int) -> Scenes:
    """Scenes with all combinations of the factors equally often."""
    rng = np.random.default_rng(seed)
    combination = np.arange(count) % (len(SHAPES) * len(COLOURS) * len(DIRECTIONS))
    shape = combination % len(SHAPES)
    colour = combination // len(SHAPES) % len(COLOURS)
    direction = combination // (len(SHAPES) * len(COLOURS))
    radius, ground, across = rng.uniform(0.5, 0.6, count), rng.uniform(0.05, 0.35, count), rng.uniform(-0.25, 0.25, count)
    time_T = np.linspace(-REACH, REACH, FRAMES)
    axis = np.linspace(-1, 1, EDGE)
    video = np.empty((count, FRAMES, EDGE, EDGE, 3), np.uint8)
    ways, paints = list(DIRECTIONS.values()), list(COLOURS.values())
    for n in range(count):
        along_x, along_y = ways[direction[n]]
        x_T, y_T = (along * time_T if along else np.full(FRAMES, across[n]) for along in (along_x, along_y))
        dx_THW, dy_THW = axis[None, None, :] - x_T[:, None, None], axis[None, :, None] - y_T[:, None, None]
        cover_THW1 = np.clip(0.5 - _distance(SHAPES[shape[n]], dx_THW, dy_THW, radius[n]) * EDGE / 2, 0, 1)[..., None]
        video[n] = 255 * (ground[n] + cover_THW1 * (np.array(paints[colour[n]]) - ground[n])) + 0.5
    labels = {"shape": shape, "colour": colour, "direction": direction}
    return Scenes(torch.from_numpy(video), {name: torch.from_numpy(values) for name, values in labels.items()})


def _distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the edge, negative inside."""
    if shape == "bar":
        return np.maximum(np.abs(dx) - 0.45 * radius, np.abs(dy) - 1.1 * radius)
    if shape == "triangle":
        return np.maximum(np.abs(dx) * 0.866 + dy * -0.5, dy) - 0.62 * radius
    away = np.hypot(dx, dy)
    return away - radius if shape == "disc" else np.abs(away - 0.8 * radius) - 0.22 * radius
