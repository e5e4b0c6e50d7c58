"""Pictures of `evaluate`, original, reconstruction and error map side by side as a small mp4 that every browser plays, and of `generate`.

Error maps show the mean absolute error of a pixel's channels on one fixed scale: black is 0, the brightest colour `ERROR_SCALE` and more
of the range [-1, 1]. Small clips are enlarged by whole pixels, so that chroma subsampling does not blur what is judged.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

ERROR_SCALE = 0.5
PANE = 192
"""Panes lower than this are enlarged, by a whole factor."""
GUTTER = 4
"""White columns between panes."""
WHITE = 255
SHEET_FRAMES, SHEET_PANE = 6, 96
"""Frames of a video in a contact sheet, and the height that lower ones are enlarged to."""
CRF = "23"
HEAT = torch.tensor([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=torch.float32)
"""Colours of rising error, equally spaced; dark to bright, so that they read in grey too."""


def triptych(original_CTHW: Tensor, restored_CTHW: Tensor) -> NDArray[np.uint8]:
    """Original, reconstruction, error map: uint8 frames (T, H, W', 3) with even sides."""
    return beside([pixels(original_CTHW), pixels(restored_CTHW), _heat((original_CTHW - restored_CTHW).abs().mean(0))])


def beside(panes: Sequence[Tensor]) -> NDArray[np.uint8]:
    """Videos (T, H, W, 3) of one size side by side, enlarged where they are small: uint8 frames (T, H, W', 3) with even sides."""
    first, *others = (enlarged(pane) for pane in panes)
    gap = torch.full((*first.shape[:2], GUTTER, 3), WHITE, dtype=torch.uint8)
    return _even(torch.cat([first, *(part for pane in others for part in (gap, pane))], 2)).numpy()


def enlarged(frames_THWC: Tensor, rows: int = PANE) -> Tensor:
    """The frames by the least whole factor that makes them `rows` high, sides even."""
    scale = max(1, -(-rows // frames_THWC.shape[1]))
    return _even(frames_THWC.repeat_interleave(scale, 1).repeat_interleave(scale, 2))


def contact_sheet(videos: Sequence[Tensor]) -> NDArray[np.uint8]:
    """A row for each video (T, H, W, 3): at most SHEET_FRAMES of its frames, evenly spaced, the first and the last among them."""
    rows = []
    for frames_THWC in videos:
        count = min(SHEET_FRAMES, len(frames_THWC))
        chosen = enlarged(frames_THWC[torch.linspace(0, len(frames_THWC) - 1, count).round().long()], SHEET_PANE)
        rows.append(functional.pad(chosen, (0, 0, 0, GUTTER, 0, GUTTER), value=WHITE).permute(1, 0, 2, 3).flatten(1, 2))
    return torch.cat(rows).numpy()


def png(image_HWC: NDArray[np.uint8]) -> bytes:
    """One picture as PNG."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = image_HWC.shape[:2]
    codec.pix_fmt = "rgb24"
    codec.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
    return b"".join(bytes(packet) for packet in (*codec.encode(frame), *codec.encode(None)))


def mp4(frames_THWC: NDArray[np.uint8], fps: float) -> bytes:
    """The frames as a file of `mp4_writer`."""
    target = io.BytesIO()
    with mp4_writer(target, fps) as write:
        write(frames_THWC)
    return target.getvalue()


@contextmanager
def mp4_writer(file: BinaryIO, fps: float) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """A function that writes the next frames (T, H, W, 3) of a video to `file` as H.264 (yuv420p); the file is whole after the block."""
    with av.open(file, "w", format="mp4") as box:
        # With macroblock trees or adaptive quantisation x264 now and then gives other bytes for the same frames, even on one thread.
        options = {"crf": CRF, "threads": "1", "x264-params": "mbtree=0:aq-mode=0"}
        stream = box.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.pix_fmt = "yuv420p"

        def write(frames_THWC: NDArray[np.uint8]) -> None:
            if not stream.codec_context.is_open:
                stream.height, stream.width = frames_THWC.shape[1:3]
            for frame in frames_THWC:
                box.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))

        yield write
        box.mux(stream.encode())


def _even(frames_THWC: Tensor) -> Tensor:
    """Without the last row or column where their number is odd: yuv420p has none."""
    rows, columns = frames_THWC.shape[1] // 2 * 2, frames_THWC.shape[2] // 2 * 2
    return frames_THWC[:, :rows, :columns]


def pixels(video_CTHW: Tensor) -> Tensor:
    """[-1, 1] to uint8 (T, H, W, 3)."""
    return ((video_CTHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def _heat(error_THW: Tensor) -> Tensor:
    """Errors as colours, uint8 (T, H, W, 3), linear between the colours of `HEAT`."""
    place = (error_THW / ERROR_SCALE).clamp(0, 1) * (len(HEAT) - 1)
    low = place.floor().long().clamp(max=len(HEAT) - 2)
    part = (place - low)[..., None]
    return (HEAT[low] * (1 - part) + HEAT[low + 1] * part).round().to(torch.uint8)
