"""Right frames at right times: against a slow decoder that follows the definition, on made and on real videos; limits and odd bytes."""

import csv
import io
import resource
import struct
import subprocess
import sys
from fractions import Fraction
from itertools import count
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.pipelines.data.videos import PICTURES, encode, moving, number_of, numbered, picture

from kinetok.pipelines.data.decode import TOLERANCE, Limits, Pixels, VideoReader, decode_clip, decode_clips, measure, probe, read_video
from kinetok.pipelines.data.reasons import BadVideo, Reason

EMBEDDED = Path(__file__).parents[3] / "pipelines" / "data" / "embedded" / "clips"


def _numbers(data: bytes, fps: float, **limits: float) -> list[int]:
    with VideoReader(data, Limits(**limits)) as video:  # type: ignore[arg-type]
        return [number_of(pixels) for pixels in video.frames_at((k / fps for k in count()), height=48, width=64)]


def _on_screen(times: list[Fraction], end: Fraction, fps: int) -> list[int]:
    """By definition: the last frame whose time is not after k / fps (plus tolerance), for every k / fps before the end."""
    first, tolerance = times[0], Fraction(TOLERANCE)
    wanted = [Fraction(k, fps) + tolerance for k in range(1000) if Fraction(k, fps) + tolerance < end - first]
    return [max(i for i, time in enumerate(times) if time - first <= at) for at in wanted]


@pytest.mark.parametrize("fps", [4, 8, 24, 30, 60])
@pytest.mark.parametrize("rate", [8, 24, 25, Fraction(30000, 1001), 60])
def test_constant_rate(rate: Fraction | int, fps: int) -> None:
    data = encode([numbered(i) for i in range(40)], rate=rate)
    times = [i / Fraction(rate) for i in range(40)]
    assert _numbers(data, fps) == _on_screen(times, 40 / Fraction(rate), fps)


@pytest.mark.parametrize(
    ("rate", "later"),
    [
        (8, ()),
        (24, ()),
        (25, ()),
        (30, ()),
        (60, ()),
        (Fraction(24000, 1001), range(1, 9)),
        (Fraction(30000, 1001), (4, 8)),
        (Fraction(60000, 1001), (2, 4, 6, 8)),
    ],
)
def test_a_window_is_divots_but_for_frames_that_begin_within_the_tolerance(rate: Fraction | int, later: tuple[int, ...]) -> None:
    """Divot counts: frame int(k * rate / 8). At NTSC's rates that is the frame before the one that begins 0.1 to 1 ms after k / 8 s."""
    data = encode([numbered(i) for i in range(int(rate * 2) + 1)], rate=rate)
    clip = decode_clip(data, start=0, fps=8, frames=16, height=48, width=64)
    counted = [int(k * float(rate) / 8) for k in range(16)]
    assert [number_of(pixels) for pixels in clip] == [frame + (k in later) for k, frame in enumerate(counted)]
    assert all(0 < (counted[k] + 1) / rate - Fraction(k, 8) < TOLERANCE for k in later)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mov"])
def test_variable_rate(container: str) -> None:
    gaps = np.random.default_rng(3).integers(10, 400, 59)
    times = [Fraction(int(at), 1000) for at in np.cumsum([0, *gaps])]
    data = encode([numbered(i) for i in range(60)], times=times, container=container)
    shown = _numbers(data, 8)
    expected = _on_screen(times, times[-1], 8)
    assert shown[: len(expected)] == expected
    assert set(shown[len(expected) :]) <= {59}


@pytest.mark.parametrize("fps", [1, 7.5, 8, 30, 240])
@pytest.mark.parametrize("frames", [1, 31, 40])
def test_a_length_says_how_many_frames_there_are(frames: int, fps: float) -> None:
    data = encode([numbered(i) for i in range(frames)], rate=Fraction(30000, 1001))
    length = measure(data)
    assert length.frames == frames and length.seconds == pytest.approx(frames * 1001 / 30000, abs=1e-3)
    assert length.at(fps) == len(_numbers(data, fps))


@pytest.mark.parametrize("extension", PICTURES)
def test_a_picture_is_a_video_of_one_frame(extension: str) -> None:
    data = picture(numbered(0x35), extension)
    assert measure(data).frames == 1 and _numbers(data, 8) == [0x35]
    assert (probe(data).width, probe(data).height) == (64, 48)
    for broken in (data[:20], data[: len(data) // 3]):
        with pytest.raises(BadVideo):
            decode_clip(broken, start=0, fps=8, frames=1, height=48, width=64)
    with pytest.raises(BadVideo) as found:
        decode_clip(data, start=0, fps=8, frames=2, height=48, width=64)
    assert found.value.reason is Reason.ENDS_EARLY
    with pytest.raises(BadVideo), VideoReader(data, Limits(pixels=48 * 63)):
        pass


def test_times_count_from_the_first_frame() -> None:
    times = [10 + Fraction(i, 10) for i in range(20)]
    assert _numbers(encode([numbered(i) for i in range(20)], times=times), 10) == list(range(20))


def test_without_timestamps_frames_are_counted() -> None:
    data = encode([numbered(i) for i in range(30)], rate=25, container="h264")
    assert _numbers(data, 25) == list(range(30))
    assert _numbers(data, 5) == list(range(0, 30, 5))


def test_gif() -> None:
    data = encode([numbered(i) for i in range(12)], rate=10, container="gif", codec="gif", pix_fmt="rgb8")
    with VideoReader(data) as video:
        found = list(video.frames_at((k / 10 for k in range(12)), height=48, width=64))
    assert len(found) == 12
    assert all(found[i].mean() != found[i + 1].mean() for i in range(11))


def test_windows_in_one_pass_equal_windows_alone() -> None:
    data = encode([numbered(i) for i in range(60)], rate=Fraction(30000, 1001))
    starts = [0.0, 0.25, 0.25, 1.1]
    together = list(decode_clips(data, starts=starts, fps=8, frames=5, height=24, width=32))
    for start, clip in zip(starts, together, strict=True):
        assert clip.shape == (5, 24, 32, 3) and clip.dtype == np.uint8
        assert np.array_equal(clip, decode_clip(data, start=start, fps=8, frames=5, height=24, width=32))


def test_a_window_past_the_end_is_refused() -> None:
    data = encode([numbered(i) for i in range(20)], rate=10)
    assert decode_clip(data, start=1.0, fps=10, frames=10, height=8, width=8).shape[0] == 10
    with pytest.raises(BadVideo, match=r"ends before 2\.000 s") as caught:
        decode_clip(data, start=1.1, fps=10, frames=10, height=8, width=8)
    assert caught.value.reason is Reason.ENDS_EARLY


def _exactly(path: Path, fps: int, size: int) -> list[Pixels]:
    """Slow and plain: every frame decoded and scaled by a context of its own, picked by timestamp as the definition says."""
    with av.open(path) as box:
        frames = list(box.decode(video=0))
    first = frames[0].pts * frames[0].time_base
    times = [float(frame.pts * frame.time_base - first) for frame in frames]
    end = times[-1] + float(frames[-1].duration * frames[-1].time_base)
    found = []
    for k in range(10_000):
        if k / fps + TOLERANCE >= end:
            break
        frame = frames[max(i for i, time in enumerate(times) if time <= k / fps + TOLERANCE)]
        scale = max(size / frame.height, size / frame.width)
        tall, wide = max(size, round(frame.height * scale)), max(size, round(frame.width * scale))
        picture = frame.reformat(width=wide, height=tall, format="rgb24", interpolation="AREA").to_ndarray()
        found.append(picture[(tall - size) // 2 :][:size, (wide - size) // 2 :][:, :size])
    return found


@pytest.mark.parametrize("path", sorted(EMBEDDED.glob("*.mp4"))[::5], ids=lambda path: path.stem)
def test_real_clips_against_the_exact_decoder(path: Path) -> None:
    expected = _exactly(path, 8, 64)
    with VideoReader(path) as video:
        found = list(video.frames_at((k / 8 for k in count()), height=64, width=64))
    assert len(found) == len(expected) > 16
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def _corners(pixels: NDArray[np.uint8]) -> list[int]:
    """Mean brightness near the four corners: top left, top right, bottom left, bottom right."""
    height, width = pixels.shape[:2]
    parts = (pixels[: height // 3, : width // 3], pixels[: height // 3, -width // 3 :], pixels[-height // 3 :, : width // 3])
    return [round(float(part.mean())) for part in (*parts, pixels[-height // 3 :, -width // 3 :])]


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_is_applied(rotation: int) -> None:
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48], upright[:32, 48:], upright[32:, :48] = 240, 160, 80
    stored = np.rot90(upright, -rotation // 90).copy()
    data = encode([stored] * 4, rotation=rotation)
    clip = decode_clip(data, start=0, fps=30, frames=1, height=64, width=96)
    assert _corners(clip[0]) == pytest.approx(_corners(upright), abs=6)
    info = probe(data)
    assert (info.width, info.height) == (96, 64)


def test_pixel_aspect_is_applied() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 16:48] = 255
    data = encode([picture] * 4, pixel_aspect=Fraction(2))
    assert (probe(data).width, probe(data).height) == (128, 64)
    # Shown 128 wide, cropped to the middle 64: all of it white.
    assert decode_clip(data, start=0, fps=30, frames=1, height=64, width=64)[0][:, 4:-4].mean() > 245


def test_shrinking_averages_all_pixels() -> None:
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    data = encode([checks] * 2, codec="ffv1", container="matroska", pix_fmt="bgr0")
    clip = decode_clip(data, start=0, fps=30, frames=1, height=32, width=32)
    assert clip.std() < 2 and 120 < clip.mean() < 136


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p", "yuvj420p"])
def test_other_pixel_formats(pix_fmt: str) -> None:
    assert _numbers(encode([numbered(i) for i in range(20)], rate=10, pix_fmt=pix_fmt), 10) == list(range(20))


def test_a_pixel_format_that_cannot_be_converted_is_a_bad_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="nut") as container:
        stream = container.add_stream("rawvideo", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb4"
        container.mux(stream.encode(av.VideoFrame(64, 64, "rgb4")))
        container.mux(stream.encode())
    with pytest.raises(BadVideo, match="rgb4"):
        decode_clip(file.getvalue(), start=0, fps=8, frames=1, height=32, width=32)


def test_odd_sizes() -> None:
    data = encode([numbered(i, 49, 63) for i in range(4)], pix_fmt="yuv444p")
    assert decode_clip(data, start=0, fps=30, frames=2, height=17, width=23).shape == (2, 17, 23, 3)


def test_frames_do_not_share_memory_with_later_ones() -> None:
    data = encode([numbered(i) for i in range(20)], rate=10)
    with VideoReader(data) as video:
        kept = list(video.frames_at((k / 10 for k in count()), height=48, width=64))
    assert [number_of(pixels) for pixels in kept] == list(range(20))


def test_read_video_gives_what_tokenizers_take(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(encode([numbered(i) for i in range(20)], rate=10))
    video = read_video(path, fps=5, size=32)
    assert video.shape == (1, 3, 10, 32, 32) and video.is_contiguous()
    clip = decode_clip(path, start=0, fps=5, frames=10, height=32, width=32)
    assert np.allclose(video[0].permute(1, 2, 3, 0).numpy(), clip / 127.5 - 1, atol=1e-6)
    assert read_video(path, fps=5, height=16, width=32, frames=3, start=0.4).shape == (1, 3, 3, 16, 32)
    with pytest.raises(BadVideo, match="11 are needed"):
        read_video(path, fps=5, size=32, frames=11)
    with pytest.raises(ValueError, match="size="):
        read_video(path, fps=5)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"bytes": 100}, Reason.TOO_LARGE),
        ({"seconds": 0.5}, Reason.TOO_LONG),
        ({"pixels": 1000}, Reason.TOO_LARGE),
        ({"work": 10 * 10_000}, Reason.TOO_LARGE),
        ({"aspect": 1.2}, Reason.TOO_LARGE),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_limits(limits: dict[str, float], reason: Reason, container: str) -> None:
    data = encode([numbered(i) for i in range(20)], rate=10, container=container)
    with pytest.raises(BadVideo) as caught:
        _numbers(data, 10, **limits)
    assert caught.value.reason is reason


@pytest.mark.parametrize("boxes", [("stsz",), ("stts",), ("stsz", "stts", "stsc")])
def test_a_billion_claimed_frames_take_no_memory(boxes: tuple[str, ...]) -> None:
    data = bytearray(encode([numbered(i) for i in range(4)], rate=10))
    for box, place in (("stsz", 12), ("stts", 12), ("stsc", 16)):
        if box in boxes:
            at = data.index(box.encode())
            data[at + place : at + place + 4] = struct.pack(">I", 10**9)
    if "stsz" in boxes:
        at = data.index(b"stsz")
        data[at + 8 : at + 12] = struct.pack(">I", 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadVideo) as caught:
        _numbers(bytes(data), 10)
    assert caught.value.reason in (Reason.TOO_LARGE, Reason.NO_FRAMES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_fragments_that_claim_more_samples_than_there_are_take_no_memory(tmp_path: Path) -> None:
    run = struct.pack(">I4sII", 16, b"trun", 0, 50_000_000)
    fragment = struct.pack(">I4sII", 16, b"tfhd", 0, 1) + 20 * run
    track = struct.pack(">I4s", len(fragment) + 8, b"traf") + fragment
    data = encode([numbered(i) for i in range(4)], rate=10) + struct.pack(">I4s", len(track) + 8, b"moof") + track
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "claims.mp4").write_bytes(data)
    for source in (data, tmp_path / "claims.mp4"):
        with pytest.raises(BadVideo, match="1000000000 samples"):
            probe(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_more_streams_than_a_video_has_are_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as box:
        for _ in range(150):
            stream = box.add_stream("rawvideo", rate=1)
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p"
        box.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
    with pytest.raises(BadVideo) as caught:
        probe(file.getvalue())
    assert caught.value.reason in (Reason.UNREADABLE, Reason.NO_FRAMES)


def test_a_time_far_ahead_is_not_filled_with_frames() -> None:
    data = encode([numbered(0), numbered(1)], times=[Fraction(0), Fraction(20_000)], container="matroska")
    with pytest.raises(BadVideo) as caught:
        _numbers(data, 8)
    assert caught.value.reason is Reason.TOO_LONG


def test_a_playlist_may_not_name_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.ts").write_bytes(encode([numbered(1)] * 5, container="mpegts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"
    concat = "ffconcat version 1.0\nfile secret.ts\n"
    # FFmpeg itself would follow this one.
    with av.open(io.BytesIO(concat.encode())) as box:
        assert sum(1 for _ in box.decode(video=0)) == 5
    for text in (playlist, concat):
        with pytest.raises(BadVideo) as caught:
            probe(text.encode())
        assert caught.value.reason is Reason.UNREADABLE


def test_damage_inside_is_reported_with_its_place() -> None:
    data = bytearray(encode([picture for _ in range(4) for picture in moving(24)], rate=24))
    start = data.index(b"mdat")
    middle = start + (len(data) - start) // 2
    data[middle:-2000] = b"\0" * (len(data) - middle - 2000)
    with pytest.raises(BadVideo) as caught:
        _numbers(bytes(data), 8)
    assert caught.value.reason is Reason.CORRUPT
    assert caught.value.position is not None and 0.5 < caught.value.position < 4


def test_bad_video_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadVideo(Reason.CORRUPT, "text", 1.5)))
    assert (error.reason, error.message, error.position) == (Reason.CORRUPT, "text", 1.5)


BROKEN = {
    "unreadable": "zero_length.webm lfs_pointer.mp4 text_as_mp4.mp4 header_only.flv broken_no_moov.mp4 chunk_out_of_range.mp4 "
    "malformed_free_box.mp4 no_streams.webm encrypted_clearkey_fragmented.mp4 one_frame_theora.ogv made_truncated_moov_lost_60pct.mp4 "
    "made_html_named_mp4.mp4",
    "no_video_stream": "truncated_atom.mp4 audio_only.mp4 audio_only_opus.mp4 dolby_vision_av1_4k.mp4",
    "no_frames": "zero_empty_stsc.mp4 invalid_userdata.mp4 nonfragment_header_only.mp4 fuzz_case_1185230.mp4 invalid_bitstream.webm "
    "init_segment_only.mp4 encrypted_cenc.mp4 declared_500_frames_none_there.mov truncated_data_missing.mp4",
    "corrupt": "corrupted_packets.mp4 no_timescale.mp4 invalid_nal_units.mp4 size_changes_mid_stream.264 encrypted_cbcs_decodes_grey.mp4 "
    "made_truncated_faststart_60pct.mp4 made_second_half_zeroed.mp4",
    "too_large": "long_4k_av1_still.mp4",
}
"""What becomes of the bad files of the odd set; every other one decodes to its end."""

_DECODE_ALL = """
import sys
from itertools import count
from kinetok.pipelines.data.decode import VideoReader
from kinetok.pipelines.data.reasons import BadVideo
for path in sys.stdin.read().splitlines():
    try:
        with VideoReader(path) as video:
            print("frames", sum(1 for _ in video.frames_at((k / 8 for k in count()), height=32, width=32)), flush=True)
    except BadVideo as error:
        print(error.reason, error.message.replace(chr(10), " "), flush=True)
"""


def test_every_odd_file_decodes_or_gets_its_reason(shared_data: Path) -> None:
    """In one process of its own: a crash or hang there must not take the test run along."""
    with open(shared_data / "odd.csv", newline="") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    paths = "\n".join(str(shared_data / "odd" / name) for name in names)
    done = subprocess.run([sys.executable, "-c", _DECODE_ALL], input=paths, capture_output=True, text=True, timeout=120, check=True)
    outcomes = dict(zip(names, done.stdout.splitlines(), strict=True))
    expected = {name: reason for reason, files in BROKEN.items() for name in files.split()}
    assert {name: line.split()[0] for name, line in outcomes.items() if not line.startswith("frames")} == expected
    assert all(int(line.split()[1]) > 0 for line in outcomes.values() if line.startswith("frames"))


def test_metadata_that_is_not_utf8_is_no_obstacle() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as box:
        box.metadata["title"] = "caf\u00e9 title"
        stream = box.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        box.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(3), format="rgb24")))
        box.mux(stream.encode())
    data = file.getvalue().replace("caf\u00e9".encode(), b"caf\xe9\xe9")
    assert probe(data).width == 64
