"""Videos of any length and size through tokenizers and back: equal to the whole video at once, whole files or none, plain errors."""

from collections.abc import Callable
from fractions import Fraction
from itertools import count, islice
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from click.testing import CliRunner
from tests.pipelines.data.videos import encode, moving, picture
from tests.tokenizers.causal.conftest import shake
from tests.tokenizers.divot.tiny import tiny_divot
from tests.tokenizers.pretrained.conftest import random_model
from torch import Tensor

from kinetok.infra.errors import ConfigError, DataError
from kinetok.pipelines.cli import main
from kinetok.pipelines.data.decode import read_video
from kinetok.pipelines.report.panel import beside, mp4, pixels
from kinetok.pipelines.round_trip import RoundTrip, Way, _Codec, round_trip
from kinetok.tokenizers.catalog import load
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.chunks import ChunkPlan, decode_chunks, encode_chunks
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
from kinetok.tokenizers.metrics import clip_psnr, clip_ssim

FRAMES, HEIGHT, WIDTH, RATE = 43, 29, 45, Fraction(30000, 1001)
KEPT = (24, 40)


@pytest.fixture(scope="module")
def model() -> GrownTokenizer:
    """8x8x8, as if trained."""
    torch.manual_seed(0)
    base = CausalTokenizer(CausalConfig(channels=8, mult=(1, 2, 2), strides=((2, 2), (2, 2)), blocks=1, z=4, patch=2, groups=4))
    return shake(GrownTokenizer(GrownConfig(blocks=1, groups=4), base)).eval()


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """43 frames of 45 x 29 pixels, a prime number of odd ones, without loss."""
    file = tmp_path_factory.mktemp("film") / "film.mkv"
    frames = [frame[:HEIGHT, :WIDTH] for frame in moving(FRAMES)]
    file.write_bytes(encode(frames, rate=RATE, container="matroska", codec="ffv1", pix_fmt="bgr0"))
    return file


@pytest.fixture(scope="module")
def whole(film: Path) -> Tensor:
    """What is kept of the film."""
    return read_video(film, fps=float(RATE), height=HEIGHT, width=WIDTH)[..., 2:26, 2:42]


def shape(file: Path) -> tuple[int, int, int]:
    with av.open(file) as video:
        frames = [(frame.height, frame.width) for frame in video.decode(video=0)]
    assert len(set(frames)) == 1
    return len(frames), *frames[0]


def about(done: RoundTrip, restored: Tensor, original: Tensor) -> None:
    """The figures are those of these two."""
    assert done.frames == original.shape[2] and done.pixel_numbers == original.numel()
    assert done.psnr == pytest.approx(clip_psnr(restored, original).item(), rel=1e-5)
    assert done.ssim == pytest.approx(clip_ssim(restored, original).item(), rel=1e-4)


@pytest.mark.parametrize("plan", [ChunkPlan(), ChunkPlan(overlap=4), ChunkPlan(frames=9, overlap=8)], ids=str)
def test_chunks_are_those_of_the_whole_video(model: GrownTokenizer, film: Path, whole: Tensor, tmp_path: Path, plan: ChunkPlan) -> None:
    done = round_trip(model, film, tmp_path / "both.mp4", Way(frames=plan.frames, overlap=plan.overlap))
    chunks = encode_chunks(model, whole, plan)
    restored = decode_chunks(model, chunks, plan)
    about(done, restored, whole)
    assert done.token_numbers == sum(tokens.values.numel() for tokens in chunks)
    expected = mp4(beside([pixels(whole[0]), pixels(restored[0])]), float(RATE))
    assert (tmp_path / "both.mp4").read_bytes() == expected
    assert shape(tmp_path / "both.mp4") == (FRAMES, 24 * 8, 2 * 40 * 8 + 4)


@pytest.mark.parametrize("frames", [1, 5, 8, 17, 100])
def test_a_stream_is_one_call(model: GrownTokenizer, film: Path, whole: Tensor, tmp_path: Path, frames: int) -> None:
    done = round_trip(model, film, tmp_path / "both.mp4", Way(stream=True, frames=frames))
    tokens = model.encode(whole)
    about(done, model.decode(tokens), whole)
    assert done.token_numbers == tokens.values.numel() and shape(tmp_path / "both.mp4")[0] == FRAMES


@pytest.mark.parametrize("way", [Way(overlap=4), Way(stream=True)], ids=["chunks", "stream"])
def test_tiles_change_nothing(model: GrownTokenizer, film: Path, tmp_path: Path, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = round_trip(model, film, tmp_path / "plain.mp4", way)
    tiled = round_trip(model, film, tmp_path / "tiled.mp4", Way(overlap=way.overlap, stream=way.stream, tile=5))
    assert (tiled.psnr, tiled.ssim) == pytest.approx((plain.psnr, plain.ssim), rel=1e-5)
    assert "tiles of 5" in tiled.cut
    monkeypatch.setattr("kinetok.tokenizers.causal.tiling.tiled_convolution", lambda *_, **__: pytest.fail("tiled"))
    with pytest.raises(pytest.fail.Exception, match="tiled"):
        round_trip(model, film, tmp_path / "tiled.mp4", Way(overlap=way.overlap, stream=way.stream, tile=5))


@pytest.mark.parametrize("way", [Way(overlap=4), Way(stream=True)], ids=["chunks", "stream"])
def test_a_video_without_end_is_read_piece_by_piece(model: GrownTokenizer, way: Way) -> None:
    read = count()
    frames = (moving(1, 24, 40)[0] for _ in read)
    shown = sum(piece.shape[2] for piece in islice(_Codec(model, way).pieces(frames), 4))
    assert 4 * 9 <= shown <= next(read) <= shown + 17


def test_rate_and_size_may_be_told(model: GrownTokenizer, film: Path, tmp_path: Path) -> None:
    done = round_trip(model, film, tmp_path / "both.mp4", Way(fps=8, size=16))
    assert done.used == "12 frames, 1.50 s at 8 fps of 29.97, 24x16 of 45x29, scaled to 25x16, cropped at the centre"
    original = read_video(film, fps=8, height=16, width=25)[..., :24]
    about(done, model.decode(model.encode(original)), original)


def test_a_picture_is_a_video_of_one_frame(model: GrownTokenizer, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(picture(moving(1, 32, 48)[0], "png"))
    done = round_trip(model, tmp_path / "cat.png", tmp_path / "both.mp4")
    assert done.frames == 1 and shape(tmp_path / "both.mp4")[0] == 1 and "48x32 of 48x32" in done.used


@pytest.fixture(scope="module")
def divot() -> DivotTokenizer:
    """5 frames of 16 x 16 pixels to 4 tokens of 8 numbers."""
    torch.manual_seed(0)
    rung = CausalTokenizer(CausalConfig(channels=8, mult=(1, 2), strides=((2, 2),), blocks=1, z=4, patch=2, groups=4)).eval()
    return DivotTokenizer.build(tiny_divot(), rung).eval()


def test_divot_takes_windows_and_draws_by_the_seed(divot: DivotTokenizer, film: Path, tmp_path: Path) -> None:
    done, other = (round_trip(divot, film, tmp_path / "both.mp4", Way(fps=8, seed=seed)) for seed in (3, 4))
    assert done.used.endswith("16x16 of 45x29, scaled to 25x16, cropped at the centre") and done.cut == "3 chunks of 5 frames"
    original = read_video(film, fps=8, height=16, width=25)[..., 4:20]
    about(done, divot.decode(divot.encode(original), [3]), original)
    assert done.token_numbers == 3 * 4 * 8 and done.psnr != other.psnr
    with pytest.raises(ConfigError, match="--frames: a 'divot' model takes windows of 5 frames; leave it out"):
        round_trip(divot, film, tmp_path / "both.mp4", Way(frames=17))
    with pytest.raises(ConfigError, match="--size: a 'divot' model takes frames of 16x16 pixels; leave it out"):
        round_trip(divot, film, tmp_path / "both.mp4", Way(size=32))
    with pytest.raises(ConfigError, match="--stream: a 'divot' model keeps no memory"):
        round_trip(divot, film, tmp_path / "both.mp4", Way(stream=True))


@pytest.mark.parametrize("name", ["wan", "cosmos-4", "cogvideox"])
def test_adapters_stream_where_they_keep_state(name: str, film: Path, tmp_path: Path) -> None:
    random_model(name).save_pretrained(tmp_path / name)
    adapter = load(tmp_path / name)
    streams = name == "wan"
    kept = read_video(film, fps=8, height=HEIGHT, width=WIDTH)[..., 2:26, 2:42]
    done = round_trip(adapter, film, tmp_path / "both.mp4", Way(fps=8, frames=9))
    about(done, decode_chunks(adapter, encode_chunks(adapter, kept, ChunkPlan(frames=9)), ChunkPlan(frames=9)), kept)
    if streams:
        about(round_trip(adapter, film, tmp_path / "both.mp4", Way(fps=8, stream=True)), adapter.decode(adapter.encode(kept)), kept)
        return
    with pytest.raises(ConfigError, match=f"--stream: a {adapter.config.kind!r} model .*no memory.*; leave it out, then the video goes in"):
        round_trip(adapter, film, tmp_path / "both.mp4", Way(fps=8, stream=True))


def raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("earlier", [b"", b"an older one"], ids=["no file", "a file"])
@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (raising(KeyboardInterrupt("stop")), KeyboardInterrupt, "stop"),
        (raising(OSError(28, "No space left on device")), OSError, "No space"),
        (lambda: float("nan"), DataError, r"film\.mkv: the model gives numbers that are not finite after 17 frames"),
    ],
    ids=["interrupt", "disk", "nan"],
)
def test_nothing_half_written_is_left(  # type: ignore[no-untyped-def]
    model: GrownTokenizer, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bytes, fail, error, message: str
) -> None:
    decode, chunks = model.decode, count()
    monkeypatch.setattr(model, "decode", lambda tokens: decode(tokens) * (fail() if next(chunks) == 1 else 1))
    out = tmp_path / "new" / "both.mp4"
    if earlier:
        out.parent.mkdir()
        out.write_bytes(earlier)
    with pytest.raises(error, match=message):
        round_trip(model, film, out)
    assert [path.read_bytes() for path in out.parent.iterdir()] == ([earlier] if earlier else [])


def test_a_file_that_breaks_on_the_way_is_named_and_leaves_nothing(model: GrownTokenizer, tmp_path: Path) -> None:
    data = bytearray(encode([picture for _ in range(4) for picture in moving(24)], rate=24))
    middle = (data.index(b"mdat") + len(data)) // 2
    data[middle:-2000] = bytes(len(data) - middle - 2000)
    (tmp_path / "torn.mp4").write_bytes(data)
    (tmp_path / "out").mkdir()
    told: list[int] = []
    with pytest.raises(DataError, match=r"torn\.mp4 decoding fails after \d+ frames.*; nothing was written"):
        round_trip(model, tmp_path / "torn.mp4", tmp_path / "out" / "both.mp4", Way(frames=5), told.append)
    assert told and not list((tmp_path / "out").iterdir())


def test_the_command(model: GrownTokenizer, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no.mp4").write_bytes(b"nothing")
    (tmp_path / "film.mkv").write_bytes(film.read_bytes())

    def run(*words: str) -> str:
        answer = CliRunner().invoke(main, ["reconstruct", *words, "--model", "model"])
        assert answer.exit_code == ("error: " in answer.output) and "Traceback" not in answer.output, answer.output
        return answer.output

    done = round_trip(model, film, tmp_path / "same.mp4", Way(overlap=4, tile=5))
    lines = run("film.mkv", "--overlap", "4", "--tile", "5", "--out", "both.mp4").splitlines()
    assert lines[:5] == list(done.lines())[:5] and lines[-1] == "both.mp4"
    assert lines[:3] == [
        "video        43 frames, 1.43 s at 29.97 fps, 40x24 of 45x29, cropped at the centre",
        "model        grown 8x8x8, 3 chunks of 17 frames, 4 of them shared with the one before, convolutions in tiles of 5",
        "tokens       135 of 4 numbers, 94.1 per second of video",
    ]
    assert "frames/s" in lines[5]
    assert "PSNR" in run("film.mkv", "--stream", "--fps", "8") and shape(tmp_path / "reconstructed.mp4")[0] == 12
    for words, message in (
        (("no.mp4",), "no.mp4 cannot be opened"),
        (("film.mkv", "--overlap", "17"), "--overlap: 17 frames leave nothing new in a chunk of 17"),
        (("film.mkv", "--overlap", "4", "--stream"), "one stream has no seams"),
        (("film.mkv", "--size", "7"), "8x0 of 45x29, scaled to 11x7, cropped at the centre: the model takes multiples of 8"),
        (("film.mkv", "--out", "./film.mkv"), "is the video that is read; name another file"),
        (("film.mkv", "--out", "no.mp4/both.mp4"), "no.mp4"),
    ):
        assert message in run(*words)
    assert (tmp_path / "film.mkv").read_bytes() == film.read_bytes()
