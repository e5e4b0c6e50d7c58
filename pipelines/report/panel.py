"""Pictures of `evaluate`: original, reconstruction and error map side by side as a small mp4 that every browser plays.

Error maps show the mean absolute error of a pixel's channels on one fixed scale: black is 0, the brightest colour `ERROR_SCALE` and more
of the range [-1, 1]. Small clips are enlarged by whole pixels, so that chroma subsampling does not blur what is judged.
"""

import io
from fractions import Fraction

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ERROR_SCALE = 0.5
PANE = 192
"""Panes lower than this are enlarged, by a whole factor."""
GUTTER = 4
"""White columns between panes."""
CRF = "23"
HEAT = torch.tensor([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=torch.float32)
"""Colours of rising error, equally spaced; dark to bright, so that they read in grey too."""


def triptych(original_CTHW: Tensor, restored_CTHW: Tensor) -> NDArray[np.uint8]:
    """Original, reconstruction, error map: uint8 frames (T, H, W', 3) with even sides."""
    panes = [_pixels(original_CTHW), _pixels(restored_CTHW), _heat((original_CTHW - restored_CTHW).abs().mean(0))]
    scale = max(1, -(-PANE // panes[0].shape[1]))
    large = [pane.repeat_interleave(scale, 1).repeat_interleave(scale, 2) for pane in panes]
    gap = torch.full((*large[0].shape[:2], GUTTER, 3), 255, dtype=torch.uint8)
    whole = torch.cat([large[0], gap, large[1], gap, large[2]], 2)
    rows, columns = whole.shape[1] // 2 * 2, whole.shape[2] // 2 * 2
    return whole[:, :rows, :columns].numpy()


def mp4(frames_THWC: NDArray[np.uint8], fps: float) -> bytes:
    """The frames as H.264 (yuv420p)."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as box:
        stream = box.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": CRF, "threads": "1"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames_THWC:
            box.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        box.mux(stream.encode())
    return target.getvalue()


def _pixels(video_CTHW: Tensor) -> Tensor:
    """[-1, 1] to uint8 (T, H, W, 3)."""
    return ((video_CTHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def _heat(error_THW: Tensor) -> Tensor:
    """Errors as colours, uint8 (T, H, W, 3), linear between the colours of `HEAT`."""
    place = (error_THW / ERROR_SCALE).clamp(0, 1) * (len(HEAT) - 1)
    low = place.floor().long().clamp(max=len(HEAT) - 2)
    part = (place - low)[..., None]
    return (HEAT[low] * (1 - part) + HEAT[low + 1] * part).round().to(torch.uint8)
