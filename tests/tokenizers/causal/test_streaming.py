"""A stream gives what one call gives, however it is cut."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from tests.tokenizers.causal.conftest import shake

from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.presets import direct
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.streaming import DecodeStream, EncodeStream

MakeVideo = Callable[..., torch.Tensor]
PLANS = [(1, 4, 4, 4), (1, 8, 4), (1, 12), (1,) * 13, (2, 3, 5, 3), (17, 16), (9, 15, 9)]
MODELS = ["4x", "8x", "16x", "8x dual, spatial", "8x direct", "4x AdaGN", "8x on AdaGN"]


@pytest.fixture
def model(
    request: pytest.FixtureRequest, base: CausalTokenizer, adaptive: CausalTokenizer, shaken: GrownTokenizer, twice_grown: GrownTokenizer
) -> Rung:
    makers: dict[str, Callable[[], Rung]] = {
        "4x": lambda: shake(base),
        "8x": lambda: shaken,
        "16x": lambda: shake(twice_grown),
        "8x dual, spatial": lambda: GrownTokenizer(GrownConfig(blocks=1, groups=4, mix="dual", cond="spatial"), base),
        "8x direct": lambda: CausalTokenizer(direct(base.config, 2)),
        "4x AdaGN": lambda: adaptive,
        "8x on AdaGN": lambda: GrownTokenizer(GrownConfig(blocks=1, groups=4), adaptive),
    }
    return shake(makers[request.param]().double().eval())


def pieces_of(tensor: torch.Tensor, plan: tuple[int, ...]) -> list[torch.Tensor]:
    edges = [sum(plan[:index]) for index in range(len(plan) + 1)]
    return [tensor[:, :, start:stop] for start, stop in pairwise(edges)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_encoding_in_pieces_equals_encoding_at_once(model: Rung, make_video: MakeVideo, plan: tuple[int, ...]) -> None:
    video = make_video(sum(plan))
    stream = EncodeStream(model)
    latent = torch.cat([stream.push(piece) for piece in pieces_of(video, plan)] + [stream.finish()], dim=2)
    torch.testing.assert_close(latent, model.encode(video).values, rtol=0, atol=1e-11)
    assert stream.frames == video.shape[2]


@pytest.mark.parametrize("plan", [(1, 1, 1, 1), (1, 2, 1), (1, 3), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_decoding_in_pieces_equals_decoding_at_once(model: Rung, plan: tuple[int, ...]) -> None:
    latent = torch.randn(1, model.heads.z, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stream = DecodeStream(model)
    video = torch.cat([stream.push(piece) for piece in pieces_of(latent, plan)], dim=2)
    expected = model.decode_latent(latent, 1 + 3 * model.temporal).clamp(-1, 1)
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-11)


def test_a_latent_step_comes_with_its_last_frame(shaken: GrownTokenizer, make_video: MakeVideo) -> None:
    stream, decoding, steps, frames = EncodeStream(shaken), DecodeStream(shaken), [], []
    for frame in pieces_of(make_video(18), (1,) * 18):
        latent = stream.push(frame)
        steps.append(latent.shape[2])
        frames.append(decoding.push(latent).shape[2])
    assert [index for index, count in enumerate(steps) if count] == [0, 8, 16]
    assert [frames[index] for index in (0, 1, 8, 16)] == [1, 0, 8, 8]
    assert decoding.push(stream.finish()).shape == (1, 3, 8, 16, 16)


def test_streams_of_one_model_do_not_disturb_each_other(shaken: GrownTokenizer, make_video: MakeVideo) -> None:
    one, other = make_video(17), -make_video(17)
    streams = EncodeStream(shaken), EncodeStream(shaken)
    latents: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for pieces in zip(pieces_of(one, (1, 8, 8)), pieces_of(other, (1, 8, 8)), strict=True):
        for stream, piece, out in zip(streams, pieces, latents, strict=True):
            out.append(stream.push(piece))
    for video, out in zip((one, other), latents, strict=True):
        torch.testing.assert_close(torch.cat(out, dim=2), shaken.encode(video).values, rtol=0, atol=1e-11)


def test_memory_does_not_grow(shaken: GrownTokenizer, make_video: MakeVideo) -> None:
    encoding, decoding = EncodeStream(shaken), DecodeStream(shaken)
    held = []
    for piece in pieces_of(make_video(65), (9, 8, 16, 32)):
        decoding.push(encoding.push(piece))
        memories = [*encoding._memories, decoding._memory]
        held.append(sum(tensor.untyped_storage().nbytes() for memory in memories for tensor in memory.values()))
    assert held[0] == held[1] == held[2] == held[3] > 0


def test_a_finished_stream_takes_nothing_more(base: CausalTokenizer, make_video: MakeVideo) -> None:
    stream = EncodeStream(base)
    stream.push(make_video(6))
    stream.finish()
    for more in (lambda: stream.push(make_video(1)), stream.finish):
        with pytest.raises(ValueError, match="finished after 6 frames: what follows them is a stream of its own"):
            more()
    assert stream.frames == 6


def test_an_empty_stream_has_no_end(base: CausalTokenizer) -> None:
    with pytest.raises(ValueError, match="nothing was pushed"):
        EncodeStream(base).finish()
