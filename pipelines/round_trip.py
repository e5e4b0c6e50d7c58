"""`round_trip`: a video of any length through a tokenizer and back, both beside each other as mp4, with figures: `kinetok reconstruct`.

Frames are read, encoded, decoded, compared and written as they come, so memory is that of a few chunks. `causal/chunks.py` says how chunks
are cut and blended, `causal/streaming.py` what one stream is, `causal/tiling.py` what tiles are. A picture keeps its shape: `Way.size`
scales both sides alike, and edges are cropped to multiples of the model's cell, or to the square of a Divot tokenizer. Figures are of the
model's numbers, before the mp4 makes them coarser. Not covered: sound; held-out clips and baselines (stages `evaluate`, `reconstruct`).

Legend: B C T H W pixels.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from kinetok.infra.errors import ConfigError, DataError
from kinetok.infra.storage import written_aside
from kinetok.pipelines.data.decode import LIMITS, Limits, Pixels, VideoInfo, VideoReader, as_tensor
from kinetok.pipelines.data.reasons import BadVideo
from kinetok.pipelines.report.panel import beside, mp4_writer, pixels
from kinetok.tokenizers.base import Tokenizer, TokenSpec
from kinetok.tokenizers.causal.chunks import ChunkPlan, blend
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.streaming import DecodeStream, EncodeStream
from kinetok.tokenizers.causal.tiling import tiled
from kinetok.tokenizers.divot.tokenizer import WINDOW_SEEDS, DivotTokenizer
from kinetok.tokenizers.metrics import Fidelity

OWN_LIMITS = Limits(bytes=100 * LIMITS.bytes, seconds=100 * LIMITS.seconds, work=100 * LIMITS.work)
"""Of a file that a user names: a day of 1080p, where a stranger's clip has minutes."""
SSIM_EDGE = 6
"""The fewest rows and columns that SSIM is defined on."""


@dataclass(frozen=True)
class Way:
    """How a video goes through a tokenizer."""

    frames: int | None = None
    """Of a chunk, or of a piece of the stream; None is 17, and the window of a Divot tokenizer."""
    overlap: int = 0
    """Frames that a chunk shares with the one before."""
    stream: bool = False
    """One stream of latents instead of chunks."""
    tile: int | None = None
    """Edge of the tiles that convolutions work on; None does without."""
    fps: float | None = None
    """None is the video's own mean rate."""
    size: int | None = None
    """Pixels of the shorter side; None is the video's own."""
    seed: int = 0
    """Of a tokenizer that samples."""


@dataclass(frozen=True)
class RoundTrip:
    """What was made of a video, and how near it comes."""

    out: Path
    spec: TokenSpec
    used: str
    """Frames, rate, and size of what size."""
    cut: str
    """Chunks, or the stream."""
    frames: int
    video_seconds: float
    pixel_numbers: int
    token_numbers: int
    psnr: float
    ssim: float
    seconds: float
    """For all of it: reading, the model, comparing, writing."""
    peak: str

    def lines(self) -> Iterator[str]:
        """What `kinetok reconstruct` prints."""
        spec, tokens = self.spec, self.token_numbers // self.spec.channels
        yield f"video        {self.used}"
        yield f"model        {spec.tokenizer} {spec.temporal}x{spec.spatial}x{spec.spatial}, {self.cut}"
        yield f"tokens       {tokens:,} of {spec.channels} numbers, {tokens / self.video_seconds:,.1f} per second of video"
        yield f"compression  {self.pixel_numbers / self.token_numbers:.1f} numbers of pixels for one of tokens"
        yield f"PSNR, SSIM   {self.psnr:.2f} dB, {self.ssim:.3f}"
        yield f"time         {self.frames / self.seconds:.1f} frames/s with reading and writing; {self.peak}"
        yield f"{self.out}"


@torch.no_grad()
def round_trip(
    tokenizer: Tokenizer, video: Path, out: Path, way: Way | None = None, note: Callable[[int], None] = lambda frames: None
) -> RoundTrip:
    """Write `video` and what `tokenizer` makes of it to `out`, side by side; `note` is told of the frames so far.

    Raises ConfigError where the model cannot go this way or take this size, DataError where the file does not decode or the model gives
    numbers that are not finite. `out` appears when it is whole; on an error an older one stays as it was.
    """
    way = way or Way()
    if out.exists() and out.samefile(video):
        raise ConfigError(f"--out: {out} is the video that is read; name another file")
    codec, fidelity, originals = _Codec(tokenizer, way), Fidelity(), deque[Pixels]()
    began = time.perf_counter()
    try:
        with VideoReader(video, OWN_LIMITS) as reader:
            fit, fps = _fit(reader.info, tokenizer, codec.spec.spatial, way.size), way.fps or reader.info.fps
            shown = reader.frames_at((number / fps for number in count()), height=fit.scaled[0], width=fit.scaled[1])
            frames = _kept(map(fit.crop, shown), originals)
            with written_aside(str(out.resolve())) as aside, open(aside, "wb") as file, mp4_writer(file, fps) as write, tiled(way.tile):
                for restored_BCTHW in codec.pieces(frames):
                    if not restored_BCTHW.shape[2]:
                        continue
                    if not restored_BCTHW.isfinite().all():
                        raise DataError(f"{video}: the model gives numbers that are not finite after {fidelity.frames} frames")
                    original_BCTHW = as_tensor([originals.popleft() for _ in range(restored_BCTHW.shape[2])])
                    fidelity.add(restored_BCTHW, original_BCTHW.to(codec.device))
                    write(beside([pixels(original_BCTHW[0]), pixels(restored_BCTHW[0].cpu())]))
                    note(fidelity.frames)
    except BadVideo as error:
        raise DataError(f"{video} {error.message}; nothing was written") from error
    total = fidelity.frames
    return RoundTrip(
        out=out,
        spec=codec.spec,
        used=f"{total} frames, {total / fps:.2f} s at {fps:g} fps{'' if fps == reader.info.fps else f' of {reader.info.fps:g}'}, {fit}",
        cut=str(codec),
        frames=total,
        video_seconds=total / fps,
        pixel_numbers=3 * total * fit.kept[0] * fit.kept[1],
        token_numbers=codec.numbers,
        psnr=fidelity.psnr,
        ssim=fidelity.ssim,
        seconds=time.perf_counter() - began,
        peak=_peak(codec.device),
    )


class _Codec:
    """A tokenizer on its device that takes frames as they come and gives videos (1, 3, T, H, W), as many frames in the end."""

    def __init__(self, tokenizer: Tokenizer, way: Way) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer, self.way, self.spec = tokenizer.to(self.device), way, tokenizer.spec()
        self.plan = _plan(tokenizer, way)
        self.numbers = self.done = 0
        """Numbers of all tokens; chunks or pieces."""

    def __str__(self) -> str:
        parts = f"{self.done} {'piece' if self.way.stream else 'chunk'}{'' if self.done == 1 else 's'} of {self.plan.frames} frames"
        shared = f", {self.plan.overlap} of them shared with the one before" if self.plan.overlap else ""
        cut = f"one stream in {parts}" if self.way.stream else f"{parts}{shared}"
        return cut if self.way.tile is None else f"{cut}, convolutions in tiles of {self.way.tile}"

    def pieces(self, frames: Iterable[Pixels]) -> Iterator[Tensor]:
        chunks = (as_tensor(chunk).to(self.device) for chunk in self.plan.cut(frames))
        return self._stream(chunks) if self.way.stream else blend(map(self._chunk, chunks), self.plan.overlap)

    def _chunk(self, video_BCTHW: Tensor) -> Tensor:
        tokens = self.tokenizer.encode(video_BCTHW)
        seed = self.way.seed + WINDOW_SEEDS * self.done
        self.numbers, self.done = self.numbers + tokens.values.numel(), self.done + 1
        return self.tokenizer.decode(tokens, [seed]) if isinstance(self.tokenizer, DivotTokenizer) else self.tokenizer.decode(tokens)

    def _stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        assert isinstance(self.tokenizer, Rung), "_plan refuses others"
        encoder, decoder, shown = EncodeStream(self.tokenizer), DecodeStream(self.tokenizer), 0
        for latent_BZthw in self._latents(encoder, chunks):
            video_BCTHW = decoder.push(latent_BZthw)[:, :, : encoder.frames - shown]
            shown += video_BCTHW.shape[2]
            yield video_BCTHW

    def _latents(self, encoder: EncodeStream, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        for video_BCTHW in chunks:
            try:
                latent_BZthw = encoder.push(video_BCTHW)
            except ValueError as error:
                raise ConfigError(f"--stream: {error}; leave it out, then the video goes in chunks") from error
            self.numbers, self.done = self.numbers + latent_BZthw.numel(), self.done + 1
            yield latent_BZthw
        last_BZthw = encoder.finish()
        self.numbers += last_BZthw.numel()
        yield last_BZthw


def _kept(frames: Iterable[Pixels], seen: "deque[Pixels]") -> Iterator[Pixels]:
    """The frames, each of which is in `seen` as well from then on."""
    for frame in frames:
        seen.append(frame)
        yield frame


def _peak(device: torch.device) -> str:
    """The most memory that was used so far: of the GPU, or by this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) >> 20:,} MiB of GPU memory at most"
    status = Path("/proc/self/status")  # not ru_maxrss: that one counts the parent that forked this process
    found = [line.split()[1] for line in (status.read_text().splitlines() if status.exists() else []) if line.startswith("VmHWM")]
    return f"{int(found[0]) >> 10:,} MiB of memory at most" if found else "memory is not known here"


class _Fit(NamedTuple):
    """From the picture of a video to what a model takes of it; (rows, columns) each."""

    own: tuple[int, int]
    scaled: tuple[int, int]
    kept: tuple[int, int]

    def __str__(self) -> str:
        own, scaled, kept = (f"{columns}x{rows}" for rows, columns in self)
        return f"{kept} of {own}{f', scaled to {scaled}' if scaled != own else ''}{', cropped at the centre' if kept != scaled else ''}"

    def crop(self, frame: Pixels) -> Pixels:
        """What is kept of a scaled frame."""
        top, left = ((have - keep) // 2 for have, keep in zip(self.scaled, self.kept, strict=True))
        return frame[top : top + self.kept[0], left : left + self.kept[1]]


def _fit(info: VideoInfo, tokenizer: Tokenizer, edge: int, size: int | None) -> _Fit:
    """Multiples of `edge`, or the square of it that a Divot tokenizer takes; ConfigError where a side has none."""
    own, square = (info.height, info.width), isinstance(tokenizer, DivotTokenizer)
    if square and size not in (None, edge):
        raise ConfigError(f"--size: a {tokenizer.config.kind!r} model takes frames of {edge}x{edge} pixels; leave it out")
    shorter = edge if square else size or min(own)
    scaled = round(own[0] * shorter / min(own)), round(own[1] * shorter / min(own))
    fit = _Fit(own, scaled, (edge, edge) if square else (scaled[0] // edge * edge, scaled[1] // edge * edge))
    if min(fit.kept) < SSIM_EDGE:
        raise ConfigError(f"{fit}: the model takes multiples of {edge}, and SSIM {SSIM_EDGE} pixels or more; give a larger --size")
    return fit


def _plan(tokenizer: Tokenizer, way: Way) -> ChunkPlan:
    """How the frames are cut; ConfigError where this model cannot be used so."""
    kind = tokenizer.config.kind
    if way.stream and way.overlap:
        raise ConfigError("--overlap: one stream has no seams to blend; leave it out, or --stream")
    if way.stream and not isinstance(tokenizer, Rung):
        raise ConfigError(f"--stream: a {kind!r} model keeps no memory from piece to piece; leave it out, then the video goes in chunks")
    if isinstance(tokenizer, DivotTokenizer) and way.frames not in (None, tokenizer.config.frames):
        raise ConfigError(f"--frames: a {kind!r} model takes windows of {tokenizer.config.frames} frames; leave it out")
    frames = tokenizer.config.frames if isinstance(tokenizer, DivotTokenizer) else way.frames
    try:
        return ChunkPlan(overlap=way.overlap) if frames is None else ChunkPlan(frames=frames, overlap=way.overlap)
    except ValidationError as error:
        raise ConfigError("; ".join(f"--{item['msg'].removeprefix('Value error, ')}" for item in error.errors())) from error
