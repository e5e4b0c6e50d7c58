"""Long video in chunks: each is encoded and decoded by itself, and seams are blended over frames that two chunks share.

17 frames a chunk, and 4 shared frames where chunks overlap, are those of ProMAG (arXiv 2501.05442 and its project page): K chunks hold
17 + 13 (K - 1) frames then, and 17 K without overlap. Memory is that of one chunk whatever the length. Overlap is counted in pixel
frames everywhere; `latent_steps` is the one place that turns frames into latents. A model that pads videos to whole windows
(`Geometry.window`) does so with every chunk. Not covered: one latent stream without seams, for
which see `streaming`.

Legend: B clips, C channels, T H W frames, rows, columns, Z latent channels, t h w latent positions.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, Self, TypeVar

import torch
from pydantic import Field, StrictInt, model_validator
from torch import Tensor

from kinetok.tokenizers.base import Config, Count, Tokenizer, Tokens, latent_steps

Frame = TypeVar("Frame")


class ChunkPlan(Config):
    """How a video is cut, in pixel frames."""

    frames: Count = 17
    """Of a whole chunk; the last one of a video may be shorter."""
    overlap: Annotated[StrictInt, Field(ge=0)] = 0
    """Frames that a chunk shares with the one before; 4 in the paper."""

    @model_validator(mode="after")
    def _advances(self) -> Self:
        if self.overlap >= self.frames:
            raise ValueError(f"overlap: {self.overlap} frames leave nothing new in a chunk of {self.frames}")
        return self

    def spans(self, frames: int) -> list[range]:
        """The frames of each chunk of a video of `frames` frames; no chunk holds shared frames alone."""
        starts = range(0, max(frames - self.overlap, 1), self.frames - self.overlap)
        return [range(start, min(start + self.frames, frames)) for start in starts]

    def cut(self, frames: Iterable[Frame]) -> Iterator[list[Frame]]:
        """The chunks of `spans` of frames that come one at a time, and nobody knows how many; one chunk is held, no more."""
        source, chunk = iter(frames), list[Frame]()
        while fresh := list(islice(source, self.frames - len(chunk))):
            chunk += fresh
            yield chunk
            chunk = chunk[max(len(chunk) - self.overlap, 0) :]

    def steps(self, frames: int, temporal: int, window: int | None = None) -> list[int]:
        """Latent steps of each chunk; their sum is the length of the joined latents."""
        return [latent_steps(len(span), temporal, window) for span in self.spans(frames)]


def encode_chunks(tokenizer: Tokenizer, video_BCTHW: Tensor, plan: ChunkPlan) -> list[Tokens]:
    """Tokens of each chunk of a video of any length."""
    spans = plan.spans(video_BCTHW.shape[2])
    return [tokenizer.encode(video_BCTHW[:, :, span.start : span.stop]) for span in spans]


def decode_chunks(tokenizer: Tokenizer, chunks: Iterable[Tokens], plan: ChunkPlan) -> Tensor:
    """The video of all chunks in order, shared frames blended linearly from the earlier chunk to the later one."""
    return torch.cat(list(blend(map(tokenizer.decode, chunks), plan.overlap)), dim=2)


def join_latents(chunks: Iterable[Tokens]) -> Tensor:
    """Grids of all chunks behind one another, (B, Z, t, h, w): what a generator is trained on."""
    return torch.cat([tokens.values for tokens in chunks], dim=2)


def split_latents(latent_BZthw: Tensor, plan: ChunkPlan, *, frames: int, temporal: int, window: int | None = None) -> list[Tokens]:
    """Undo `join_latents` for a video of `frames` frames; ValueError where these are not as many steps as the latents have."""
    steps = plan.steps(frames, temporal, window)
    if sum(steps) != latent_BZthw.shape[2]:
        raise ValueError(
            f"{frames} frames in chunks of {plan.frames} with overlap {plan.overlap} are {sum(steps)} latent steps at {temporal}x, "
            f"got {latent_BZthw.shape[2]}: was it another plan, or another rung?"
        )
    parts = torch.split(latent_BZthw, steps, dim=2)
    return [Tokens(part, len(span)) for part, span in zip(parts, plan.spans(frames), strict=True)]


def blend(pieces: Iterable[Tensor], overlap: int, dim: int = 2) -> Iterator[Tensor]:
    """Pieces that share `overlap` positions of `dim` to pieces that share none: shared one i of n is n - i parts old, i + 1 new."""
    tail: Tensor | None = None
    for piece in pieces:
        settled = max(piece.shape[dim] - overlap, 0)
        if tail is not None and overlap:
            shared, fresh = torch.split(piece, [overlap, settled], dim)
            weight = (torch.arange(overlap, device=piece.device) + 1).to(piece) / (overlap + 1)
            shape = [overlap if axis == dim % piece.dim() else 1 for axis in range(piece.dim())]
            piece = torch.cat([torch.lerp(tail, shared, weight.view(shape)), fresh], dim)  # noqa: PLW2901 - the same, blended
        head, tail = torch.split(piece, [settled, piece.shape[dim] - settled], dim)
        yield head
    if tail is not None:
        yield tail
