"""The diffusion transformer by what must not change, and by what must."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tests.llm.conftest import CONFIG, Inputs, shake
from torch import Tensor

from kinetok.llm.dit import DiTConfig, VideoDiT, patchify, rotary_angles, rotate, unpatchify
from kinetok.llm.presets import SIZES, dit

CPU = torch.device("cpu")


def test_an_untrained_model_has_no_velocity(inputs: Inputs) -> None:
    assert VideoDiT(CONFIG)(*inputs.all).abs().max() == 0


def test_every_parameter_has_an_effect(model: VideoDiT, inputs: Inputs) -> None:
    gradients = torch.autograd.grad(model(*inputs.all).square().sum(), list(model.parameters()))
    still = [name for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True) if gradient.abs().max() == 0]
    assert not still


def test_masked_text_has_no_influence_and_shown_text_has(model: VideoDiT, inputs: Inputs) -> None:
    before = model(*inputs.all)
    under = inputs.text.masked_fill(~inputs.mask[..., None], torch.inf)
    assert torch.equal(model(inputs.noisy, inputs.time, under, inputs.mask), before)
    changed = model(inputs.noisy, inputs.time, inputs.text + 1, inputs.mask)
    assert not torch.allclose(changed[:2], before[:2]), "shown"
    assert torch.equal(changed[2], before[2]), "a sample without text"
    shorter = model(inputs.noisy[:1], inputs.time[:1], inputs.text[:1, :2], inputs.mask[:1, :2])
    torch.testing.assert_close(shorter, before[:1])


def test_samples_do_not_see_each_other(model: VideoDiT, inputs: Inputs) -> None:
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(*(part[order] for part in inputs.all)), model(*inputs.all)[order])
    torch.testing.assert_close(model(*(part[1:2] for part in inputs.all)), model(*inputs.all)[1:2])


def test_the_time_is_heard(model: VideoDiT, inputs: Inputs) -> None:
    assert not torch.allclose(model(inputs.noisy, inputs.time + 0.05, inputs.text, inputs.mask), model(*inputs.all))


def grid_scores(offset: tuple[int, int, int]) -> Tensor:
    """Attention scores of a 2 x 3 x 2 window of a larger grid, the same queries and keys wherever the window lies."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 12, 20, generator=generator).unbind()
    angles = rotary_angles((5, 6, 7), 20, CPU).view(5, 6, 7, -1)
    t, h, w = offset
    window = angles[t : t + 2, h : h + 3, w : w + 2].flatten(0, 2)
    return rotate(q, window) @ rotate(k, window).T


def test_rotary_scores_depend_on_differences_of_positions_alone() -> None:
    for offset in ((3, 0, 0), (0, 3, 0), (0, 0, 5), (2, 1, 4)):
        torch.testing.assert_close(grid_scores(offset), grid_scores((0, 0, 0)))
    ones = torch.ones(1, 20)
    scores = rotate(ones, rotary_angles((2, 2, 2), 20, CPU)) @ ones.T
    assert len(scores.round(decimals=4).unique()) > 4, "and differ between positions on all axes"


def test_patches_go_round() -> None:
    latent = torch.randn(2, 3, 4, 6, 8)
    tokens = patchify(latent, (2, 2))
    assert tokens.shape == (2, 2 * 3 * 4, 3 * 2 * 2 * 2)
    assert torch.equal(unpatchify(tokens, (2, 3, 4), (2, 2)), latent)
    assert torch.equal(tokens[0, 4], latent[0, :, 0:2, 2:4, 0:2].flatten()), "t, then h, then w"
    assert torch.equal(patchify(latent, (1, 1))[1, 50], latent[1, :, 1, 0, 2])


def test_patches_of_a_model(inputs: Inputs) -> None:
    model = VideoDiT(CONFIG.model_copy(update={"patch": (2, 2)}))
    shake(model)
    assert model(*inputs.all).shape == inputs.noisy.shape
    with pytest.raises(ValueError, match="h = 3 is no multiple of 2"):
        model(inputs.noisy[:, :, :, :1].repeat(1, 1, 1, 3, 1), inputs.time, inputs.text, inputs.mask)


def test_steps_know_their_place_in_the_chunk_and_their_chunk(model: VideoDiT, inputs: Inputs) -> None:
    """Attention over equal tokens is the same at every position: what differs is what the tokens were told."""
    told = {"place": model.in_chunk.weight.detach().clone(), "chunk": model.of_chunk.weight.detach().clone()}

    def velocities(**known: Tensor) -> Tensor:
        model.in_chunk.weight.data = known.get("place", torch.zeros_like(told["place"]))
        model.of_chunk.weight.data = known.get("chunk", torch.zeros_like(told["chunk"]))
        return model(torch.ones(3, 4, 4, 1, 1), inputs.time, inputs.text, inputs.mask)

    torch.testing.assert_close(velocities(), velocities()[:, :, :1].expand(-1, -1, 4, -1, -1))
    by_place, by_chunk = velocities(place=told["place"]), velocities(chunk=told["chunk"])
    assert (by_place[:, :, 0] - by_place[:, :, 1]).abs().max() > 1e-2, "two steps of a chunk"
    assert (by_chunk[:, :, 0] - by_chunk[:, :, 2]).abs().max() > 1e-2, "the same step of two chunks"


def test_queries_and_keys_are_normalised(model: VideoDiT, inputs: Inputs) -> None:
    before = model(*inputs.all)
    for block in model.blocks:
        block.attention.to_q.weight.data *= 100
        block.attention.to_q.bias.data *= 100
    torch.testing.assert_close(model(*inputs.all), before, rtol=1e-3, atol=1e-4)


def test_a_saved_model_comes_back_with_its_statistics(model: VideoDiT, inputs: Inputs, tmp_path: Path) -> None:
    model.set_statistics(torch.arange(4.0), torch.arange(1.0, 5.0))
    model.save_pretrained(tmp_path)
    again = VideoDiT.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    assert torch.equal(again(*inputs.all), model(*inputs.all))
    assert torch.equal(again.normalise(inputs.noisy), model.normalise(inputs.noisy))


def test_normalising_goes_round(model: VideoDiT) -> None:
    latent = torch.randn(64, 4, 2, 4, 4) * torch.tensor([1.0, 2, 3, 4])[:, None, None, None] + 5
    model.set_statistics(latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4)))
    normal = model.normalise(latent)
    torch.testing.assert_close(normal.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3, 4)), torch.ones(4))
    torch.testing.assert_close(model.denormalise(normal), latent)


@pytest.mark.parametrize(("std", "says"), [([1, 1, 0, 1], "never changes"), ([1, 1, 1], "needed are 4"), ([1, 1, torch.nan, 1], "finite")])
def test_statistics_that_cannot_be_are_refused(model: VideoDiT, std: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model.set_statistics(torch.zeros(4), torch.tensor(std))


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"heads": 8}, {"patch": (3, 1)}, {"depht": 1}])
def test_numbers_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DiTConfig.model_validate(CONFIG.model_dump() | wrong)


def test_bf16_autocast_stays_close(model: VideoDiT, inputs: Inputs) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*inputs.all)
    whole = model(*inputs.all)
    assert low.dtype == torch.float32
    assert (low - whole).square().mean() < 1e-3 * whole.square().mean()


@pytest.mark.parametrize(
    ("chunk", "grid"),
    [(5, (5, 32, 32)), (5, (20, 24, 40)), (2, (40, 32, 32)), (2, (40, 64, 64))],
    ids=["17 frames of 256 at 4x", "68 frames of 192x320 at 4x", "340 frames of 256 at 16x", "340 frames of 512 at 16x"],
)
def test_full_sizes_take_short_and_long_latents_without_their_memory(chunk: int, grid: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        latent, text = torch.empty(1, 16, *grid), torch.empty(1, 7, 4096)
        velocity = VideoDiT(dit("5b", z=16, chunk=chunk))(latent, torch.empty(1), text, torch.ones(1, 7, dtype=torch.bool))
    assert velocity.shape == latent.shape


def test_full_sizes_have_their_parameters() -> None:
    with torch.device("meta"):
        models = {size: VideoDiT(dit(size, z=16, chunk=5)) for size in SIZES}
    billions = {size: sum(weight.numel() for weight in model.parameters()) / 1e9 for size, model in models.items()}
    assert billions == pytest.approx({"small": 0.00077, "1b": 1.42, "5b": 5.0}, rel=0.03)
