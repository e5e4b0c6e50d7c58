"""The adversarial losses against their closed forms, and a discriminator that tells two kinds of clips apart."""

import pytest
import torch
from torch import Tensor

from kinetok.tokenizers.causal.discriminator import (
    EPSILON,
    LECAM_DECAY,
    Lecam,
    PatchDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
)


def clips(kind: str, seed: int, count: int = 4) -> Tensor:
    """Noise of one mean and deviation, steady in time (`real`) or new in every frame (`fake`): only motion tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    frames = 1 if kind == "real" else 5
    return torch.rand((count, 3, frames, 16, 16), generator=generator).expand(-1, -1, 5, -1, -1) * 2 - 1


def test_hinge_losses_are_what_the_formula_says() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert generator_loss(fake).item() == pytest.approx(2 / 3)
    assert hinge_loss(torch.tensor([1.0]), torch.tensor([-1.0])) == 0


def test_lecam_is_zero_where_logits_stand_at_the_others_average_and_quadratic_beyond() -> None:
    lecam = Lecam()
    lecam.real.fill_(0.5)
    lecam.fake.fill_(-0.25)
    real, fake = torch.full((3,), -0.25), torch.full((3,), 0.5)
    assert lecam(real, fake) == 0
    assert lecam(real + 2, fake - 3).item() == pytest.approx(4 + 9)
    assert lecam(real - 2, fake + 3) == 0


def test_lecam_averages_are_checkpointed_and_updated_without_gradient() -> None:
    lecam = Lecam()
    for step in (5, 6, 7):
        lecam.begin(step)
        lecam.update(torch.full((2,), 3.0, requires_grad=True), torch.full((2,), -1.0))
    expected = 1 - LECAM_DECAY**2  # the last step joins when the next one begins
    assert lecam.real.item() == pytest.approx(3 * expected) and lecam.fake.item() == pytest.approx(-expected)
    assert set(lecam.state_dict()) == {"real", "fake", "step", "sums", "parts"} and not list(lecam.parameters())
    assert not lecam.real.requires_grad


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_lecam_sees_the_same_averages_however_a_step_is_divided(parts: int) -> None:
    torch.manual_seed(0)
    lecam, penalties = Lecam(), []
    for step, (real, fake) in enumerate(torch.randn(6, 2, 8), start=1):
        pieces = zip(real.chunk(parts), fake.chunk(parts), strict=True)
        penalty = torch.zeros(())
        for real_part, fake_part in pieces:
            lecam.begin(step)
            penalty = penalty + lecam(real_part, fake_part) / parts
            lecam.update(real_part, fake_part)
        penalties.append(penalty)
    torch.manual_seed(0)
    a_real, a_fake = torch.zeros(()), torch.zeros(())
    for (real, fake), penalty in zip(torch.randn(6, 2, 8), penalties, strict=True):
        torch.testing.assert_close(penalty, (real - a_fake).relu().square().mean() + (a_real - fake).relu().square().mean())
        a_real, a_fake = a_real.lerp(real.mean(), 1 - LECAM_DECAY), a_fake.lerp(fake.mean(), 1 - LECAM_DECAY)


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_layer() -> None:
    torch.manual_seed(0)
    layer, judge = torch.nn.Conv3d(2, 3, 3), torch.nn.Conv3d(3, 1, 1)
    x, y = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 3, 2, 2, 2)

    def losses() -> tuple[Tensor, Tensor]:
        output = layer(x)
        return (output - y).abs().mean(), generator_loss(judge(output))

    norms = []
    for place in (0, 1):
        layer.zero_grad()
        losses()[place].backward()
        assert layer.weight.grad is not None
        norms.append(layer.weight.grad.norm().item())
    layer.zero_grad()
    reconstruction, generator = losses()
    weight = adaptive_weight(reconstruction, generator, layer.weight)
    assert weight.item() == pytest.approx(norms[0] / (norms[1] + EPSILON)) and not weight.requires_grad
    assert layer.weight.grad is None, "measuring leaves no gradient behind"
    (reconstruction + weight * generator).backward()  # the graph is still there


@pytest.mark.parametrize(("frames", "steps"), [(1, 1), (2, 1), (9, 2), (17, 3)])
def test_any_clip_length_gives_float32_logits_of_patches(frames: int, steps: int) -> None:
    net = PatchDiscriminator(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(torch.randn(2, 3, frames, 16, 24))
    assert logits.shape == (2, 1, steps, 2, 3) and logits.dtype == torch.float32


@pytest.mark.parametrize(("frames", "layers"), [(1, 2), (3, 1), (5, 2), (9, 2)])
def test_bfloat16_gradients_are_near_the_exact_ones(frames: int, layers: int) -> None:
    """With 3 and 5 frames the levels of stride 1 see two."""
    torch.manual_seed(0)
    net, gradients = PatchDiscriminator(8, layers), []
    for rounded in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            loss = net(clips("fake", 5)[:, :, :1].expand(-1, -1, frames, -1, -1)).square().mean()
        loss.backward()
        gradients.append({name: weight.grad for name, weight in net.named_parameters()})
    for name, exact in gradients[0].items():
        assert exact is not None and (gradients[1][name] - exact).norm() < 0.1 * exact.norm(), name


def test_what_a_clip_is_given_does_not_depend_on_its_company() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(8, 2).double()
    both = torch.cat([clips("real", 1, 1), clips("fake", 2, 1)]).double()
    torch.testing.assert_close(net(both)[:1], net(both[:1]))


def test_levels_double_in_width_up_to_eight_times_the_first() -> None:
    net = PatchDiscriminator(2, 5)
    assert [conv.weight.shape[0] for conv in (net.first, *net.convs, net.last)] == [2, 4, 8, 16, 16, 16, 1]


def test_it_learns_to_tell_steady_from_flickering_clips() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(8, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for step in range(56):
        optimizer.zero_grad()
        hinge_loss(net(clips("real", 2 * step)), net(clips("fake", 2 * step + 1))).backward()
        optimizer.step()
    with torch.no_grad():
        real, fake = net(clips("real", 1000)), net(clips("fake", 1001))
    assert hinge_loss(real, fake) < 0.3
    assert real.flatten(1).mean(1).min() > fake.flatten(1).mean(1).max()
