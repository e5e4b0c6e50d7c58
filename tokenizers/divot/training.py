"""Training of Divot's tokenizer and de-tokenizer: the objective, and the trainable that `kinetok.infra.training.fit` drives (by structure).

    L = mean (v_hat(x_t, t, tokens) - v)^2      t uniform over all steps, v-prediction with zero terminal SNR

The three stages of arXiv 2412.04432 (A.1) that learn from tokens differ in what is trained and in what the tokens are:

| stage | trained | frozen | tokens | conditions dropped |
|---|---|---|---|---|
| joint | token encoder, Perceiver, U-Net | vision transformer, autoencoder | of the clip | none, so that the tokens carry everything |
| refine | Perceiver, U-Net | token encoder as well | of the clip | 5 %, which guidance needs |
| adapt | Perceiver, U-Net | token encoder as well | drawn by the language model | 5 % |

Not published, and chosen here: the Perceiver is there from the start; a dropped condition is the token set of a grey clip, which is what
the published sampler shows the U-Net without a condition. Batches hold `latent_BTZhw` and `vit_BTND`, the cached latents of the
autoencoder and features of the vision transformer, or, where these are absent, `video_BTHWC` (bytes) to make them from; in the last two
stages `token_BND`, cached or drawn tokens, takes the place of the features. With `objective.stride`, `stride_B` are the clips' frame
strides. All that is random about a sample comes from its `seed_B`,
but for dropout. Not covered: what comes before, adapting DynamiCrafter's U-Net (`unet_training.py`).

Legend: B clips, T Z h w latents, N tokens or patches, D width, C H W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kinetok.tokenizers.base import Batch, Config, Tokenizer, weights_digest
from kinetok.tokenizers.card import CARD_FILE, model_card
from kinetok.tokenizers.causal.training import pixels
from kinetok.tokenizers.divot import schedule
from kinetok.tokenizers.divot.detokenizer import Detokenizer
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
from kinetok.tokenizers.divot.vit import FrozenViT

DIVOT = "divot"
JOINT: Final = "joint"
REFINE: Final = "refine"
ADAPT: Final = "adapt"
PUBLISHED_DROP = 0.05
EVALUATION_STEPS = (100, 300, 500, 700, 900)
"""Midpoints of five equal parts of the schedule: the same at every evaluation, so that figures of different steps compare."""


class DivotObjective(Config):
    """Which stage of Divot's training, and what of it is open."""

    kind: Literal["divot"] = "divot"
    players: ClassVar[tuple[str, ...]] = (DIVOT,)
    """Names of what gets an optimizer."""
    stage: Literal["joint", "refine", "adapt"] = JOINT
    drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Part of the clips that learn without their tokens; None for the published 0 in the joint stage and 0.05 in the others."""
    recompute: bool = False
    """Whether the U-Net computes activations anew in the backward pass: about a third more work for far less memory."""
    # False is not dumped: it would give every training without it another key.
    stride: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether the U-Net is told each clip's own frame stride, source rate over clip rate, in place of the one of its configuration."""

    @property
    def dropped(self) -> float:
        """Part of the clips that learn without their tokens."""
        return self.drop if self.drop is not None else 0.0 if self.stage == JOINT else PUBLISHED_DROP

    def problems(self, steps: int) -> Iterator[str]:
        """What cannot be meant in a run of `steps` steps, as `field: sentence`."""
        if self.stage == JOINT and self.dropped:
            yield f"drop: {self.dropped} of the clips would teach the joint stage to do without tokens; drop them in refine"

    def notes(self) -> tuple[str, ...]:
        """What a run must say of its loss: nothing."""
        return ()


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training step."""

    t_B: Tensor
    uniform_B: Tensor
    """In [0, 1); decides whether a condition is dropped."""
    noise_BZThw: Tensor


def draw(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Draws:
    """Random numbers of the samples with these seeds, for latents of `shape` (Z, T, h, w)."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        t = torch.randint(schedule.STEPS, (), generator=generator)
        rows.append((t, torch.rand((), generator=generator), torch.randn(*shape, generator=generator)))
    t_B, uniform_B, noise_BZThw = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
    return Draws(t_B, uniform_B, noise_BZThw)


class DivotPlayer(nn.Module):
    """What the optimizer sees: the trained parts of the model, and the loss as `forward`."""

    grey_1FPD: Tensor

    def __init__(self, model: DivotTokenizer, objective: DivotObjective) -> None:
        super().__init__()
        self.objective = objective
        self.detokenizer = model.detokenizer
        self.encoder = model.encoder if objective.stage == JOINT else None
        self.detokenizer.unet.recompute = objective.recompute
        # A tuple, or what is frozen would be registered as the player's own.
        self.source = (model,)
        self.register_buffer("grey_1FPD", model.grey_features(), persistent=False)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and the scale of the latents: a root mean square far from 1 tells of wrong statistics."""
        x_BZThw = self.latents(batch)
        draws = draw(batch["seed_B"].tolist(), x_BZThw.shape[1:], x_BZThw.device)
        token_BND = self.tokens(batch)
        if self.objective.dropped:
            dropped_B11 = (draws.uniform_B < self.objective.dropped)[:, None, None]
            token_BND = torch.where(dropped_B11, self.null_tokens(), token_BND)
        loss_B = v_loss(self.detokenizer, x_BZThw, token_BND, draws.noise_BZThw, draws.t_B, batch.get("stride_B"))
        return loss_B.mean(), {"latent_rms": x_BZThw.square().mean().sqrt()}

    def latents(self, batch: Batch) -> Tensor:
        """Normalised latents (B, Z, T, h, w), cached or made by the frozen autoencoder."""
        return self.detokenizer.normalise(latents(self.source[0], batch))

    def tokens(self, batch: Batch) -> Tensor:
        """Tokens of the batch (B, N, D), with a gradient to the encoder in the joint stage."""
        if self.encoder is None and "token_BND" in batch:
            return batch["token_BND"].float()
        return self._encode(features(self.source[0], batch))

    def null_tokens(self) -> Tensor:
        """Tokens of a grey clip, (1, N, D)."""
        return self._encode(self.grey_1FPD)

    def _encode(self, vit_BTND: Tensor) -> Tensor:
        if self.encoder is not None:
            token_BND: Tensor = self.encoder(vit_BTND)
            return token_BND
        with torch.no_grad():
            frozen_BND: Tensor = self.source[0].encoder(vit_BTND)
            return frozen_BND


def v_loss(
    detokenizer: Detokenizer, x_BZThw: Tensor, token_BND: Tensor, noise_BZThw: Tensor, t_B: Tensor, stride_B: Tensor | None = None
) -> Tensor:
    """Mean squared error of v for each clip, (B,), at normalised latents; None leaves the frame strides to the U-Net's configuration."""
    return v_error(detokenizer(schedule.noisy(x_BZThw, noise_BZThw, t_B), t_B, token_BND, stride_B), x_BZThw, noise_BZThw, t_B)


def v_error(v_BZThw: Tensor, x_BZThw: Tensor, noise_BZThw: Tensor, t_B: Tensor) -> Tensor:
    """Mean squared error of a predicted v for each clip, (B,), in float32."""
    error_BZThw = v_BZThw.float() - schedule.velocity(x_BZThw, noise_BZThw, t_B)
    return error_BZThw.square().flatten(1).mean(1)


def mean_v_loss(
    detokenizer: Detokenizer, x_BZThw: Tensor, token_BND: Tensor, noise_BZThw: Tensor, stride_B: Tensor | None = None
) -> Tensor:
    """`v_loss` averaged over `EVALUATION_STEPS`, (B,)."""
    steps = (torch.full((len(x_BZThw),), t, device=x_BZThw.device) for t in EVALUATION_STEPS)
    return torch.stack([v_loss(detokenizer, x_BZThw, token_BND, noise_BZThw, t_B, stride_B) for t_B in steps]).mean(0)


def latents(model: DivotTokenizer, batch: Batch) -> Tensor:
    """Latents (B, Z, T, h, w) as the frozen autoencoder makes them, cached or made now."""
    if "latent_BTZhw" in batch:
        return batch["latent_BTZhw"].transpose(1, 2).float()
    return model.lower.encode(model.windows(pixels(batch))).values


def features(model: DivotTokenizer, batch: Batch) -> Tensor:
    """Features (B, T, N, D) of the frozen vision transformer, cached or made now."""
    return batch["vit_BTND"].float() if "vit_BTND" in batch else model.vit_features(pixels(batch))


class Exported:
    """What every trainable of Divot does with its model."""

    def __init__(self, model: DivotTokenizer, objective: Config) -> None:
        self.model, self.objective = model, objective
        self.frozen: Mapping[str, nn.Module] = {"vit": model.vit, "lower": model.lower}

    def active(self, player: str, step: int) -> bool:
        """The one player always takes part."""
        return True

    def digest(self, module: nn.Module) -> str:
        """Digest of a frozen module; of the autoencoder, the `weights` that its token shards carry."""
        return module.digest() if isinstance(module, Tokenizer | FrozenViT) else weights_digest(module)

    def export(self, folder: Path) -> None:
        """Save the model, its frozen ones included; its card names the loss."""
        self.model.save_pretrained(folder)
        (folder / CARD_FILE).write_text(model_card(self.model, self.objective))


class DivotTrainable(Exported):
    """A Divot tokenizer as the training loop takes it."""

    def __init__(self, model: DivotTokenizer, objective: DivotObjective) -> None:
        super().__init__(model, objective)
        self.player = DivotPlayer(model, objective)
        self.players: Mapping[str, nn.Module] = {DIVOT: self.player}
        if objective.stage != JOINT:
            self.frozen = {**self.frozen, "encoder": model.encoder.requires_grad_(False).eval()}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Loss with the clip's tokens and with none, each over `EVALUATION_STEPS` with the clip's own noise, (B,).

        What the tokens carry is the difference of the two.
        """
        x_BZThw = self.player.latents(batch)
        noise_BZThw = draw(batch["seed_B"].tolist(), x_BZThw.shape[1:], x_BZThw.device).noise_BZThw
        token_BND = self.player.tokens(batch)
        conditions = {"v_loss": token_BND, "v_loss_null": self.player.null_tokens().expand_as(token_BND)}
        model, stride_B = self.model.detokenizer, batch.get("stride_B")
        return {name: mean_v_loss(model, x_BZThw, given, noise_BZThw, stride_B) for name, given in conditions.items()}
