"""The figures of `evaluate`: every rung of a ladder of tokenizers, and the two baselines it has to beat, on the same clips.

A rung turns a video into tokens as they would be stored and back. PSNR is per clip, from one mean squared error over the whole clip,
pixels in [-1, 1] (range 2), at most `PSNR_CAP`; a total is the mean over clips. Tokens per second are cells of the latent grid (or
places of a sequence) per second of video; bits per second are stored numbers times the bits of their type. Frames per second are those of
the median batch: the first ones warm up.
Legend: B clips, C channels, T H W pixels. Not covered: pictures (`panel.py`), what LPIPS is (`networks.py`), distribution metrics.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinetok.infra.stage import Resources
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.reasons import BadVideo
from kinetok.pipelines.report.networks import Networks
from kinetok.pipelines.report.tables import Line, RungCost
from kinetok.tokenizers.base import Tokenizer, Tokens, TokenSpec
from kinetok.tokenizers.causal.tiling import tiled
from kinetok.tokenizers.metrics import clip_psnr, clip_ssim, mean_frame

PSNR_CAP = 100.0
"""dB; a perfect copy has no finite PSNR."""
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
CLIP_MEAN, DATA_MEAN = "clip mean frame", "data-set mean frame"


@dataclass
class Cost:
    """What a rung's tokens cost: totals over the clips it has seen."""

    tokens: int = 0
    bits: int = 0
    frames: int = 0
    encoding: list[float] = field(default_factory=list)
    """Seconds for a frame, of each batch."""
    decoding: list[float] = field(default_factory=list)
    latent: tuple[int, ...] = ()
    """Shape of one clip's tokens, without the batch."""


class Rung(Protocol):
    """One line of the table."""

    @property
    def name(self) -> str: ...

    @property
    def cost(self) -> Cost | None:
        """None for baselines, which have no tokens."""

    def __call__(self, video_BCTHW: Tensor) -> Tensor:
        """The reconstruction, on the CPU, in [-1, 1]."""


class ModelRung:
    """A tokenizer; its tokens are rounded to the type they are stored in before they are decoded."""

    def __init__(self, name: str, model: Tokenizer, stored: Precision, resources: Resources) -> None:
        self.name = name
        self.device = torch.device("cuda" if resources.gpus and torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.spec: TokenSpec = model.spec()
        self.stored = STORED[stored]
        self.arithmetic, self.tile = STORED[resources.dtype], resources.tile
        self.cost = Cost()

    @torch.no_grad()
    def __call__(self, video_BCTHW: Tensor) -> Tensor:
        arithmetic = torch.autocast(self.device.type, dtype=self.arithmetic, enabled=self.arithmetic != torch.float32)
        with arithmetic, tiled(self.tile):
            video = video_BCTHW.to(self.device)
            with self._timed(self.cost.encoding, video):
                tokens = self.model.encode(video)
            stored = self._store(tokens.values)
            with self._timed(self.cost.decoding, video):
                restored = self.model.decode(Tokens(stored.to(tokens.values.dtype), tokens.frames))
        self.cost.frames += video.shape[0] * video.shape[2]
        return restored.float().cpu().clamp(-1, 1)

    def _store(self, values: Tensor) -> Tensor:
        """The tokens as a shard would hold them; adds what they cost."""
        kept = values.to(self.stored) if values.is_floating_point() else values
        bits = kept.element_size() * 8 if self.spec.vocabulary is None else math.ceil(math.log2(self.spec.vocabulary))
        cells = kept.shape[2:] if self.spec.layout == "grid" else kept.shape[1:2]
        self.cost.tokens += kept.shape[0] * math.prod(cells)
        self.cost.bits += kept.numel() * bits
        self.cost.latent = tuple(kept.shape[1:])
        return kept

    @contextmanager
    def _timed(self, taken: list[float], video_BCTHW: Tensor) -> Iterator[None]:
        # One thread's own time is that of the model, whatever else the cores do meanwhile.
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        began = clock()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        taken.append((clock() - began) / (video_BCTHW.shape[0] * video_BCTHW.shape[2]))


class ClipMean:
    """Baseline: each clip's own mean frame, standing still."""

    name = CLIP_MEAN
    cost = None

    def __call__(self, video_BCTHW: Tensor) -> Tensor:
        return mean_frame(video_BCTHW)


@dataclass
class DataMean:
    """Baseline: one mean frame (C, H, W) of all clips, standing still."""

    frame_CHW: Tensor
    name: str = DATA_MEAN
    cost: None = None

    def __call__(self, video_BCTHW: Tensor) -> Tensor:
        return self.frame_CHW[None, :, None].expand_as(video_BCTHW)


@dataclass(frozen=True)
class ClipFigures:
    """One clip under one rung."""

    row: int
    psnr: float
    ssim: float
    lpips: float | None = None
    """None: not measured."""

    @property
    def figures(self) -> dict[str, float]:
        """Every figure that there is, by name."""
        found = {"psnr": self.psnr, "ssim": self.ssim, "lpips": self.lpips}
        return {name: value for name, value in found.items() if value is not None}


@dataclass
class Clips:
    """The clips to evaluate on: rows of an index, read in batches; rows whose source no longer decodes are set aside in `bad`."""

    index: ClipIndex
    rows: list[int]
    batch_size: int
    bad: dict[int, BadVideo] = field(default_factory=dict)

    def batches(self) -> Iterator[tuple[list[int], Tensor]]:
        """(rows, video_BCTHW in [-1, 1])."""
        good = [row for row in self.rows if row not in self.bad]
        for start in range(0, len(good), self.batch_size):
            read = [(row, video) for row in good[start : start + self.batch_size] if (video := self.read(row)) is not None]
            if read:
                yield [row for row, _ in read], torch.stack([video for _, video in read])

    def read(self, row: int) -> Tensor | None:
        """One clip (C, T, H, W) in [-1, 1], None where it cannot be read."""
        try:
            pixels_THWC = self.index.read_clip(row)
        except BadVideo as error:
            self.bad[row] = error
            return None
        return torch.from_numpy(pixels_THWC).permute(3, 0, 1, 2).float() / 127.5 - 1


def choose(index: ClipIndex, split: str, limit: int | None, seed: int) -> list[int]:
    """Rows of the split, at most `limit`, drawn by `seed`, in the order of the index."""
    rows: NDArray[np.int64] = np.flatnonzero(np.asarray(index.rows["split"].to_pylist()) == split)
    if limit is not None and limit < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))
    return [int(row) for row in rows]


def average_frame(clips: Clips) -> Tensor:
    """Mean frame (C, H, W) over all frames of all clips."""
    total, count = torch.zeros(()), 0
    for rows, video_BCTHW in clips.batches():
        total = total + video_BCTHW.mean(2).sum(0)
        count += len(rows)
    return total / max(count, 1)


def measure(rungs: Sequence[Rung], clips: Clips, networks: Networks) -> Iterator[tuple[str, list[ClipFigures]]]:
    """Each batch of clips, read once, under every rung in turn: (its name, the clips' figures); adds to the rungs' costs on the way."""
    for rows, video_BCTHW in clips.batches():
        for rung in rungs:
            restored_BCTHW = rung(video_BCTHW)
            psnr_B = clip_psnr(restored_BCTHW, video_BCTHW).clamp(max=PSNR_CAP)
            ssim_B = clip_ssim(restored_BCTHW, video_BCTHW)
            lpips_B = networks.distance(restored_BCTHW, video_BCTHW)
            far = [None] * len(rows) if lpips_B is None else lpips_B.tolist()
            yield rung.name, [ClipFigures(row, float(p), float(s), d) for row, p, s, d in zip(rows, psnr_B, ssim_B, far, strict=True)]


def summary(rung: Rung, figures: Sequence[ClipFigures], fps: float) -> Line:
    """One line of the ladder table."""
    mean = {name: math.fsum(clip.figures[name] for clip in figures) / len(figures) for name in figures[0].figures}
    cost = _rung_cost(rung, fps) if isinstance(rung, ModelRung) else None
    return Line(name=rung.name, **mean, cost=cost)


def _rung_cost(rung: ModelRung, fps: float) -> RungCost:
    cost, seconds = rung.cost, rung.cost.frames / fps
    return RungCost(
        tokenizer=rung.spec.tokenizer,
        weights=rung.spec.weights,
        temporal=rung.spec.temporal,
        spatial=rung.spec.spatial,
        latent=cost.latent,
        parameters=sum(parameter.numel() for parameter in rung.model.parameters()),
        tokens_per_second=cost.tokens / seconds,
        bits_per_second=cost.bits / seconds,
        encode_frames_per_second=1 / statistics.median(cost.encoding),
        decode_frames_per_second=1 / statistics.median(cost.decoding),
    )
