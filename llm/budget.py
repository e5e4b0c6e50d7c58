"""The token budget of a generator at 4x, 8x and 16x: latents, tokens, FLOPs, measured time and memory at equal video length.

Videos are cut into chunks of 17 frames (`ChunkPlan`), and a chunk becomes 1 + 16 / rate latent steps, the first an image of its own:
5, 3 and 2 at 4x, 8x and 16x. So 16x saves a factor of 2.5 over 4x, not 4; see `explanation`. Not covered: overlapping chunks, sampling.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from kinetok.llm.cost import FLOAT, Flops, dit_flops, saved_bytes
from kinetok.llm.dit import DiTConfig, VideoDiT
from kinetok.llm.presets import SizeName, dit
from kinetok.llm.training import DIT, DiffusionObjective, DiTTrainable
from kinetok.tokenizers.base import Batch, latent_steps
from kinetok.tokenizers.causal.chunks import ChunkPlan

CHUNKS = ChunkPlan()
RATES = (4, 8, 16)
SPATIAL = 8
"""Pixels of a latent cell along an edge, at every rung of the ladder."""
LATENT_CHANNELS = 16
TEXT_TOKENS = 77
TIMED = 3
"""Steps that are timed, after one of the same shape to warm up."""


@dataclass(frozen=True)
class Measured:
    """One training step on one video: forward and backward pass, on a GPU where there is one."""

    seconds: float
    """Median of `TIMED` steps."""
    memory: int
    """Bytes: the GPU's peak; on a CPU counted: weights, gradients, AdamW's state and what the backward pass keeps."""
    device: str


@dataclass(frozen=True)
class Row:
    """One rate's share of the budget."""

    rate: int
    """Temporal compression of the tokenizer."""
    latents: int
    """Latent steps of the video."""
    tokens: int
    flops: Flops
    measured: Measured | None
    longest: int
    """Frames of the longest video whose latents are no more than the first rate's for the asked length."""


def chunk_latents(rate: int) -> int:
    """Latent steps of one whole chunk."""
    return latent_steps(CHUNKS.frames, rate)


def video_latents(frames: int, rate: int) -> int:
    """Latent steps of a video: whole chunks, then a shorter one that is padded to its last step."""
    return sum(CHUNKS.steps(frames, rate))


def longest_video(latents: int, rate: int) -> int:
    """Frames of the longest video of no more than `latents` latent steps; inverts `video_latents`."""
    chunks, rest = divmod(latents, chunk_latents(rate))
    return chunks * CHUNKS.frames + (1 + (rest - 1) * rate if rest else 0)


def budget(size: SizeName, *, frames: int, height: int, width: int, measured: bool) -> list[Row]:
    """A row for each rate; ValueError where the pixels are no whole tokens."""
    if height % SPATIAL or width % SPATIAL:
        raise ValueError(f"{height} x {width} pixels: the ladder needs multiples of {SPATIAL}")
    allowed = video_latents(frames, RATES[0])
    rows = []
    for rate in RATES:
        config = dit(size, z=LATENT_CHANNELS, chunk=chunk_latents(rate))
        latent = (video_latents(frames, rate), height // SPATIAL, width // SPATIAL)
        t, h, w = config.grid(latent)
        step = measure(config, latent) if measured else None
        rows.append(Row(rate, latent[0], t * h * w, dit_flops(config, latent, TEXT_TOKENS), step, longest_video(allowed, rate)))
    return rows


def measure(config: DiTConfig, latent: tuple[int, int, int]) -> Measured:
    """Time and memory of one training step, whatever was measured before it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainable = DiTTrainable(VideoDiT(config), DiffusionObjective())
    player, batch = trainable.players[DIT].to(device), _batch(config, latent, device)
    kept = _step(player, batch)  # kernels are chosen, and memory is taken, by shape
    seconds = statistics.median(_timed(player, batch, device) for _ in range(TIMED))
    weights = sum(weight.numel() for weight in player.parameters())
    if device.type == "cuda":
        # The optimizer's state is not there yet: two numbers for each weight.
        return Measured(seconds, torch.cuda.max_memory_allocated(device) + 2 * FLOAT * weights, torch.cuda.get_device_name(device))
    return Measured(seconds, kept + 4 * FLOAT * weights, "CPU")


def explanation(rows: list[Row]) -> str:
    """Why the saving is what it is, and why the paper's site says more."""
    first, last = rows[0], rows[-1]
    steps = ", ".join(f"{chunk_latents(row.rate)} at {row.rate}x" for row in rows)
    saved = chunk_latents(first.rate) / chunk_latents(last.rate)
    return (
        f"A chunk of {CHUNKS.frames} frames has 1 + 16 / rate latent steps, the first an image of its own: {steps}. So {last.rate}x takes "
        f"{saved:g} times fewer tokens than {first.rate}x, and the tokens of {longest_video(first.latents, first.rate)} frames at "
        f"{first.rate}x are those of {last.longest} at {last.rate}x. The site of ProMAG (arXiv 2501.05442) gives 340 frames at 16x the "
        "budget of 68 at 4x, 5 times: that takes one latent step for 17 frames, that is, chunks without an image latent of their own."
    )


def _timed(player: nn.Module, batch: Batch, device: torch.device) -> float:
    before = _now(device)
    _step(player, batch)
    return _now(device) - before


def _step(player: nn.Module, batch: Batch) -> int:
    """A forward and a backward pass; bytes that were kept in between."""
    (loss, _), kept = saved_bytes(lambda: player(batch, 1), [player])
    torch.autograd.grad(loss, list(player.parameters()))
    return kept


def _batch(config: DiTConfig, latent: tuple[int, int, int], device: torch.device) -> Batch:
    return {
        "latent_BZthw": torch.zeros(1, config.z, *latent, device=device),
        "text_BLE": torch.zeros(1, TEXT_TOKENS, config.text_width, device=device),
        "text_mask_BL": torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=device),
        "seed_B": torch.zeros(1, dtype=torch.int64),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
