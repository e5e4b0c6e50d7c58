"""Video bytes to pixels at a chosen frame rate and size, with PyAV: `VideoReader`, `decode_clip(s)`, `read_video`, `probe`,
`measure`.

Time 0 is when the first frame appears; the frame at time t is the one on screen then: the last whose timestamp is not after t
(give or take `TOLERANCE`). A timestamp that is missing, or not later than the one before, counts as one frame period later, so
streams without timestamps are sampled by index. Frames are resized to cover the target, pixel aspect and rotation applied, then
cropped at the centre; one reused scaler and one thread are the fastest way on small videos. Input comes from strangers: `Limits`
bound the work, and only demuxers that read nothing but these bytes are allowed (a playlist could name other files). FFmpeg's
logging stays untouched: setting a level can deadlock with its threads. Not covered: seeking (slower than decoding everything on
clips of a minute), tone mapping of HDR, de-interlacing, transparency (dropped), sound.
"""

import io
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Self

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from kinetok.pipelines.data.reasons import BadVideo, Reason

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.uint8]
Source = bytes | str | Path

TOLERANCE = 1.03e-3
"""Seconds by which a frame may come after the time it is taken for: Matroska rounds to milliseconds. Odd, so that nothing ties with it."""

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,flv,live_flv,mpegts,mpeg,mpegvideo,m4v,ogg,asf,h264,hevc,h263,av1,obu,ivf,"
    "apng,mxf,nut,rm,dv,yuv4mpegpipe,png_pipe,jpeg_pipe,webp_pipe"
)
"""Demuxers that read one stream of bytes and open nothing else."""


_RUN = re.compile(rb"(....)trun....(....)", re.DOTALL)
"""A run of samples in a fragment of an mp4: the length of the box, and how many samples it claims."""


@dataclass(frozen=True)
class Limits:
    """What one video may cost; beyond it the video is refused."""

    bytes: int = 1 << 30
    seconds: float = 4 * 3600.0
    pixels: int = 36_000_000
    """Of one frame: 8K passes."""
    work: int = 50_000_000_000
    """Pixels decoded in total: about 13 minutes of 1080p at 30 fps, one or two minutes of one core. A frame counts at least 10,000."""
    streams: int = 100
    aspect: float = 16.0
    """Longer over shorter side, as displayed: resizing to cover the target would otherwise take memory without bound."""


LIMITS = Limits()


@dataclass(frozen=True)
class VideoInfo:
    """What a container declares and its first frame shows; the size is as displayed (rotation and pixel aspect applied)."""

    width: int
    height: int
    fps: float
    """Mean rate; a guess where nothing is declared."""
    seconds: float | None
    """None where no duration is declared; a declared one may be wrong."""
    codec: str


class Length(NamedTuple):
    """How long a video is, by its frames and not by what it declares."""

    frames: int
    """Of the source; a picture has one."""
    seconds: float
    """Until the last one leaves the screen."""

    def at(self, fps: float) -> int:
        """How many frames `frames_at` gives at `fps` a second."""
        return max(0, ceil((self.seconds - TOLERANCE) * fps))


class VideoReader:
    """One opened video, to be read once, from its beginning; a context manager. Bad bytes raise BadVideo and nothing else."""

    def __init__(self, data: Source, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._file: BinaryIO = io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb")  # noqa: SIM115 (closed by close())
        self._container: InputContainer | None = None
        try:
            self._container = _open(self._file, limits)
            self._stream = _video_stream(self._container, limits)
            self._rate = _rate(self._stream)
            self._pixel_aspect = _pixel_aspect(self._stream)
            self._frames = self._timed_frames(self._container)
            self._first = next(self._frames, None)
            if self._first is None:
                raise BadVideo(Reason.NO_FRAMES, "has a video stream, but not one frame can be decoded")
            self.info = self._describe(self._container, self._first[1])
        except BadVideo:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._file.close()

    def frames_at(self, times: Iterable[float], *, height: int, width: int) -> Iterator[Pixels]:
        """The frame on screen at each of `times` (seconds, ascending, may be endless), uint8 (height, width, 3); ends with the video.

        A frame that serves several times is one and the same array. Raises BadVideo where decoding fails on the way.
        """
        scaler = Scaler(height, width, self._pixel_aspect)
        waiting = iter(times)
        wanted = next(waiting, None)
        for frame, until in self._spans():
            pixels: Pixels | None = None
            while wanted is not None and wanted + TOLERANCE < until:
                pixels = _scaled(scaler, frame) if pixels is None else pixels
                yield pixels
                wanted = next(waiting, None)
            if wanted is None:
                return

    def length(self) -> Length:
        """Decodes every frame, and scales none. Raises BadVideo where decoding fails on the way."""
        ends = [end for _, end in self._spans()]
        return Length(len(ends), ends[-1])

    def _spans(self) -> Iterator[tuple[VideoFrame, float]]:
        """Each frame with the time when it leaves the screen."""
        assert self._first is not None, "a VideoReader is read once"
        (begin, frame), self._first = self._first, None
        for next_begin, next_frame in self._frames:
            yield frame, next_begin
            begin, frame = next_begin, next_frame
        end = begin + (float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 1 / self._rate)
        self._check_time(end)
        yield frame, end

    def _timed_frames(self, container: InputContainer) -> Iterator[tuple[float, VideoFrame]]:
        """Every frame with its time, strictly increasing from 0; checks the limits on the way."""
        period = 1 / self._rate
        first, previous, work = None, -period, 0
        for frame in self._decoded(container):
            stamp = frame.time
            if first is None:
                first = stamp or 0.0
            time = previous if stamp is None else stamp - first
            if time <= previous:
                time = previous + period
            work += _cost(frame.width, frame.height)
            self._check(frame, time, work)
            yield time, frame
            previous = time

    def _decoded(self, container: InputContainer) -> Iterator[VideoFrame]:
        frames = container.decode(self._stream)
        done = 0
        while True:
            try:
                frame = next(frames, None)
            except av.FFmpegError as error:
                reason = Reason.CORRUPT if done else Reason.NO_FRAMES
                raise BadVideo(reason, f"decoding fails after {done} frames: {error.strerror}", done / self._rate) from error
            if frame is None:
                return
            done += 1
            yield frame

    def _check(self, frame: VideoFrame, time: float, work: int) -> None:
        """Refuse a damaged frame, and a video that goes beyond its limits with this frame."""
        limits, width, height = self._limits, frame.width, frame.height
        if frame.is_corrupt:
            raise BadVideo(Reason.CORRUPT, f"the frame at {time:.3f} s is damaged (lost references or encrypted)", time)
        self._check_time(time)
        _check_size(width, height, limits)
        if work > limits.work:
            raise BadVideo(Reason.TOO_LARGE, f"more frames of {width}x{height} pixels than may be decoded", time)
        shown = width * self._pixel_aspect
        if shown > limits.aspect * height or height > limits.aspect * shown:
            raise BadVideo(Reason.TOO_LARGE, f"{width}x{height} pixels: one side over {limits.aspect:g} times the other", time)

    def _check_time(self, time: float) -> None:
        if time > self._limits.seconds:
            raise BadVideo(Reason.TOO_LONG, f"runs to {time:.0f} s; the limit is {self._limits.seconds:.0f} s", time)

    def _describe(self, container: InputContainer, frame: VideoFrame) -> VideoInfo:
        height, width = frame.height, round(frame.width * self._pixel_aspect)
        if _quarter_turns(frame) % 2:
            height, width = width, height
        return VideoInfo(width, height, self._rate, _declared_seconds(container, self._stream), self._stream.codec_context.name)


class Scaler:
    """Frames of one video to uint8 (height, width, 3) RGB: resized to cover, cropped at the centre, turned upright.

    One instance keeps one swscale context: a new one per frame costs two to four times the decoding.
    """

    def __init__(self, height: int, width: int, pixel_aspect: float = 1.0) -> None:
        self.height = height
        self.width = width
        self.pixel_aspect = pixel_aspect
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> Pixels:
        turns = _quarter_turns(frame)
        height, width = (self.width, self.height) if turns % 2 else (self.height, self.width)
        shown_width = frame.width * self.pixel_aspect
        scale = max(height / frame.height, width / shown_width)
        tall, wide = max(height, round(frame.height * scale)), max(width, round(shown_width * scale))
        # AREA averages all pixels it merges (no aliasing); it has nothing to average when enlarging.
        method = "AREA" if scale < 1 else "BICUBIC"
        resized = self._reformatter.reformat(frame, width=wide, height=tall, format="rgb24", interpolation=method, threads=1)
        top, left = (tall - height) // 2, (wide - width) // 2
        # to_ndarray may be a view on the frame's padded rows: copied, because the scaler's next frame may reuse them.
        crop = np.asarray(resized.to_ndarray(), np.uint8)[top : top + height, left : left + width]
        return np.rot90(crop, turns).copy()


def _scaled(scaler: Scaler, frame: VideoFrame) -> Pixels:
    try:
        return scaler(frame)
    except av.FFmpegError as error:
        # Some of these are OSErrors, which would be taken for a lost source or a full disk.
        raise BadVideo(Reason.CORRUPT, f"frames of the format {frame.format.name} cannot be converted: {error.strerror}") from error


def probe(data: Source, limits: Limits = LIMITS) -> VideoInfo:
    """Size, rate and declared duration; decodes one frame. Raises BadVideo."""
    with VideoReader(data, limits) as video:
        return video.info


def measure(data: Source) -> Length:
    """How long a video is; decodes all of it. Raises BadVideo."""
    with VideoReader(data) as video:
        return video.length()


def decode_clips(data: Source, *, starts: Sequence[float], fps: float, frames: int, height: int, width: int) -> Iterator[Pixels]:
    """The windows of `frames` frames beginning at `starts` (ascending seconds), uint8 (frames, height, width, 3), in one pass.

    Raises BadVideo: ENDS_EARLY where the video ends inside a window, else whatever is wrong with the bytes.
    """
    targets = sorted((start + k / fps, window, k) for window, start in enumerate(starts) for k in range(frames))
    clips: dict[int, Pixels] = {}
    done = 0
    with VideoReader(data) as video:
        for pixels in video.frames_at((time for time, _, _ in targets), height=height, width=width):
            _, window, k = targets[done]
            if k == 0:
                clips[window] = np.empty((frames, height, width, 3), np.uint8)
            clips[window][k] = pixels
            done += 1
            if k == frames - 1:
                yield clips.pop(window)
    if done < len(targets):
        raise BadVideo(Reason.ENDS_EARLY, f"ends before {targets[done][0]:.3f} s", targets[done][0])


class Windows(NamedTuple):
    """Decoded windows of a video, and what kept the rest of them from being decoded."""

    clips: list[Pixels]
    error: BadVideo | None = None


def decode_windows(data: Source, starts: Sequence[float], *, fps: float, frames: int, height: int, width: int) -> Windows:
    """What `decode_clips` yields before it fails."""
    clips: list[Pixels] = []
    try:
        clips.extend(decode_clips(data, starts=starts, fps=fps, frames=frames, height=height, width=width))
    except BadVideo as error:
        return Windows(clips, error)
    return Windows(clips)


def decode_clip(data: Source, *, start: float, fps: float, frames: int, height: int, width: int) -> Pixels:
    """One window, uint8 (frames, height, width, 3): frame k is what is on screen at start + k / fps. Raises BadVideo."""
    return next(decode_clips(data, starts=[start], fps=fps, frames=frames, height=height, width=width))


def read_video(
    source: Source,
    *,
    fps: float,
    size: int | None = None,
    height: int | None = None,
    width: int | None = None,
    start: float = 0.0,
    frames: int | None = None,
) -> "Tensor":
    """A video as float tensor (1, 3, T, H, W) in [-1, 1], ready for `Tokenizer.encode`.

    Give `size` for a square, or `height` and `width`; `frames=None` reads to the end. Raises BadVideo.
    """
    if size is not None:
        height = width = size
    if height is None or width is None:
        raise ValueError("read_video needs size=, or both height= and width=")
    with VideoReader(source) as video:
        times = (start + k / fps for k in count())
        found = list(islice(video.frames_at(times, height=height, width=width), frames))
    if not found or (frames is not None and len(found) < frames):
        raise BadVideo(Reason.ENDS_EARLY, f"has {len(found)} frames from {start:g} s on at {fps:g} fps, {frames or 1} are needed", start)
    return as_tensor(found)


def as_tensor(frames: Sequence[Pixels]) -> "Tensor":
    """Decoded frames, one or more, as float tensor (1, 3, T, H, W) in [-1, 1]."""
    import torch

    pixels_TCHW = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return pixels_TCHW.float().div(127.5).sub(1).permute(1, 0, 2, 3)[None].contiguous()


def _open(file: BinaryIO, limits: Limits) -> InputContainer:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size > limits.bytes:
        raise BadVideo(Reason.TOO_LARGE, f"{size} bytes; the limit is {limits.bytes}")
    _check_fragments(file, size, limits)
    try:
        # Opening decodes a frame or two already. Metadata in another encoding than UTF-8 would raise UnicodeDecodeError.
        options = {"format_whitelist": FORMATS, "max_pixels": str(limits.pixels), "max_streams": str(limits.streams)}
        return av.open(file, "r", options=options, metadata_errors="ignore")
    except av.FFmpegError as error:
        raise BadVideo(Reason.UNREADABLE, f"cannot be opened: {error.strerror}") from error


def _check_fragments(file: BinaryIO, size: int, limits: Limits) -> None:
    """Refuse a fragmented mp4 that claims more samples than could be decoded: FFmpeg makes room for all of them, 24 bytes each."""
    if not size:
        return
    with file.getbuffer() if isinstance(file, io.BytesIO) else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        runs = ((int.from_bytes(found[1]), int.from_bytes(found[2])) for found in _RUN.finditer(data))
        claimed = sum(samples for length, samples in runs if length <= size)
    if claimed > 2 * limits.work // _cost(0, 0):
        raise BadVideo(Reason.TOO_LARGE, f"claims {claimed} samples in its fragments: more than may be decoded")


def _video_stream(container: InputContainer, limits: Limits) -> VideoStream:
    """The first video stream that is not a cover picture; checks what it declares."""
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise BadVideo(Reason.NO_VIDEO_STREAM, "holds no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise BadVideo(Reason.NO_VIDEO_STREAM, "its video stream has no known decoder")
    stream.thread_type = "SLICE"
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(limits.pixels)}
    _check_size(stream.codec_context.width, stream.codec_context.height, limits)
    seconds = _declared_seconds(container, stream)
    if seconds is not None and seconds > limits.seconds:
        raise BadVideo(Reason.TOO_LONG, f"declares {seconds:.0f} s; the limit is {limits.seconds:.0f} s")
    width, height = stream.codec_context.width, stream.codec_context.height
    if stream.frames * _cost(width, height) > limits.work:
        raise BadVideo(Reason.TOO_LARGE, f"declares {stream.frames} frames of {width}x{height} pixels: more than may be decoded")
    return stream


def _cost(width: int, height: int) -> int:
    """Work of decoding one frame, in pixels; even a tiny one takes a while."""
    return max(width * height, 10_000)


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise BadVideo(Reason.TOO_LARGE, f"{width}x{height} pixels; the limit is {limits.pixels} a frame")


def _rate(stream: VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return min(max(float(rate), 0.01), 1000.0) if rate else 25.0


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return float(Fraction(container.duration, av.time_base)) if container.duration else None


def _pixel_aspect(stream: VideoStream) -> float:
    """Width of a pixel over its height; 1 where it is unset or beyond belief."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 <= aspect <= 10 else 1.0


def _quarter_turns(frame: VideoFrame) -> int:
    """Counter-clockwise quarter turns that put the frame upright; damaged display matrices give nonsense, taken as none."""
    return round(frame.rotation / 90) % 4 if abs(frame.rotation) <= 360 else 0
