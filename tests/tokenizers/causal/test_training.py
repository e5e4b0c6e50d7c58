"""The loss of a rung, that it is the same from cached features and on the fly (contract 5), and training against a discriminator."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, autograd

from kinetok.infra.fit import TURN, FitConfig, PlayerConfig
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.infra.training import Loop, Work
from kinetok.tokenizers.base import Batch
from kinetok.tokenizers.catalog import load, trainable
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.discriminator import EPSILON
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.perceptual import Lpips
from kinetok.tokenizers.causal.posterior import seeded_noise
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.training import (
    AdversarialConfig,
    AutoencoderPlayer,
    DiscriminatorPlayer,
    PerceptualConfig,
    ReconstructionObjective,
    RungTrainable,
    last_trained_layer,
    pixels,
    reconstruct,
)

GAN = AdversarialConfig(start=3, weight=0.5, lecam=0.1, width=4, layers=2)


def make_batch(clips: int = 3, frames: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(3)
    video = torch.randint(0, 256, (clips, frames, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return {"video_BTHWC": video, "seed_B": torch.arange(11, 11 + clips)}


def loss_of(model: Rung, batch: Batch, kl: float = 1e-3) -> torch.Tensor:
    loss, _ = RungTrainable(model, ReconstructionObjective(kl=kl)).players["autoencoder"](batch, 0)
    assert isinstance(loss, torch.Tensor)
    return loss


def cached(model: GrownTokenizer, batch: Batch) -> Batch:
    features = model.lower.growth_features(pixels(batch))
    return batch | {"full_BDthw": features.full_BDthw, "key_BDthw": features.key_BDthw}


def test_pixels_span_minus_one_to_one() -> None:
    bytes_BTHWC = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 1, 3)
    assert pixels({"video_BTHWC": bytes_BTHWC}).flatten().tolist() == pytest.approx([-1, 1, -0.6])
    assert pixels(make_batch()).shape == (3, 3, 9, 16, 16)


def test_loss_is_l1_plus_weighted_kl(base: CausalTokenizer) -> None:
    base.float()
    batch = make_batch()
    video = pixels(batch)
    posterior = base.heads.posterior(base.features(video))
    noise = seeded_noise([11, 12, 13], tuple(posterior.mean_BZthw.shape[1:]), video.device)
    output = base.decode_latent(posterior.sample(noise), 9)
    torch.testing.assert_close(loss_of(base, batch), (output - video).abs().mean() + 1e-3 * posterior.kl().mean())


def test_a_samples_noise_does_not_depend_on_its_company(base: CausalTokenizer) -> None:
    base.float()
    batch = make_batch()
    alone = [loss_of(base, {name: values[i : i + 1] for name, values in batch.items()}) for i in range(3)]
    torch.testing.assert_close(torch.stack(alone).mean(), loss_of(base, batch))
    reseeded = batch | {"seed_B": batch["seed_B"] + 1}
    assert loss_of(base, reseeded) != loss_of(base, batch)


@pytest.mark.parametrize("rung", ["shaken", "twice_grown"])
def test_cached_features_and_features_on_the_fly_give_one_loss_and_one_gradient(rung: str, request: pytest.FixtureRequest) -> None:
    model: GrownTokenizer = request.getfixturevalue(rung).float()
    batch = make_batch(frames=17)
    results = []
    for given in (batch, cached(model, batch)):
        model.zero_grad()
        loss = loss_of(model, given)
        loss.backward()
        results.append((loss.detach(), [weight.grad for weight in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_evaluation_is_per_sample_deterministic_and_the_same_from_cache(shaken: GrownTokenizer) -> None:
    shaken.float()
    batch = make_batch()
    figures = RungTrainable(shaken, ReconstructionObjective()).evaluate(batch)
    assert set(figures) == {"psnr", "l1", "kl"} and all(values.shape == (3,) for values in figures.values())
    torch.testing.assert_close(RungTrainable(shaken, ReconstructionObjective()).evaluate(cached(shaken, batch)), figures)
    reconstruction = shaken.decode(shaken.encode(pixels(batch)))
    torch.testing.assert_close(figures["l1"], (reconstruction - pixels(batch)).abs().flatten(1).mean(1))


def test_frozen_rungs_are_named_hashed_and_outside_every_player(base: CausalTokenizer, twice_grown: GrownTokenizer) -> None:
    training = RungTrainable(twice_grown, ReconstructionObjective())
    assert dict(training.frozen) == {"lower": twice_grown.lower, "lower.lower": base}
    assert training.digest(base) == base.spec().weights
    frozen = {id(weight) for module in training.frozen.values() for weight in module.parameters()}
    assert not frozen & {id(weight) for weight in training.players["autoencoder"].parameters()}
    assert not dict(RungTrainable(base, ReconstructionObjective()).frozen)


def test_gradient_steps_lower_the_loss_and_leave_the_frozen_rung_alone(grown: GrownTokenizer) -> None:
    grown.float()
    before = grown.lower.digest()
    batch = cached(grown, make_batch())
    optimizer = torch.optim.AdamW(grown.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = loss_of(grown, batch, kl=0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert grown.lower.digest() == before


def test_export_is_what_load_reads(shaken: GrownTokenizer, tmp_path: Path) -> None:
    shaken.float()
    trainable(shaken, ReconstructionObjective()).export(tmp_path)
    assert load(tmp_path).spec() == shaken.spec()


def test_autocast_gives_a_float32_loss_near_the_exact_one(shaken: GrownTokenizer) -> None:
    shaken.float()
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_of(shaken, batch)
        rounded.backward()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, loss_of(shaken, batch), rtol=0.05, atol=0.02)


def adversaries(model: Rung, **changes: object) -> tuple[RungTrainable, AutoencoderPlayer, DiscriminatorPlayer]:
    torch.manual_seed(3)
    training = RungTrainable(model, ReconstructionObjective(kl=0, adversarial=GAN, **changes))  # type: ignore[arg-type]
    autoencoder, discriminator = training.players["autoencoder"], training.players["discriminator"]
    assert isinstance(autoencoder, AutoencoderPlayer) and isinstance(discriminator, DiscriminatorPlayer)
    return training, autoencoder, discriminator


def test_players_follow_from_the_objective(base: CausalTokenizer) -> None:
    assert ReconstructionObjective().players == ("autoencoder",)
    training, autoencoder, discriminator = adversaries(base.float())
    assert tuple(training.players) == training.objective.players == ("autoencoder", "discriminator")
    shared = {id(weight) for weight in autoencoder.parameters()} & {id(weight) for weight in discriminator.parameters()}
    assert not shared and set(autoencoder.state_dict()) == {f"model.{name}" for name in base.state_dict()}
    assert list(ReconstructionObjective(adversarial=GAN).problems(3)) == []
    assert list(ReconstructionObjective(adversarial=GAN).problems(2)) == [
        "adversarial.start: the discriminator would start at step 3, after the last, 2"
    ]


def test_before_its_first_step_the_discriminator_changes_nothing(base: CausalTokenizer) -> None:
    training, autoencoder, _ = adversaries(base.float())
    batch = make_batch()
    loss, figures = autoencoder(batch, 2)
    torch.testing.assert_close(loss, loss_of(base, batch, kl=0), rtol=0, atol=0)
    assert set(figures) == {"l1", "kl"}
    assert [training.active("discriminator", step) for step in (1, 2, 3)] == [False, False, True]
    assert training.active("autoencoder", 1)


@pytest.mark.parametrize("rung", ["base", "shaken"])
def test_the_adversarial_term_pulls_the_last_trained_layer_as_the_reconstruction_does(rung: str, request: pytest.FixtureRequest) -> None:
    model: CausalTokenizer | GrownTokenizer = request.getfixturevalue(rung).float()
    _, autoencoder, discriminator = adversaries(model)
    batch, layer = make_batch(), last_trained_layer(model).weight
    assert layer.requires_grad
    output, _ = reconstruct(model, batch, pixels(batch))
    l1, generator = (output - pixels(batch)).abs().mean(), -discriminator.net(output).mean()
    (pull,), (push,) = autograd.grad(l1, layer, retain_graph=True), autograd.grad(generator, layer)
    loss, figures = autoencoder(batch, 3)
    weight = pull.norm() / (push.norm() + EPSILON)
    torch.testing.assert_close(figures["gan_weight"], weight)
    torch.testing.assert_close(loss, l1 + GAN.weight * weight * generator)


def test_the_discriminator_learns_from_the_reconstruction_alone_and_keeps_lecams_averages(base: CausalTokenizer) -> None:
    _, _, discriminator = adversaries(base.float())
    loss, figures = discriminator(make_batch(), 3)
    loss.backward()
    torch.testing.assert_close(loss.detach(), figures["gan_d"] + GAN.lecam * figures["gan_lecam"])
    assert all(weight.grad is None for weight in base.parameters())
    assert all(weight.grad is not None for weight in discriminator.parameters())
    discriminator(make_batch(), 3)
    assert discriminator.lecam.real == 0, "a second micro-batch of the same step"
    discriminator(make_batch(), 4)
    torch.testing.assert_close(discriminator.lecam.real, 0.01 * figures["gan_real"])
    assert {"lecam.real", "lecam.fake"} <= set(discriminator.state_dict())


@pytest.mark.parametrize("player", ["autoencoder", "discriminator"])
def test_what_is_decoded_while_training_is_a_sample_or_the_mean(base: CausalTokenizer, player: str) -> None:
    """The seeds of a batch matter to a sample alone."""
    batches = [make_batch(), make_batch() | {"seed_B": torch.tensor([7, 8, 9])}]
    for posterior, noisy in (("sample", True), ("mode", False)):
        torch.manual_seed(0)
        objective = ReconstructionObjective.model_validate({"adversarial": GAN, "posterior": posterior})
        losses = [RungTrainable(base.float(), objective).players[player](batch, 1)[0].item() for batch in batches[:1]]
        torch.manual_seed(0)
        losses += [RungTrainable(base.float(), objective).players[player](batch, 1)[0].item() for batch in batches[1:]]
        assert (losses[0] != losses[1]) is noisy
    assert "posterior" not in ReconstructionObjective().model_dump() and objective.model_dump()["posterior"] == "mode"


@pytest.mark.parametrize("part", ["last", "all"])
def test_the_adaptive_weight_is_found_where_an_unfrozen_decoder_makes_pixels(base: CausalTokenizer, part: str) -> None:
    model = GrownTokenizer(GrownConfig.model_validate({"blocks": 1, "groups": 4, "unfreeze_decoder": part}), base)
    layer = last_trained_layer(model)
    assert layer.out_channels == base.decoder.to_pixels.out_channels and layer is not base.decoder.to_pixels
    assert layer.weight.requires_grad and not base.decoder.to_pixels.weight.requires_grad


def test_lpips_joins_loss_evaluation_and_frozen_modules_where_the_job_names_weights(base: CausalTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = Lpips().features.state_dict()
    save_file({f"features.{name}": weight for name, weight in features.items()}, tmp_path / "vgg.safetensors")
    perceptual = PerceptualConfig(weights=str(tmp_path / "vgg.safetensors"), weight=0.5)
    objective = ReconstructionObjective(kl=0, perceptual=perceptual)
    assert objective.notes() == () and ReconstructionObjective().notes() != ()
    training, batch = RungTrainable(base.float(), objective), make_batch(frames=1)
    loss, figures = training.players["autoencoder"](batch, 1)
    assert figures["lpips"] > 0
    torch.testing.assert_close(loss, figures["l1"] + 0.5 * figures["lpips"])
    output = base.decode(base.encode(pixels(batch)))
    assert training.lpips is not None and training.evaluate(batch)["lpips"].shape == (3,)
    torch.testing.assert_close(training.evaluate(batch)["lpips"], training.lpips(output, pixels(batch)))
    assert dict(training.frozen) == {"lpips": training.lpips}
    assert len(training.digest(training.lpips)) == 64
    assert not [name for name in training.players["autoencoder"].state_dict() if not name.startswith("model.")]


class Clips:
    """Feed of four random clips, over and over."""

    def __len__(self) -> int:
        return 4

    def batches(self, *, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        clips = make_batch(4, 5)
        while True:
            rows = torch.arange(start, start := start + batch) % 4
            yield {name: values[rows] for name, values in clips.items()}


class Interrupted(Exception):
    """Stands for a kill."""


class Session:
    """The session of a run alone in this process, which ends with an Interrupted after the checkpoint of step `until`."""

    rank, local_rank, world, device = 0, 0, 1, torch.device("cpu")

    def __init__(self, folder: Path, until: int) -> None:
        self.folder, self.until = folder, until

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        yield self.folder if self.folder.exists() else None

    def report(self, step: int, folder: Path) -> None:
        shutil.copytree(folder, self.folder, dirs_exist_ok=True)
        if step == self.until:
            raise Interrupted

    def preempted(self) -> bool:
        return False


def small_trainable() -> RungTrainable:
    config = CausalConfig(channels=4, mult=(1, 1), strides=((2, 2),), blocks=1, z=2, patch=2, groups=2)
    adversarial = AdversarialConfig(start=2, width=4, layers=2, lecam=0.1)
    return RungTrainable(CausalTokenizer(config), ReconstructionObjective(adversarial=adversarial))


def play(folder: Path, until: int = 0) -> dict[str, Tensor]:
    """Every number of both players after a run, or nothing where it was interrupted."""
    players = {name: PlayerConfig(lr=1e-3) for name in ("autoencoder", "discriminator")}
    config = FitConfig(steps=4, global_batch=2, optimizers=players, ema=0.9, log_every=1, checkpoint_every=3)
    out = Folder(str(folder))
    out.write_text(TURN, "mine")
    work = Work(small_trainable, Clips(), Clips(), config, out, Resources(batch_size=2), "mine")
    loop = Loop(work, Session(folder / "checkpoint", until))
    with contextlib.suppress(Interrupted):
        loop.run()
    return {f"{player}.{name}": tensor for player, net in loop.trainable.players.items() for name, tensor in net.state_dict().items()}


@pytest.mark.usefixtures("process_group")
def test_a_resumed_run_ends_with_the_same_discriminator_and_averages(tmp_path: Path) -> None:
    whole = play(tmp_path / "whole")
    play(tmp_path / "parts", until=3)
    torch.testing.assert_close(play(tmp_path / "parts"), whole, rtol=0, atol=0)
    assert whole["discriminator.lecam.real"] != 0
    lines = [read_metrics(Folder(str(tmp_path / name))) for name in ("whole", "parts")]
    for mine, theirs in zip(*lines, strict=True):
        clock = {"time", "train/samples_per_second"}
        assert {k: v for k, v in mine.items() if k not in clock} == {k: v for k, v in theirs.items() if k not in clock}
    assert ["train/gan_d" in line for line in lines[0]] == [False, True, True, True]
