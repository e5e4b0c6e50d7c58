"""Objectives of the ladder, and the trainable that `kinetok.infra.training.fit` drives (by structure: nothing of infra is imported).

    L = L_rec + kl * KL(posterior || N(0, 1)) + weight * adaptive * L_G        L_rec = |x - x_hat| + weight * LPIPS(x, x_hat)

Means all, computed in float32. |.| and KL are the loss that arXiv 2501.05442 draws for a grown rung; its base adds a GAN, and where
LPIPS stands is not known, so both are named by the job or left out. With an adversarial term two players take turns on the same clips:
the autoencoder, then the discriminator on what the autoencoder now makes of them. The posterior noise of a sample comes from its own
`seed_B` alone. Batches hold `video_BTHWC` (bytes) and `seed_B`; a grown rung also takes `full_BDthw` and `key_BDthw`, cached
`GrowthFeatures` of the frozen rung below, and computes them where they are absent.

Legend: B clips, T H W C frames, rows, columns, channels, D trunk width, t h w latent positions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kinetok.tokenizers.base import Batch, Config, Count, GrowthFeatures, weights_digest
from kinetok.tokenizers.card import CARD_FILE, model_card
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.discriminator import Lecam, PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss
from kinetok.tokenizers.causal.grown import GrownTokenizer
from kinetok.tokenizers.causal.perceptual import Lpips, load_lpips
from kinetok.tokenizers.causal.posterior import Posterior, seeded_noise
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.metrics import clip_psnr

AUTOENCODER = "autoencoder"
DISCRIMINATOR = "discriminator"
LPIPS = "lpips"
NO_LPIPS = "trains without LPIPS: objective.perceptual names no weights"

Weight = Annotated[float, Field(gt=0)]


class PerceptualConfig(Config):
    """The LPIPS term, and the `lpips` figure of evaluation."""

    weights: str
    """Of VGG16: a file on every worker, or owner/repository/file on the Hugging Face hub (`load_lpips`)."""
    weight: Weight = 1.0
    """Of the term, against the mean absolute error."""


class AdversarialConfig(Config):
    """The GAN term and its discriminator."""

    start: Count
    """First step in which the discriminator takes part."""
    weight: Weight = 0.2
    """Of the generator's loss after its gradient was brought to the size of the reconstruction's (`adaptive_weight`)."""
    lecam: Annotated[float, Field(ge=0)] = 0.005
    """Of the LeCAM penalty in the discriminator's loss."""
    width: Count = 64
    """Channels of the discriminator's first level."""
    layers: Count = 3
    """Halvings of time and space in the discriminator; a clip's edge is at least 2**layers pixels."""


class ReconstructionObjective(Config):
    """Weights of the loss of a ladder's rung."""

    # Not dumped: it would give every rung that was trained before there were other kinds another key.
    kind: Annotated[Literal["reconstruction"], Field(exclude=True)] = "reconstruction"
    kl: Annotated[float, Field(ge=0)] = 1e-6
    """Weight of the KL term, in nats per latent number, against the mean absolute error of pixels in [-1, 1]."""
    # The default is not dumped, for the same reason.
    posterior: Annotated[Literal["sample", "mode"], Field(exclude_if=lambda value: value == "sample")] = "sample"
    """What is decoded while training: a sample of the posterior, or its mean; encoding and evaluation take the mean."""
    perceptual: PerceptualConfig | None = None
    """None trains without LPIPS, and the run says so."""
    adversarial: AdversarialConfig | None = None
    """None trains without a discriminator."""

    @property
    def players(self) -> tuple[str, ...]:
        """Names of what gets an optimizer."""
        return (AUTOENCODER,) if self.adversarial is None else (AUTOENCODER, DISCRIMINATOR)

    def problems(self, steps: int) -> Iterator[str]:
        """What cannot be meant in a run of `steps` steps, as `field: sentence`; opens no files."""
        if self.adversarial is not None and self.adversarial.start > steps:
            yield f"adversarial.start: the discriminator would start at step {self.adversarial.start}, after the last, {steps}"

    def notes(self) -> tuple[str, ...]:
        """What a run must say of its loss. Raises ValueError where weights that the job names cannot be had."""
        if self.perceptual is None:
            return (NO_LPIPS,)
        load_lpips(self.perceptual.weights)
        return ()


@dataclass(frozen=True)
class Judges:
    """The networks a loss runs through that the player does not train. (A dataclass hides them from `nn.Module`'s registration.)"""

    lpips: Lpips | None
    discriminator: PatchDiscriminator | None


class AutoencoderPlayer(nn.Module):
    """What the optimizer sees: a rung's trained weights, and the loss as `forward`."""

    def __init__(self, model: Rung, objective: ReconstructionObjective, judges: Judges) -> None:
        super().__init__()
        self.model, self.objective, self.judges = model, objective, judges
        # A tuple, or the layer would be registered a second time.
        self.balanced: tuple[nn.Conv3d, ...] = (last_trained_layer(model),) if judges.discriminator is not None else ()

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and its parts."""
        video_BCTHW = pixels(batch)
        output_BCTHW, posterior = reconstruct(self.model, batch, video_BCTHW, self.objective.posterior)
        figures = {"l1": (output_BCTHW - video_BCTHW).abs().mean(), "kl": posterior.kl().mean()}
        reconstruction = figures["l1"]
        if self.objective.perceptual is not None and self.judges.lpips is not None:
            figures[LPIPS] = self.judges.lpips(output_BCTHW, video_BCTHW).mean()
            reconstruction = reconstruction + self.objective.perceptual.weight * figures[LPIPS]
        loss = reconstruction + self.objective.kl * figures["kl"]
        adversarial = self.objective.adversarial
        if adversarial is not None and self.judges.discriminator is not None and step >= adversarial.start:
            figures["gan_g"] = generator_loss(self.judges.discriminator(output_BCTHW))
            (layer,) = self.balanced
            figures["gan_weight"] = adaptive_weight(reconstruction, figures["gan_g"], layer.weight)
            loss = loss + adversarial.weight * figures["gan_weight"] * figures["gan_g"]
        return loss, {name: value.detach() for name, value in figures.items()}


class DiscriminatorPlayer(nn.Module):
    """The discriminator's weights, LeCAM's averages, and its loss on a batch and on the rung's reconstruction of it."""

    def __init__(self, model: Rung, adversarial: AdversarialConfig, posterior: Literal["sample", "mode"] = "sample") -> None:
        super().__init__()
        self.net = PatchDiscriminator(adversarial.width, adversarial.layers)
        self.lecam = Lecam()
        self.weight, self.posterior = adversarial.lecam, posterior
        self.judged = (model,)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and its parts."""
        video_BCTHW = pixels(batch)
        with torch.no_grad():
            output_BCTHW, _ = reconstruct(*self.judged, batch, video_BCTHW, self.posterior)
        real, fake = self.net(video_BCTHW), self.net(output_BCTHW)
        self.lecam.begin(step)
        hinge, lecam = hinge_loss(real, fake), self.lecam(real, fake)
        self.lecam.update(real, fake)
        figures = {"gan_d": hinge, "gan_lecam": lecam, "gan_real": real.mean(), "gan_fake": fake.mean()}
        return hinge + self.weight * lecam, {name: value.detach() for name, value in figures.items()}


class RungTrainable:
    """One rung, the base or a grown one, as the training loop takes it: the rungs below it and LPIPS are frozen."""

    def __init__(self, model: Rung, objective: ReconstructionObjective, lpips: Lpips | None = None) -> None:
        """`lpips` stands in for the network whose weights the objective names, where only its size matters."""
        self.model, self.objective = model, objective
        self.lpips = (lpips or load_lpips(objective.perceptual.weights)) if objective.perceptual is not None else None
        adversarial = objective.adversarial
        critic = DiscriminatorPlayer(model, adversarial, objective.posterior) if adversarial is not None else None
        autoencoder = AutoencoderPlayer(model, objective, Judges(self.lpips, critic.net if critic is not None else None))
        self.players: Mapping[str, nn.Module] = {AUTOENCODER: autoencoder} | ({DISCRIMINATOR: critic} if critic is not None else {})
        self.frozen: Mapping[str, nn.Module] = rungs_below(model) | ({LPIPS: self.lpips} if self.lpips is not None else {})

    def active(self, player: str, step: int) -> bool:
        """The discriminator waits for its first step."""
        return player == AUTOENCODER or (self.objective.adversarial is not None and step >= self.objective.adversarial.start)

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """PSNR in dB, mean absolute error, KL and, with its weights, LPIPS of the deterministic reconstruction, each (B,)."""
        video_BCTHW = pixels(batch)
        posterior = self.model.heads.posterior(trunk_features(self.model, batch, video_BCTHW))
        output_BCTHW = self.model.decode_latent(posterior.mean_BZthw, frames=video_BCTHW.shape[2]).clamp(-1, 1).float()
        l1_B = (output_BCTHW - video_BCTHW).abs().flatten(1).mean(1)
        figures = {"psnr": clip_psnr(output_BCTHW, video_BCTHW), "l1": l1_B, "kl": posterior.kl()}
        return figures if self.lpips is None else figures | {LPIPS: self.lpips(output_BCTHW, video_BCTHW)}

    def digest(self, module: nn.Module) -> str:
        """Digest of a frozen module; of a rung, the `weights` that its token and feature shards carry."""
        return module.digest() if isinstance(module, Rung) else weights_digest(module)

    def export(self, folder: Path) -> None:
        """Save the model, its frozen rungs included; its card names the loss."""
        self.model.save_pretrained(folder)
        (folder / CARD_FILE).write_text(model_card(self.model, self.objective))


def pixels(batch: Batch) -> Tensor:
    """`video_BTHWC` bytes as floats in [-1, 1], (B, C, T, H, W)."""
    return batch["video_BTHWC"].permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def reconstruct(model: Rung, batch: Batch, video_BCTHW: Tensor, drawn: Literal["sample", "mode"] = "sample") -> tuple[Tensor, Posterior]:
    """The video decoded from a sample of the posterior, or from its mean, float32 and not clamped, and the posterior."""
    posterior = model.heads.posterior(trunk_features(model, batch, video_BCTHW))
    latent_BZthw = posterior.mean_BZthw
    if drawn == "sample":
        latent_BZthw = posterior.sample(seeded_noise(batch["seed_B"].tolist(), tuple(latent_BZthw.shape[1:]), video_BCTHW.device))
    return model.decode_latent(latent_BZthw, frames=video_BCTHW.shape[2]).float(), posterior


def trunk_features(model: Rung, batch: Batch, video_BCTHW: Tensor) -> Tensor:
    """The model's trunk features of a batch, from the cached features of the rung below where the batch holds them."""
    if isinstance(model, GrownTokenizer) and "full_BDthw" in batch:
        mixed_BDthw: Tensor = model.mix(GrowthFeatures(batch["full_BDthw"], batch["key_BDthw"]))
        return mixed_BDthw
    return model.features(video_BCTHW)


def rungs_below(model: Rung) -> dict[str, nn.Module]:
    """Every frozen rung, the nearest first: `lower`, `lower.lower` and so on."""
    below: dict[str, nn.Module] = {}
    name = "lower"
    while model.lower is not None:
        model = below[name] = model.lower
        name += ".lower"
    return below


def last_trained_layer(model: Rung) -> nn.Conv3d:
    """The layer whose kernel the adaptive weight balances gradients at: the last one the model trains on the way to the pixels.

    In a base, and in a rung that trains a decoder below, it makes the pixels. Else a grown rung's pixel decoder is frozen, so there it is
    the kernel that doubles the steps, the last before the frozen trunk; the two extra backward passes then run through that trunk.
    """
    if not isinstance(model, CausalTokenizer | GrownTokenizer):
        raise ValueError(f"a {model.config.kind!r} model has no decoder layer of its own to train: leave objective.adversarial out")
    if isinstance(model, GrownTokenizer):
        layer = model.below[-1].to_pixels if model.below else model.decoder.up.conv
    else:
        layer = model.decoder.to_pixels
    assert isinstance(layer, nn.Conv3d)
    return layer
