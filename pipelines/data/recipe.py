"""`CutRecipe` and `IndexRecipe`: what the windows of a source and their index depend on, with `Filters`.

Apart from `cut.py`, so that a plan does not load PyAV.
"""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StrictInt

from kinetok.infra.config import Config
from kinetok.pipelines.data.reasons import Reason

if TYPE_CHECKING:
    from kinetok.pipelines.data.decode import VideoInfo

Count = Annotated[StrictInt, Field(ge=1)]
Grey = Annotated[float, Field(ge=0, le=255)]


class Filters(Config):
    """Which sound videos and windows are wanted; each bound that a sample breaks has a reason of its own."""

    min_seconds: Annotated[float, Field(ge=0)] = 0.0
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Of the video, declared or as far as it was decoded."""
    min_side: Count = 32
    """Pixels of the shorter side of the source."""
    max_aspect: Annotated[float, Field(ge=1)] = 4.0
    """Longer over shorter side of the source."""
    min_motion: Grey = 0.1
    """Mean change between sampled frames, in grey levels of 255: below it a window is static. Windows of one frame are let pass."""
    min_luma: Grey = 3.0
    """Mean brightness: below it a window is dark."""
    min_contrast: Grey = 2.0
    """Mean spread of brightness inside a frame: below it a window is flat."""

    def of_video(self, info: "VideoInfo") -> tuple[Reason, str] | None:
        short, long = sorted((info.width, info.height))
        if short < self.min_side:
            return Reason.SMALL, f"{info.width}x{info.height} pixels, the shorter side must have {self.min_side}"
        if long > self.max_aspect * short:
            return Reason.ASPECT, f"{info.width}x{info.height} pixels, at most {self.max_aspect:g}:1 is wanted"
        if self.max_seconds is not None and (info.seconds or 0.0) > self.max_seconds:
            return Reason.DURATION, f"{info.seconds:.1f} s, at most {self.max_seconds:g} s are wanted"
        return None

    def of_window(self, motion: float, luma_mean: float, luma_std: float, *, still: bool) -> tuple[Reason, str] | None:
        """Why a window is not wanted; in a `still` one, which has one frame, nothing can move."""
        if luma_mean < self.min_luma:
            return Reason.DARK, f"mean brightness {luma_mean:.2f}, at least {self.min_luma:g} is wanted"
        if luma_std < self.min_contrast:
            return Reason.FLAT, f"contrast {luma_std:.2f}, at least {self.min_contrast:g} is wanted"
        if motion < self.min_motion and not still:
            return Reason.STATIC, f"motion {motion:.3f}, at least {self.min_motion:g} is wanted"
        return None


class CutRecipe(Config):
    """Everything that the windows of a source depend on."""

    fps: Annotated[float, Field(gt=0, le=240)]
    frames: Count
    stride: Count | None = None
    """Frames from one window to the next; None: `frames`, so that windows touch and do not overlap."""
    height: Count
    width: Count
    max_clips_per_video: Count | None = None
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of groups in the split `val`, by hash of the group; a split given by the source goes first."""
    filters: Filters = Filters()


class IndexRecipe(CutRecipe):
    """A `CutRecipe` with what the index as a whole depends on."""

    shard_clips: Count = 64
    """Clips of one output shard of every later stage."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of rows that may be quarantined; more of them fail the stage."""
