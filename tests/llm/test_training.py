"""The loss that a diffusion transformer is trained with, and the figure that it is judged by."""

from pathlib import Path

import pytest
import torch
from tests.llm.conftest import CONFIG

from kinetok.llm.dit import VideoDiT
from kinetok.llm.flow import draw, flow_loss, logit_normal
from kinetok.llm.training import DIT, EVALUATION_TIMES, DiffusionObjective, DiTTrainable
from kinetok.tokenizers.base import Batch
from kinetok.tokenizers.causal.posterior import seeded_noise

CPU = torch.device("cpu")


def loss_of(model: VideoDiT, batch: Batch, **objective: float) -> torch.Tensor:
    loss, _ = DiTTrainable(model, DiffusionObjective(**objective)).players[DIT](batch, 1)
    assert isinstance(loss, torch.Tensor)
    return loss


def test_loss_is_of_normalised_latents_at_the_drawn_times(model: VideoDiT, batch: Batch) -> None:
    model.set_statistics(torch.ones(4), torch.full((4,), 2.0))
    x = (batch["latent_BZthw"] - 1) / 2
    draws = draw([5, 6, 7], x.shape[1:], CPU)
    time = logit_normal(draws.normal_B, 0.5, 0.7)
    wanted = flow_loss(model, x, draws.noise_BZthw, time, batch["text_BLE"], batch["text_mask_BL"]).mean()
    assert torch.equal(loss_of(model, batch, caption_dropout=0.0, time_mean=0.5, time_std=0.7), wanted)


def test_a_samples_draws_do_not_depend_on_its_company(model: VideoDiT, batch: Batch) -> None:
    alone = [loss_of(model, {name: values[i : i + 1] for name, values in batch.items()}) for i in range(3)]
    torch.testing.assert_close(torch.stack(alone).mean(), loss_of(model, batch))
    assert loss_of(model, batch | {"seed_B": batch["seed_B"] + 1}) != loss_of(model, batch)


def test_a_dropped_caption_is_as_none_at_all(model: VideoDiT, batch: Batch) -> None:
    """With nearly every caption dropped the loss is that of an empty mask; about the stated part is dropped."""
    silent = batch | {"text_mask_BL": torch.zeros_like(batch["text_mask_BL"])}
    torch.testing.assert_close(loss_of(model, batch, caption_dropout=0.9999), loss_of(model, silent, caption_dropout=0.0))
    dropped = draw(range(2000), (1, 1, 1, 1), CPU).uniform_B < 0.1
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_evaluation_is_the_mean_over_fixed_times(model: VideoDiT, batch: Batch) -> None:
    trainable = DiTTrainable(model, DiffusionObjective(caption_dropout=0.9))
    figures = trainable.evaluate(batch)
    noise = seeded_noise([5, 6, 7], (4, 4, 2, 4), CPU)
    each = [
        flow_loss(model, batch["latent_BZthw"], noise, torch.full((3,), time), batch["text_BLE"], batch["text_mask_BL"])
        for time in EVALUATION_TIMES
    ]
    torch.testing.assert_close(figures["flow_loss"], torch.stack(each).mean(0))
    assert torch.equal(trainable.evaluate(batch)["flow_loss"], figures["flow_loss"])


def test_an_untrained_model_is_judged_by_the_power_of_its_target(batch: Batch) -> None:
    figures = DiTTrainable(VideoDiT(CONFIG), DiffusionObjective()).evaluate(batch)
    noise = seeded_noise([5, 6, 7], (4, 4, 2, 4), CPU)
    torch.testing.assert_close(figures["flow_loss"], (noise - batch["latent_BZthw"]).square().flatten(1).mean(1))


def test_it_learns_where_every_video_is_the_same(batch: Batch) -> None:
    """Then the noise can be told from x_t, and the velocity is known."""
    torch.manual_seed(0)
    trainable = DiTTrainable(VideoDiT(CONFIG), DiffusionObjective())
    player, batch = trainable.players[DIT], batch | {"latent_BZthw": torch.full((3, 4, 4, 2, 4), 2.0)}
    before = trainable.evaluate(batch)["flow_loss"].mean()
    optimizer = torch.optim.AdamW(player.parameters(), lr=5e-3)
    for step in range(60):
        optimizer.zero_grad()
        player(batch | {"seed_B": torch.arange(3) + 1000 * step}, step)[0].backward()
        optimizer.step()
    assert trainable.evaluate(batch)["flow_loss"].mean() < 0.2 * before


def test_it_exports_the_transformer(model: VideoDiT, tmp_path: Path) -> None:
    trainable = DiTTrainable(model, DiffusionObjective())
    assert trainable.active(DIT, 1) and not trainable.frozen
    trainable.export(tmp_path)
    assert trainable.digest(VideoDiT.from_pretrained(tmp_path)) == trainable.digest(model)
