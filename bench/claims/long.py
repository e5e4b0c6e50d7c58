"""What is measured on trained rungs beyond 17 frames of 64 x 64: seams between chunks, and frames of 512 x 512 in tiles.

Legend: B clips, C channels, T H W frames, rows, columns.
"""

from pathlib import Path

import torch
from footage import FRAMES, long_windows
from ladder import to_pixels
from torch import Tensor

from kinetok.tokenizers.causal.chunks import ChunkPlan, decode_chunks, encode_chunks
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.tiling import LayerwiseTiling, decode_latent_tiles
from kinetok.tokenizers.metrics import clip_psnr

CHUNKS, CLIPS = 4, 12
OFFSETS = (0, 4, 8, 12)
LARGE = 512
TILE_CELLS, TILE_OVERLAP = 16, 4
LAYER_TILE = 64


@torch.no_grad()
def seam_jump(rung: Rung, source: Path, overlap: int) -> float:
    """Jump of the error at the seams of four chunks over that inside them, see `jump_ratio`.

    The jump at a frame is the mean over clips and pixels of |error of this frame - error of the one before|. Chunks are cut at several
    offsets, so that what moves much stands at seams and inside alike.
    """
    plan = ChunkPlan(frames=FRAMES, overlap=overlap)
    frames = FRAMES + (CHUNKS - 1) * (FRAMES - overlap)
    long_BCTHW = to_pixels(torch.from_numpy(long_windows(source, "val", CHUNKS * FRAMES + OFFSETS[-1], CLIPS, 64)))
    jumps = []
    for offset in OFFSETS:
        video_BCTHW = long_BCTHW[:, :, offset : offset + frames]
        error_BCTHW = decode_chunks(rung, encode_chunks(rung, video_BCTHW, plan), plan) - video_BCTHW
        jumps.append((error_BCTHW[:, :, 1:] - error_BCTHW[:, :, :-1]).abs().mean((0, 1, 3, 4)))
    return jump_ratio(torch.stack(jumps).mean(0), [span.start for span in plan.spans(frames)][1:], overlap)


def jump_ratio(jump_T: Tensor, starts: list[int], overlap: int) -> float:
    """The worst of a seam's jumps, each the mean over seams, over the mean of all other jumps; `jump_T[i]` leads to frame i + 1.

    A seam has one jump, and one more for each frame that its chunks share.
    """
    touched = torch.tensor([range(start - 1, start + overlap) for start in starts])
    inside = torch.ones(len(jump_T), dtype=torch.bool)
    inside[touched] = False
    return float(jump_T[touched].mean(0).max() / jump_T[inside].mean())


@torch.no_grad()
def tiling(rung: Rung, source: Path) -> dict[str, object]:
    """A clip of 512 x 512 decoded whole, layer-wise and from tiles of the latent: PSNR, and the largest differences from whole."""
    video_BCTHW = to_pixels(torch.from_numpy(long_windows(source, "val", FRAMES, 1, LARGE)))
    tokens = rung.encode(video_BCTHW)
    whole_BCTHW = rung.decode(tokens)
    with LayerwiseTiling(LAYER_TILE):
        layerwise_BCTHW = rung.decode(tokens)
    latent_BCTHW = decode_latent_tiles(rung, tokens, tile=TILE_CELLS, overlap=TILE_OVERLAP)
    outputs = {"whole": whole_BCTHW, "layer-wise": layerwise_BCTHW, "latent": latent_BCTHW}
    psnr: dict[str, object] = {f"{name} dB": float(clip_psnr(output, video_BCTHW)) for name, output in outputs.items()}
    return psnr | {f"{name} off": float((output - whole_BCTHW).abs().max()) for name, output in outputs.items() if name != "whole"}
