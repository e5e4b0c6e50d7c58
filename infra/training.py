"""THE training loop: what a model must offer to be trained (`Trainable`), what feeds it (`Feed`), and `fit`.

Adversarial, diffusion and language-model training share this one loop: each optimizer of a job is a "player", a module whose
forward returns its loss. `backward` and `optimizer.step` of the whole repository stand here. All randomness of a step comes from
per-sample seeds in the batch, so that a resumed run, or one on another number of workers, draws the same numbers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]
"""Named tensors whose first dimension is the sample; always holds `seed_B` (int64), the sample's own random seed."""


class Trainable(Protocol):
    """A model family's own part of training. Pure torch; knows nothing of workers, devices or files beyond `export`."""

    players: Mapping[str, nn.Module]
    """One optimizer each, stepped in this order. `player(batch, step)` returns (scalar loss, named scalars to log).
    What a player does not train must not be a sub-module of it."""
    frozen: Mapping[str, nn.Module]
    """Moved to the device, hashed before and after training, never optimised, never in a checkpoint (contract 4)."""

    def active(self, player: str, step: int) -> bool:
        """Whether this player takes part in step `step` (a discriminator may start late)."""

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Per-sample validation figures, each (B,); called without gradient."""

    def digest(self, module: nn.Module) -> str:
        """Hash of a frozen module's weights, the one its token shards carry (`weights_digest` for tokenizers)."""

    def export(self, folder: Path) -> None:
        """Save the finished model with `save_pretrained`; the loop has put the weights to keep (EMA where configured) in place."""


class Feed(Protocol):
    """An endless, seeded, position-addressed stream of samples. Pickled to the workers."""

    def __len__(self) -> int:
        """Samples of one epoch."""

    def batches(self, *, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        """This rank's micro-batches of `batch` samples, from global sample position `start` on.

        Micro-batch m of the job covers positions start + m*batch*world ... and rank r takes the r-th run of `batch` of them, so the
        global order does not depend on `world` as long as batch*world does not change.
        """
