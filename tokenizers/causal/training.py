"""Objectives of the ladder, and the trainable that `kinetok.infra.training.fit` drives (by structure: nothing of infra is imported).

Loss of every rung, as in arXiv 2501.05442: L = |x - x_hat| + kl * KL(posterior || N(0, 1)), both means, computed in float32. The
posterior noise of a sample comes from its own `seed_B` alone. Batches hold `video_BTHWC` (bytes) and `seed_B`; a grown rung also takes
`full_BDthw` and `key_BDthw`, cached `GrowthFeatures` of the frozen rung below, and computes them where they are absent.
Not covered: adversarial and perceptual terms.

Legend: B clips, T H W C frames, rows, columns, channels, D trunk width, t h w latent positions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from kinetok.tokenizers.base import Batch, Config, GrowthFeatures
from kinetok.tokenizers.causal.grown import GrownTokenizer
from kinetok.tokenizers.causal.posterior import seeded_noise
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.metrics import clip_psnr

AUTOENCODER = "autoencoder"


class ReconstructionObjective(Config):
    """Weights of the loss of a ladder's rung."""

    players: ClassVar[tuple[str, ...]] = (AUTOENCODER,)
    """Names of what gets an optimizer."""
    kl: Annotated[float, Field(ge=0)] = 1e-6
    """Weight of the KL term, in nats per latent number, against the mean absolute error of pixels in [-1, 1]."""


class Player(nn.Module):
    """What the optimizer sees: a rung's trained weights, and the loss as `forward`."""

    def __init__(self, model: Rung, objective: ReconstructionObjective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and its parts."""
        video_BCTHW = pixels(batch)
        posterior = self.model.heads.posterior(trunk_features(self.model, batch, video_BCTHW))
        noise = seeded_noise(batch["seed_B"].tolist(), tuple(posterior.mean_BZthw.shape[1:]), video_BCTHW.device)
        output_BCTHW = self.model.decode_latent(posterior.sample(noise), frames=video_BCTHW.shape[2])
        l1 = (output_BCTHW.float() - video_BCTHW).abs().mean()
        kl = posterior.kl().mean()
        return l1 + self.objective.kl * kl, {"l1": l1.detach(), "kl": kl.detach()}


class RungTrainable:
    """One rung, the base or a grown one, as the training loop takes it: the rungs below it are frozen."""

    def __init__(self, model: Rung, objective: ReconstructionObjective) -> None:
        self.model = model
        self.players: Mapping[str, nn.Module] = {AUTOENCODER: Player(model, objective)}
        self.frozen: Mapping[str, nn.Module] = rungs_below(model)

    def active(self, player: str, step: int) -> bool:
        """The one player always takes part."""
        return True

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """PSNR in dB, mean absolute error and KL of the deterministic reconstruction, each (B,)."""
        video_BCTHW = pixels(batch)
        posterior = self.model.heads.posterior(trunk_features(self.model, batch, video_BCTHW))
        output_BCTHW = self.model.decode_latent(posterior.mean_BZthw, frames=video_BCTHW.shape[2]).clamp(-1, 1).float()
        l1_B = (output_BCTHW - video_BCTHW).abs().flatten(1).mean(1)
        return {"psnr": clip_psnr(output_BCTHW, video_BCTHW), "l1": l1_B, "kl": posterior.kl()}

    def digest(self, module: nn.Module) -> str:
        """Digest of a frozen rung: the `weights` that its token and feature shards carry."""
        assert isinstance(module, Rung)
        return module.digest()

    def export(self, folder: Path) -> None:
        """Save the model, its frozen rungs included."""
        self.model.save_pretrained(folder)


def pixels(batch: Batch) -> Tensor:
    """`video_BTHWC` bytes as floats in [-1, 1], (B, C, T, H, W)."""
    return batch["video_BTHWC"].permute(0, 4, 1, 2, 3).float() / 127.5 - 1


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
    while isinstance(model, GrownTokenizer):
        model = model.lower
        below[name] = model
        name += ".lower"
    return below
