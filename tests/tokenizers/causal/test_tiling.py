"""Tiling layer by layer is exact, tiling the latent is not."""

import pytest
import torch
import torch.nn.functional as F
from tests.tokenizers.causal.conftest import shake
from tests.tokenizers.pretrained.conftest import random_model
from torch.overrides import TorchFunctionMode

from kinetok.tokenizers.base import Tokens
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.tiling import LayerwiseTiling, decode_latent_tiles


@pytest.fixture
def video() -> torch.Tensor:
    return torch.rand((1, 3, 9, 32, 48), generator=torch.Generator().manual_seed(0)).double() * 2 - 1


class LargestConvolution(TorchFunctionMode):
    """Most output positions of a frame that any one convolution yields."""

    positions = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func in {F.conv3d, torch.mkldnn_convolution}:
            self.positions = max(self.positions, result.shape[-1] * result.shape[-2])
        return result


@pytest.mark.parametrize("name", ["shaken", "adaptive"])
@pytest.mark.parametrize("tile", [3, 8, 64])
def test_layerwise_tiling_gives_the_untiled_result(request: pytest.FixtureRequest, video: torch.Tensor, tile: int, name: str) -> None:
    model: Rung = request.getfixturevalue(name)
    tokens = model.encode(video)
    decoded = model.decode(tokens)
    with LayerwiseTiling(tile):
        tiled = model.encode(video)
        again = model.decode(tokens)
    torch.testing.assert_close(tiled.values, tokens.values, rtol=0, atol=1e-11)
    torch.testing.assert_close(again, decoded, rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", ["rms", "group"])
def test_tiling_the_latent_does_not(video: torch.Tensor, base: CausalTokenizer, norm: str) -> None:
    model = shake(CausalTokenizer(base.config.model_copy(update={"norm": norm})).double().eval())
    tokens = model.encode(video)
    whole = model.decode(tokens)
    with LayerwiseTiling(8):
        exact = (model.decode(tokens) - whole).abs().max()
    tiled = decode_latent_tiles(model, tokens, tile=3, overlap=1)
    assert exact < 1e-11
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() > 1e-3


def test_latent_tiles_of_a_decoder_without_neighbours_blend_to_the_whole() -> None:
    class Repeating(CausalTokenizer):
        def decode(self, tokens: Tokens) -> torch.Tensor:
            return tokens.values.repeat_interleave(2, 3).repeat_interleave(2, 4)

    model = Repeating.__new__(Repeating)
    values = torch.randn(1, 3, 2, 5, 7)
    for tile, overlap in ((3, 1), (4, 0), (2, 1), (9, 3)):
        decoded = decode_latent_tiles(model, Tokens(values, 2), tile=tile, overlap=overlap)
        torch.testing.assert_close(decoded, model.decode(Tokens(values, 2)))
    with pytest.raises(ValueError, match="nothing new"):
        decode_latent_tiles(model, Tokens(values, 2), tile=2, overlap=2)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (3, 2, 1, 1), (3, 2, 0, 1), (1, 1, 0, 1), (5, 3, 2, 2)]
)
def test_any_convolution_is_tiled(kernel: int, stride: int, padding: int, dilation: int) -> None:
    x, weight = torch.randn(1, 4, 7, 17, 21), torch.randn(6, 2, 1, kernel, kernel)
    arguments = {"stride": (1, stride, stride), "padding": (0, padding, padding), "dilation": (1, dilation, dilation), "groups": 2}
    whole, flat = F.conv3d(x, weight, **arguments), F.conv2d(x[:, :, 0], weight[:, :, 0], None, stride, padding, dilation, 2)
    with LayerwiseTiling(2):
        torch.testing.assert_close(F.conv3d(x, weight, **arguments), whole)
        torch.testing.assert_close(F.conv2d(x[:, :, 0], weight[:, :, 0], None, stride, padding, dilation, 2), flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_convolution_yields_more_than_a_tile(base: CausalTokenizer, video: torch.Tensor, dtype: torch.dtype) -> None:
    base, video = base.to(dtype), video.to(dtype)
    with LargestConvolution() as untiled:
        base.decode(base.encode(video))
    with LargestConvolution() as tiled, LayerwiseTiling(4):
        base.decode(base.encode(video))
    assert untiled.positions == 16 * 24
    assert tiled.positions == 16


def test_memory_format_survives() -> None:
    last = torch.channels_last_3d
    x, weight = torch.randn(2, 64, 5, 18, 18).contiguous(memory_format=last), torch.randn(64, 64, 3, 3, 3)
    assert F.conv3d(x, weight).is_contiguous(memory_format=last)
    with LayerwiseTiling(8):
        assert F.conv3d(x, weight).is_contiguous(memory_format=last)


def test_gradients_survive(base: CausalTokenizer, video: torch.Tensor) -> None:
    weights = list(base.encoder.parameters())
    whole = torch.autograd.grad(base.features(video).square().mean(), weights)
    with LayerwiseTiling(4):
        tiled = torch.autograd.grad(base.features(video).square().mean(), weights)
    torch.testing.assert_close(tiled, whole)


def test_an_empty_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="an edge of 0"):
        LayerwiseTiling(0)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_models_of_others_are_tiled_as_they_are(name: str) -> None:
    model, x = random_model(name), torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        moments = model.encode(x).latent_dist.parameters
        with LayerwiseTiling(3):
            tiled = model.encode(x).latent_dist.parameters
    torch.testing.assert_close(tiled, moments, rtol=1e-4, atol=1e-5)
