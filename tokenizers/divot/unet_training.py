"""The first stage of Divot's training: DynamiCrafter's U-Net comes to do without the image beside its latents (arXiv 2412.04432, A.1).

    L = mean (v_hat(x_t, t, caption, image) - v)^2

The U-Net is trained, and the Perceiver that makes 16 tokens for each frame of the latent from one image; embeddings of the caption stand
before those. Everything else of the model waits, untrained, for the joint stage, and the Perceiver of the images is thrown away. Started
from DynamiCrafter's checkpoint, both are DynamiCrafter's, which reads the same vision transformer (OpenCLIP's ViT-H/14); it was trained
on the captions of OpenCLIP's text encoder, its last layer but one, all 77 positions (`layer: penultimate`, `padding: read` of
`kinetok.llm.text`). One thing differs: its Perceiver also read the class token, one of 257, which features of clips leave out. Without a
checkpoint both start from random weights.

Not published, and chosen here: the frame is one of those the tokenizer sees, drawn by `seed_B`, and the Perceiver goes on learning beside
the U-Net, as it did in DynamiCrafter's own training; no condition is dropped.

Batches hold `latent_BTZhw` and `vit_BTND` or `video_BTHWC`, and `stride_B`, as in the other stages (`training.py`), and `text_BLE`.

Legend: B clips, T Z h w latents, N patches, D width, L text tokens, E C context width.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kinetok.tokenizers.base import Batch, Config
from kinetok.tokenizers.divot import schedule
from kinetok.tokenizers.divot.checkpoints import load_dynamicrafter
from kinetok.tokenizers.divot.perceiver import Perceiver, PerceiverConfig
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
from kinetok.tokenizers.divot.training import DIVOT, EVALUATION_STEPS, Exported, draw, features, latents, v_error
from kinetok.tokenizers.divot.unet import FRAME_TOKENS

DYNAMICRAFTER = PerceiverConfig(queries=FRAME_TOKENS * 16, depth=4, heads=12)
"""The Perceiver of the images in DynamiCrafter's checkpoints, for 16 frames."""
FRESH = "the U-Net starts from random weights: objective.dynamicrafter names no checkpoint"


class UNetObjective(Config):
    """What the U-Net starts from."""

    kind: Literal["divot_unet"] = "divot_unet"
    players: ClassVar[tuple[str, ...]] = (DIVOT,)
    """Names of what gets an optimizer."""
    dynamicrafter: str | None = None
    """DynamiCrafter's checkpoint of 256 pixels, a file on every worker; None starts from random weights, and the run says so."""
    recompute: bool = False
    """Whether the U-Net computes activations anew in the backward pass: about a third more work for far less memory."""
    # False is not dumped: it would give every training without it another key.
    stride: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether the U-Net is told each clip's own frame stride, source rate over clip rate, in place of the one of its configuration."""

    def problems(self, steps: int) -> Iterator[str]:
        """What cannot be meant in a run of `steps` steps: nothing."""
        yield from ()

    def notes(self) -> tuple[str, ...]:
        """What a run must say of its start. Raises ValueError where the checkpoint is not there."""
        if self.dynamicrafter is None:
            return (FRESH,)
        if not Path(self.dynamicrafter).is_file():
            raise ValueError(f"dynamicrafter: {self.dynamicrafter} is no file here")
        return ()


class UNetPlayer(nn.Module):
    """What the optimizer sees: the U-Net, the Perceiver of the images, and the loss as `forward`."""

    def __init__(self, model: DivotTokenizer, objective: UNetObjective) -> None:
        super().__init__()
        steps, context = model.latent_size[0], model.config.detokenizer.unet.context
        numbers = model.config.detokenizer.perceiver if objective.dynamicrafter is None else DYNAMICRAFTER
        settings = numbers.model_copy(update={"queries": FRAME_TOKENS * steps})
        self.detokenizer = model.detokenizer
        self.detokenizer.perceiver.requires_grad_(False)
        self.detokenizer.unet.recompute = objective.recompute
        self.images = Perceiver(settings, read=model.config.vit.width, width=context, out=context)
        # A tuple, or what is frozen would be registered as the player's own.
        self.source = (model,)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and the scale of the latents."""
        x_BZThw = self.detokenizer.normalise(latents(self.source[0], batch))
        draws = draw(batch["seed_B"].tolist(), x_BZThw.shape[1:], x_BZThw.device)
        context_BLC = self._context(batch, draws.uniform_B)
        loss_B = self._error(x_BZThw, context_BLC, draws.noise_BZThw, draws.t_B, batch.get("stride_B"))
        return loss_B.mean(), {"latent_rms": x_BZThw.square().mean().sqrt()}

    def evaluate(self, batch: Batch) -> Tensor:
        """The loss of each clip, averaged over `EVALUATION_STEPS`, (B,)."""
        x_BZThw = self.detokenizer.normalise(latents(self.source[0], batch))
        draws = draw(batch["seed_B"].tolist(), x_BZThw.shape[1:], x_BZThw.device)
        context_BLC = self._context(batch, draws.uniform_B)
        steps = [torch.full_like(draws.t_B, t) for t in EVALUATION_STEPS]
        stride_B = batch.get("stride_B")
        return torch.stack([self._error(x_BZThw, context_BLC, draws.noise_BZThw, t_B, stride_B) for t_B in steps]).mean(0)

    def _error(self, x_BZThw: Tensor, context_BLC: Tensor, noise_BZThw: Tensor, t_B: Tensor, stride_B: Tensor | None) -> Tensor:
        v_BZThw = self.detokenizer.unet(schedule.noisy(x_BZThw, noise_BZThw, t_B), t_B, context_BLC, stride_B)
        return v_error(v_BZThw, x_BZThw, noise_BZThw, t_B)

    def _context(self, batch: Batch, uniform_B: Tensor) -> Tensor:
        """Text, then the image: (B, L + 16 * T, C)."""
        vit_BTND = features(self.source[0], batch)
        chosen_B = (uniform_B * vit_BTND.shape[1]).long()
        image_BLC: Tensor = self.images(vit_BTND[torch.arange(len(chosen_B), device=chosen_B.device), chosen_B])
        return torch.cat([batch["text_BLE"].to(image_BLC), image_BLC], dim=1)


class UNetTrainable(Exported):
    """The U-Net of a Divot tokenizer as the training loop takes it."""

    def __init__(self, model: DivotTokenizer, objective: UNetObjective) -> None:
        super().__init__(model, objective)
        self.player = UNetPlayer(model, objective)
        if objective.dynamicrafter is not None:
            load_dynamicrafter(model.detokenizer.unet, self.player.images, objective.dynamicrafter)
        self.players: Mapping[str, nn.Module] = {DIVOT: self.player}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Loss with caption and image, (B,)."""
        return {"v_loss": self.player.evaluate(batch)}
