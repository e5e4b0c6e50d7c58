"""Stages of Divot's training: what learns, from what, and that cached inputs and those made on the fly are the same."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kinetok.tokenizers.base import Batch
from kinetok.tokenizers.causal.training import pixels
from kinetok.tokenizers.divot import schedule
from kinetok.tokenizers.divot.ddim import SamplerConfig
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
from kinetok.tokenizers.divot.training import DivotObjective, DivotTrainable

CLIPS = 3


@pytest.fixture
def films() -> Batch:
    """Clips on the fly."""
    video = torch.randint(0, 256, (CLIPS, 5, 16, 16, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return {"video_BTHWC": video, "seed_B": torch.arange(7, 7 + CLIPS)}


@pytest.fixture
def batch(model: DivotTokenizer, films: Batch) -> Batch:
    """The same clips from caches."""
    video = films["video_BTHWC"].permute(0, 4, 1, 2, 3) / 127.5 - 1
    latent = model.lower.encode(video).values.transpose(1, 2)
    return {"vit_BTND": model.vit_features(video), "latent_BTZhw": latent, "seed_B": films["seed_B"]}


def loss_of(model: DivotTokenizer, batch: Batch, objective: DivotObjective) -> Tensor:
    loss, _ = DivotTrainable(model, objective).players["divot"](batch, 0)
    assert isinstance(loss, Tensor)
    return loss


@torch.no_grad()
def shake(model: DivotTokenizer) -> None:
    """As if trained: no weight is zero any more."""
    generator = torch.Generator().manual_seed(9)
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def test_the_loss_is_that_of_v(model: DivotTokenizer, batch: Batch) -> None:
    """At the start the U-Net says v = 0, so the loss is the mean square of v."""
    player = DivotTrainable(model, DivotObjective()).player
    losses = []
    for place, seed in enumerate(batch["seed_B"].tolist()):
        generator = torch.Generator().manual_seed(seed)
        t = torch.randint(1000, (1,), generator=generator)
        torch.rand((), generator=generator)
        x = model.detokenizer.normalise(batch["latent_BTZhw"][place : place + 1].transpose(1, 2))
        losses.append(schedule.velocity(x, torch.randn(x.shape[1:], generator=generator), t).square().mean())
    torch.testing.assert_close(player(batch, 0)[0], torch.stack(losses).mean())


@pytest.mark.parametrize("stage", ["joint", "refine"])
def test_caches_and_clips_give_one_loss_and_one_gradient(model: DivotTokenizer, batch: Batch, films: Batch, stage: str) -> None:
    shake(model)
    objective = DivotObjective.model_validate({"stage": stage})
    results = []
    for given in (batch, films):
        model.zero_grad()
        loss = loss_of(model, given, objective)
        loss.backward()
        results.append((loss.detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(("stage", "trained"), [("joint", True), ("refine", False), ("adapt", False)])
def test_the_encoder_learns_in_the_joint_stage_alone(model: DivotTokenizer, batch: Batch, stage: str, trained: bool) -> None:
    shake(model)
    training = DivotTrainable(model, DivotObjective.model_validate({"stage": stage}))
    assert ("encoder" in training.frozen) is not trained
    training.players["divot"](batch, 0)[0].backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in model.encoder.parameters()) is trained
    assert all(weight.grad is not None for weight in model.detokenizer.parameters())
    own = {id(weight) for weight in training.players["divot"].parameters()}
    assert not own & {id(weight) for module in training.frozen.values() for weight in module.parameters()}
    assert training.digest(model.lower) == model.lower.spec().weights


def test_a_samples_loss_does_not_depend_on_its_company(model: DivotTokenizer, batch: Batch) -> None:
    shake(model)
    objective = DivotObjective(stage="refine", drop=0.5)
    alone = [loss_of(model, {name: values[i : i + 1] for name, values in batch.items()}, objective) for i in range(CLIPS)]
    torch.testing.assert_close(torch.stack(alone).mean(), loss_of(model, batch, objective))
    assert loss_of(model, batch | {"seed_B": batch["seed_B"] + 1}, objective) != loss_of(model, batch, objective)


def test_given_tokens_take_the_place_of_features(model: DivotTokenizer, batch: Batch) -> None:
    shake(model)
    objective = DivotObjective(stage="adapt")
    with torch.no_grad():
        token_BND = model.encoder(batch["vit_BTND"])
    drawn = {"token_BND": token_BND, "latent_BTZhw": batch["latent_BTZhw"], "seed_B": batch["seed_B"]}
    torch.testing.assert_close(loss_of(model, drawn, objective), loss_of(model, batch, objective))
    assert loss_of(model, drawn | {"token_BND": -token_BND}, objective) != loss_of(model, drawn, objective)


def test_a_dropped_condition_is_a_grey_clip(model: DivotTokenizer, batch: Batch) -> None:
    shake(model)
    null = {"token_BND": model.null_tokens().expand(CLIPS, -1, -1), "latent_BTZhw": batch["latent_BTZhw"], "seed_B": batch["seed_B"]}
    almost_all = DivotObjective(stage="refine", drop=0.999999)
    torch.testing.assert_close(loss_of(model, batch, almost_all), loss_of(model, null, DivotObjective(stage="refine", drop=0)))
    grey = torch.zeros(1, 3, 5, 16, 16)
    torch.testing.assert_close(model.encode(grey).values[0], model.null_tokens())


def test_recomputed_activations_give_the_same_gradient(model: DivotTokenizer, batch: Batch) -> None:
    shake(model)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        loss_of(model, batch, DivotObjective(recompute=recompute)).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_steps_lower_the_loss_and_tokens_come_to_matter(model: DivotTokenizer) -> None:
    """Clips of one colour each: what is left of the loss without the tokens is not knowing which."""
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    films = {"video_BTHWC": colours[:, None, None, None].expand(CLIPS, 5, 16, 16, 3), "seed_B": torch.arange(CLIPS)}
    latent = model.lower.encode(pixels(films)).values.transpose(1, 2)
    batch = {"vit_BTND": model.vit_features(pixels(films)), "latent_BTZhw": latent / latent.std(), "seed_B": films["seed_B"]}
    model.encoder.fit_statistics(batch["vit_BTND"])
    training = DivotTrainable(model, DivotObjective())
    first = training.evaluate(batch)
    assert set(first) == {"v_loss", "v_loss_null"} and first["v_loss"].shape == (CLIPS,)
    torch.testing.assert_close(first["v_loss"], first["v_loss_null"])
    optimizer = torch.optim.AdamW(training.players["divot"].parameters(), lr=1e-3)
    for step in range(60):
        training.players["divot"](batch | {"seed_B": batch["seed_B"] + CLIPS * step}, step)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    last = training.evaluate(batch)
    assert last["v_loss"].mean() < 0.8 * first["v_loss"].mean()
    assert last["v_loss"].mean() < 0.9 * last["v_loss_null"].mean()


def test_the_loss_depends_on_the_frame_stride_once_its_embedding_has_learned(model: DivotTokenizer, batch: Batch) -> None:
    """Its last layer starts at zero. The configured stride, given, is as none given; of two clips each has its own."""
    objective, unet = DivotObjective(stage="refine", drop=0), model.detokenizer.unet
    losses = DivotTrainable(model, objective).evaluate

    def told(*strides: float) -> Tensor:
        return losses(batch | {"stride_B": torch.tensor(strides)})["v_loss"]

    shake(model)
    last = unet.from_stride[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        assert torch.equal(told(3, 3, 3), told(1, 7.5, 3))
        last.weight.normal_(generator=torch.Generator().manual_seed(0))
    configured = losses(batch)["v_loss"]
    torch.testing.assert_close(told(3, 3, 3), configured)
    own = told(3, 7.5, 1)
    torch.testing.assert_close(own[0], configured[0])
    assert (own - configured).abs()[1:].min() > 1e-5
    with_strides = batch | {"stride_B": torch.tensor([3.0, 7.5, 1.0])}
    assert abs(loss_of(model, with_strides, objective) - loss_of(model, batch, objective)) > 1e-5
    assert objective.model_dump().keys() == {"kind", "stage", "drop", "recompute"} and DivotObjective(stride=True).model_dump()["stride"]


def test_videos_are_sampled_at_a_given_frame_stride(model: DivotTokenizer) -> None:
    shake(model)
    token_BND = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(4))
    config = model.config.sampler

    def sample(stride: float | None) -> Tensor:
        given = SamplerConfig.model_validate(config.model_dump() | {"stride": stride})
        return model.detokenizer.sample(token_BND, model.null_tokens(), model.latent_size, given, [0, 1])

    torch.testing.assert_close(sample(None), sample(model.config.detokenizer.unet.stride))
    assert not torch.allclose(sample(None), sample(6.5), atol=1e-3)
    assert "stride" not in model.config.model_dump()["sampler"] and SamplerConfig(stride=2).model_dump()["stride"] == 2
    with pytest.raises(ValidationError):
        SamplerConfig(stride=0)


def test_dropping_in_the_joint_stage_is_a_problem() -> None:
    assert not list(DivotObjective().problems(10)) and not list(DivotObjective(stage="refine").problems(10))
    assert "refine" in next(iter(DivotObjective(drop=0.1).problems(10)))
    assert (DivotObjective().dropped, DivotObjective(stage="adapt").dropped, DivotObjective(stage="refine", drop=0).dropped) == (0, 0.05, 0)


def test_autocast_gives_a_float32_loss_near_the_exact_one(model: DivotTokenizer, batch: Batch) -> None:
    shake(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_of(model, batch, DivotObjective())
        rounded.backward()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, loss_of(model, batch, DivotObjective()), rtol=0.05, atol=0.02)


def test_the_exported_model_names_its_loss(model: DivotTokenizer, tmp_path: Path) -> None:
    DivotTrainable(model, DivotObjective(stage="refine")).export(tmp_path)
    assert DivotTokenizer.from_pretrained(tmp_path).spec() == model.spec()
    assert "`stage`" in (tmp_path / "README.md").read_text()
