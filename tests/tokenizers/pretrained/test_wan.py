"""Wan: pieces of any length give the same, encoder and decoder of different widths grow, and patches fold as the class folds them."""

import pytest
import torch
from tests.tokenizers.causal.conftest import shake
from tests.tokenizers.pretrained.conftest import Adapt, MakeModel, MakeVideo

from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.streaming import DecodeStream, EncodeStream
from kinetok.tokenizers.pretrained import wan


@pytest.mark.parametrize("name", ["wan", "wan2.2"])
@torch.no_grad()
def test_pieces_of_any_length_give_the_same(
    name: str, make_model: MakeModel, adapt: Adapt, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, video = adapt(make_model(name)), make_video(25)
    features = adapter.features(video)
    decoded = adapter.decode_latent(adapter.encode(video).values, 25)
    for steps in (1, 2, 6):
        monkeypatch.setattr(wan, "STEPS", steps)
        torch.testing.assert_close(adapter.features(video), features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapter.decode_latent(adapter.encode(video).values, 25), decoded, rtol=1e-4, atol=1e-4)


def test_calls_do_not_disturb_each_other(make_model: MakeModel, adapt: Adapt, make_video: MakeVideo) -> None:
    """State belongs to a call: a decoding that is still to be differentiated survives another one."""
    adapter, features = adapt(make_model("wan")), torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(adapter.decode_features(features).sum(), features)
    pending = adapter.decode_features(features).sum()
    adapter.encode(make_video(9))
    adapter.decode_features(torch.randn(2, 4, 2, 2, 2))
    assert torch.equal(torch.autograd.grad(pending, features)[0], gradient)


def test_geometry_of_both_generations(make_model: MakeModel, adapt: Adapt) -> None:
    first, second = (adapt(make_model(name)).geometry for name in ("wan", "wan2.2"))
    assert (first.temporal, first.spatial, first.channels, first.encoder_width, first.decoder_width) == (4, 8, 16, 4, 4)
    assert (second.temporal, second.spatial, second.channels, second.encoder_width, second.decoder_width) == (4, 16, 4, 4, 8)


@pytest.mark.parametrize("plan", [(1, 4, 4, 4), (1, 8, 4), (1, 12), (2, 3, 5, 3)], ids=str)
@pytest.mark.parametrize("rung", ["wan", "wan2.2", "grown", "dual"])
def test_a_stream_gives_what_one_call_gives(
    rung: str, plan: tuple[int, ...], make_model: MakeModel, adapt: Adapt, make_video: MakeVideo
) -> None:
    model = adapt(make_model("wan2.2" if rung == "wan2.2" else "wan"))
    if rung in ("grown", "dual"):
        model = GrownTokenizer(GrownConfig(blocks=1, groups=4, mix="add" if rung == "grown" else "dual"), model).eval()
        shake(model)
    video, encoding, decoding = make_video(sum(plan)), EncodeStream(model), DecodeStream(model)
    steps = [encoding.push(piece) for piece in video.split(plan, dim=2)] + [encoding.finish()]
    tokens = model.encode(video)
    torch.testing.assert_close(torch.cat(steps, dim=2), tokens.values, rtol=1e-4, atol=1e-4)
    frames = torch.cat([decoding.push(piece) for piece in steps], dim=2)
    torch.testing.assert_close(frames[:, :, : tokens.frames], model.decode(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("cosmos-4", "cosmos"), ("ltx", "ltx")])
@pytest.mark.parametrize("grown", [False, True])
def test_a_class_without_state_does_not_stream(
    name: str, kind: str, grown: bool, make_model: MakeModel, adapt: Adapt, make_video: MakeVideo
) -> None:
    model = adapt(make_model(name))
    with pytest.raises(ValueError, match=f"a '{kind}' model does not stream"):
        EncodeStream(GrownTokenizer(GrownConfig(blocks=1, groups=4), model) if grown else model).push(make_video(1))
