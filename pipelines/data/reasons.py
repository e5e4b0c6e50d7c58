"""Why a video or clip did not come through: `Reason` codes and `BadVideo`, the error that carries one.

Quarantine reasons say that something is broken; filter reasons say that a sound video is not wanted. Both stand in the clip index
and in summaries, so a code never changes its meaning. Position is in seconds of the video, in bytes for a damaged shard.
"""

from enum import StrEnum

from kinetok.infra.errors import DataError


class Reason(StrEnum):
    """Reason codes; `.doc` is the line printed beside a count."""

    doc: str

    def __new__(cls, code: str, doc: str) -> "Reason":
        member = str.__new__(cls, code)
        member._value_ = code
        member.doc = doc
        return member

    UNREADABLE = "unreadable", "no container that FFmpeg can open (empty, text, index lost, unknown or forbidden format)"
    NO_VIDEO_STREAM = "no_video_stream", "opens, but holds no video stream with a known decoder"
    NO_FRAMES = "no_frames", "has a video stream of which not one frame can be decoded"
    CORRUPT = "corrupt", "decoding fails, or frames come out damaged (truncated, overwritten, encrypted)"
    TOO_LARGE = "too_large", "more bytes, pixels or decoding work than the limits allow"
    TOO_LONG = "too_long", "longer than the limits allow, declared or real"
    ENDS_EARLY = "ends_early", "shorter than the window asked for: the source changed or no longer decodes as it did"
    MISSING_FILE = "missing_file", "named in the CSV, but not in the folder"
    DUPLICATE = "duplicate", "a second video of the same name in one shard"
    UNSAFE_MEMBER = "unsafe_member", "tar member that is a link, a device or named outside the archive"
    DAMAGED_SHARD = "damaged_shard", "the tar is broken from this byte on: videos behind it are lost"
    TIMED_OUT = "timed_out", "decoding does not end within the seconds that one video has"
    CRASHED = "crashed", "kills the process that decodes it (a fault of the codec, or memory without bound)"
    MODEL_FAILED = "model_failed", "decodes, but the model could not process it (non-finite output)"

    NO_VIDEO = "no_video", "sample of a tar with captions but no video"
    TOO_SHORT = "too_short", "shorter than one window, or than the filter allows"
    DURATION = "duration", "longer than the filter allows"
    SMALL = "small", "shorter side below the filter's number of pixels"
    ASPECT = "aspect", "longer side too many times the shorter"
    STATIC = "static", "nothing moves"
    DARK = "dark", "black or nearly so"
    FLAT = "flat", "frames of a single colour"


MEANINGS = {str(reason): reason.doc for reason in Reason}
"""By code, as tables hold it."""


class BadVideo(DataError):
    """A video that cannot be used: `reason`, `message`, and `position` where the trouble begins (None: as a whole)."""

    def __init__(self, reason: Reason, message: str, position: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.position = position

    def __reduce__(self) -> tuple[type["BadVideo"], tuple[Reason, str, float | None]]:
        return type(self), (self.reason, self.message, self.position)
