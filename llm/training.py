"""The objective of the diffusion transformer, and the trainable that `kinetok.infra.training.fit` drives (by structure).

Loss: flow matching on normalised latents (`flow.py`), with the caption of some samples dropped so that the model also learns the
velocity without text, which guidance needs. Batches hold `latent_BZthw` (float32, as the tokenizer wrote them), `text_BLE` (float32),
`text_mask_BL` (bool) and `seed_B`, from which alone a sample's noise, time and dropping come.

Legend: B samples, Z latent channels, t h w latent positions, L text tokens, E text width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kinetok.llm.card import generator_card
from kinetok.llm.dit import VideoDiT
from kinetok.llm.flow import draw, flow_loss, logit_normal
from kinetok.tokenizers.base import Batch, Config, weights_digest
from kinetok.tokenizers.card import CARD_FILE
from kinetok.tokenizers.causal.posterior import seeded_noise

DIT = "dit"
EVALUATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Midpoints of five equal parts of [0, 1]: the same at every evaluation, so that figures of different steps compare."""


class DiffusionObjective(Config):
    """How a diffusion transformer is trained."""

    players: ClassVar[tuple[str, ...]] = (DIT,)
    """Names of what gets an optimizer."""
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of the samples that are shown without their text."""
    time_mean: float = 0.0
    """Of the normal variable whose logistic function is the time; above 0 means more noise."""
    time_std: Annotated[float, Field(gt=0)] = 1.0


class Player(nn.Module):
    """What the optimizer sees: the transformer, and the loss as `forward`."""

    def __init__(self, model: VideoDiT, objective: DiffusionObjective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and the scale of the latents: a root mean square far from 1 tells of wrong statistics."""
        x_BZthw = self.model.normalise(batch["latent_BZthw"])
        draws = draw(batch["seed_B"].tolist(), x_BZthw.shape[1:], x_BZthw.device)
        time_B = logit_normal(draws.normal_B, self.objective.time_mean, self.objective.time_std)
        shown_B1 = (draws.uniform_B >= self.objective.caption_dropout)[:, None]
        loss_B = flow_loss(self.model, x_BZthw, draws.noise_BZthw, time_B, batch["text_BLE"], batch["text_mask_BL"] & shown_B1)
        return loss_B.mean(), {"latent_rms": x_BZthw.square().mean().sqrt()}


class DiTTrainable:
    """A diffusion transformer as the training loop takes it; the latents and embeddings it learns from are cached."""

    def __init__(self, model: VideoDiT, objective: DiffusionObjective) -> None:
        self.model, self.objective = model, objective
        self.players: Mapping[str, nn.Module] = {DIT: Player(model, objective)}
        self.frozen: Mapping[str, nn.Module] = {}

    def active(self, player: str, step: int) -> bool:
        """The one player always takes part."""
        return True

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Flow-matching loss with every caption shown, over `EVALUATION_TIMES`, with each sample's own noise; (B,)."""
        x_BZthw = self.model.normalise(batch["latent_BZthw"])
        noise_BZthw = seeded_noise(batch["seed_B"].tolist(), tuple(x_BZthw.shape[1:]), x_BZthw.device)
        losses = [
            flow_loss(self.model, x_BZthw, noise_BZthw, x_BZthw.new_full((len(x_BZthw),), time), batch["text_BLE"], batch["text_mask_BL"])
            for time in EVALUATION_TIMES
        ]
        return {"flow_loss": torch.stack(losses).mean(0)}

    def digest(self, module: nn.Module) -> str:
        """Digest of a module's weights; nothing here is frozen."""
        return weights_digest(module)

    def export(self, folder: Path) -> None:
        """Save the transformer; its card names the objective."""
        self.model.save_pretrained(folder)
        (folder / CARD_FILE).write_text(generator_card(self.model, self.objective))
