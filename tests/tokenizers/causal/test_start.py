"""The untrained model is a linear transform coder."""

import pytest
import torch

from kinetok.tokenizers.causal import start
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.metrics import clip_psnr


def smooth_video() -> torch.Tensor:
    """A soft wave that drifts, (1, 3, 9, 32, 32)."""
    t, y, x = torch.meshgrid(torch.arange(9.0), torch.arange(32.0), torch.arange(32.0), indexing="ij")
    wave = torch.sin(0.15 * x + 0.1 * y + 0.2 * t)
    return torch.stack([wave, 0.5 * wave, -0.3 * wave])[None] * 0.8


CONFIGS = {
    "pixels": CausalConfig(channels=4, mult=(1, 2, 4, 8), blocks=1, groups=4),
    "patches of 2": CausalConfig(channels=16, mult=(1, 2, 4), strides=((2, 2), (2, 2)), patch=2, blocks=1, groups=4),
    "patches of 4": CausalConfig(channels=16, mult=(1, 2, 4), strides=((2, 1), (2, 2)), patch=4, blocks=1, groups=4),
    "wider than its transform": CausalConfig(channels=64, mult=(1, 1, 1), strides=((2, 1), (2, 2)), patch=4, blocks=1, groups=4),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_an_untrained_model_is_a_blurred_copy(config: CausalConfig) -> None:
    torch.manual_seed(0)
    model, video = CausalTokenizer(config), smooth_video()
    assert (config.temporal, config.spatial) == (4, 8)
    assert clip_psnr(model.decode(model.encode(video)), video).item() > 25


def test_a_start_at_random_is_torchs_own_throughout() -> None:
    config = CausalConfig(channels=16, mult=(1, 2, 4), strides=((2, 1), (2, 2)), patch=4, blocks=1, groups=4)
    assert "start" not in config.model_dump()
    torch.manual_seed(0)
    model, video = CausalTokenizer(config.model_copy(update={"start": "random"})), smooth_video()
    assert clip_psnr(model.decode(model.encode(video)), video).item() < 15
    for conv in (module for module in model.modules() if isinstance(module, torch.nn.Conv3d)):
        bound = (conv.in_channels * conv.weight[0, 0].numel()) ** -0.5  # of torch's uniform initialisation
        assert 0.9 * bound < conv.weight.abs().max() <= bound
    assert model.config.model_dump()["start"] == "random"


def test_with_every_coefficient_kept_nothing_is_lost() -> None:
    model = CausalTokenizer(CausalConfig(channels=12, mult=(1, 8), strides=((2, 2),), patch=2, blocks=1, z=96, groups=4))
    video = torch.rand(2, 3, 5, 8, 8) * 2 - 1
    torch.testing.assert_close(model.decode(model.encode(video)), video, atol=1e-5, rtol=0)


def test_slots_come_by_expected_energy_and_are_orthogonal() -> None:
    slots = start.transform_slots(start.pixel_slots(2, 12), (2, 2, 2), 96)
    variances = [slot.variance for slot in slots]
    assert variances == sorted(variances, reverse=True)
    patterns = torch.stack([torch.einsum("i,j,k->ijk", *slot.axes).flatten() for slot in slots if slot.scale == 1.0])
    gram = patterns @ patterns.T
    torch.testing.assert_close(gram, gram.diag().diag(), atol=1e-5, rtol=0)


def test_energy_is_the_variance_of_the_pattern_on_a_markov_chain() -> None:
    torch.manual_seed(0)
    rho, steps = 0.9, [torch.randn(200_000)]
    for _ in range(3):
        steps.append(rho * steps[-1] + (1 - rho**2) ** 0.5 * torch.randn(200_000))
    axis = torch.tensor([1.0, 1.0, -1.0, -1.0])
    sampled = (torch.stack(steps, dim=1) @ axis / axis.norm()).var().item()
    assert start._energy(axis, rho) == pytest.approx(sampled, rel=0.02)


def test_latents_of_markov_video_start_at_unit_variance() -> None:
    torch.manual_seed(0)
    grey = torch.randn(8, 9, 32, 32)
    for axis, rho in zip((1, 2, 3), start.CORRELATION, strict=True):
        places = torch.arange(grey.shape[axis])
        root = torch.linalg.cholesky(rho ** (places[:, None] - places).abs())
        grey = torch.tensordot(grey, root, dims=([axis], [1])).movedim(-1, axis)
    video = (start.PIXEL_DEVIATION * grey)[:, None].expand(-1, 3, -1, -1, -1)
    latent = CausalTokenizer(CONFIGS["patches of 4"]).encode(video).values[:, :, 1:]
    luma = [latent[:, index].std().item() for index in (0, 2, 3)]  # channel 1 is chroma
    assert luma == pytest.approx([1, 1, 1], rel=0.25)
