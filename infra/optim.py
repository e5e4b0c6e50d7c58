"""Optimizers of the players, their learning-rate schedule, and the running average of their weights (EMA).

Schedule and EMA are closed forms of the step number, so a resumed run needs no scheduler state. Parameters may be whole tensors or
the shards that ZeRO-3 leaves on each rank; `local`, `whole` and `shard` are the one place that knows the difference.
Not covered: the step itself (`training.py`) and the optimizers' state on disk (`checkpoint.py`).
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, distributed, nn

from kinetok.infra.errors import ConfigError
from kinetok.infra.fit import PlayerConfig


def lr_factor(step: int, steps: int, config: PlayerConfig) -> float:
    """Learning rate of step `step` (1 ... steps) over the peak: step/warmup, then (1 + cos(pi * done)) / 2, raised to end at `floor`, or 1.

    `done` is the part of the steps after the warm-up that lies behind `step`, so the first step after it still runs at the peak.
    """
    if step <= config.warmup:
        return step / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - 1 - config.warmup) / (steps - config.warmup)
    return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * done)) / 2


def adamw(module: nn.Module, config: PlayerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`; those with fewer than two dimensions are decayed where `config.decays` is all.

    Each group holds its `rate`, the factor of `config.rates` on its learning rate, 1 elsewhere. Raises ConfigError on a rate of a
    module that trains nothing.
    """
    fewest = 2 if config.decays == "matrices" else 0
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    unused = set(config.rates)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            inside = max((part for part in config.rates if name.startswith(f"{part}.")), key=len, default=None)
            unused.discard(inside or "")
            groups.setdefault((config.rates[inside] if inside else 1.0, parameter.ndim >= fewest), []).append(parameter)
    if unused:
        named = ", ".join(sorted(name for name, _ in module.named_children()))
        raise ConfigError(f"rates: {', '.join(sorted(unused))} trains nothing; modules of this player are {named}, and what they hold")
    return torch.optim.AdamW(
        [
            {"params": parameters, "rate": rate, "lr": rate * config.lr, "weight_decay": config.weight_decay if decayed else 0.0}
            for (rate, decayed), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,  # one kernel for all tensors: of small ones, as here on CPUs, there are hundreds
    )


def ema_decay(step: int, decay: float) -> float:
    """Decay of the average at `step`: min(decay, (1 + step) / (10 + step)), so that a short run is not ruled by its first weights."""
    return min(decay, (1 + step) / (10 + step))


def local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its ZeRO-3 shard (flat, padded), or all of it."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def whole(piece: Tensor, parameter: nn.Parameter) -> Tensor:
    """The full tensor, shaped like `parameter`, of which every rank holds a `piece` as `local` does; a collective under ZeRO-3."""
    if not hasattr(parameter, "ds_tensor"):
        return piece
    flat = piece.new_empty(piece.numel() * distributed.get_world_size())
    distributed.all_gather_single(flat, piece.contiguous())
    shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
    return flat[: shape.numel()].view(shape)


def shard(full: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's piece of a full tensor, laid out as `local(parameter)`."""
    if not hasattr(parameter, "ds_tensor"):
        return full
    piece = torch.zeros_like(parameter.ds_tensor)
    mine = full.flatten()[distributed.get_rank() * piece.numel() :][: piece.numel()]
    piece[: mine.numel()] = mine
    return piece


class Average:
    """EMA of every player's trained parameters: average <- d * average + (1 - d) * weights with d = `ema_decay(step)`.

    Under ZeRO-3 each rank averages only its own shards.
    """

    def __init__(self, players: Mapping[str, nn.Module], decay: float) -> None:
        self.parameters = {name: parameter for name, parameter in named(players) if parameter.requires_grad}
        self.decay = decay
        self.pieces = {name: local(parameter).clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights that step `step` (1, 2 ...) ended with."""
        weights = [local(parameter) for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.pieces.values()), weights, 1 - ema_decay(step, self.decay))

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """(`player.parameter`, averaged tensor) one by one; a collective under ZeRO-3."""
        for name, parameter in self.parameters.items():
            yield name, whole(self.pieces[name], parameter)

    def load(self, full: Mapping[str, Tensor]) -> None:
        """Continue from tensors as `full` yields them."""
        for name, parameter in self.parameters.items():
            self.pieces[name].copy_(shard(full[name].to(self.pieces[name].device), parameter))


def named(players: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of every player as `player.parameter`."""
    for player, module in players.items():
        for name, parameter in module.named_parameters():
            yield f"{player}.{name}", parameter
