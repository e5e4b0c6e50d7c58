"""What models cost before they run: parameters, tokens, FLOPs and memory, from closed forms and from passes over tensors without data.

A FLOP is a multiplication or an addition; only matrix products, convolutions and attention are counted, as torch's `FlopCounterMode`
does, and a training step includes the products that fused attention computes again on its way back. Memory is what a training step
holds: weights, gradients, optimizer state, averages, and the activations kept for the backward pass. It is a lower bound: kernels'
workspaces, short-lived tensors and the allocator's rounding come on top. Not covered: communication buffers, time (`budget.py` measures).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Protocol, TypeVar
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from kinetok.llm.dit import FREQUENCIES, MODULATIONS, DiTConfig
from kinetok.tokenizers.base import Batch, Tokenizer, Tokens, standing

FLOAT = 4
"""Bytes of a float32: weights, gradients and optimizer state stay so under bf16 autocast."""
SEEDS = "seed_B"
LAST_STEP = 1 << 30
"""A step at which every player takes part."""

Result = TypeVar("Result")


class Trained(Protocol):
    """The part of `kinetok.infra.training.Trainable` that costs anything."""

    @property
    def players(self) -> Mapping[str, nn.Module]: ...
    @property
    def frozen(self) -> Mapping[str, nn.Module]: ...


@dataclass(frozen=True)
class Flops:
    """Of one sample."""

    forward: int
    training: int
    """Forward and backward."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker while it trains."""

    weights: int
    frozen: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class TrainingCost:
    """What one training step takes, whoever runs it."""

    trained: int
    """Parameters with an optimizer, of all players."""
    frozen: int
    """Parameters that the loss only runs through."""
    base: int
    """Of the frozen ones, those that players own: ZeRO-3 scatters them, and they are whole where the model is evaluated."""
    flops: int
    """One sample, all players, forward and backward."""
    activations: int
    """Bytes that a micro-batch keeps for the backward pass, of the player that keeps most."""

    def memory(self, *, ema: bool, zero: int = 0, workers: int = 1) -> Memory:
        """Float32 weights with AdamW at a ZeRO stage (arXiv 1910.02054); an average is kept beside a second copy of what is trained, and
        so are ZeRO-3's pieces beside a second copy of all that they are pieces of.
        """
        whole = FLOAT * self.trained

        def piece(stage: int) -> int:
            return whole // workers if zero >= stage else whole

        return Memory(
            weights=piece(3),
            frozen=FLOAT * (self.frozen + (self.base // workers if zero == 3 else 0)),
            gradients=piece(2),
            optimizer=2 * piece(1),
            average=(piece(3) if ema else 0) + (whole if ema or zero == 3 else 0),
            activations=self.activations,
        )


def dit_parameters(config: DiTConfig) -> int:
    """Parameters of a `VideoDiT`."""
    d, c = config.width, config.token_channels
    attention = 4 * d * d + 4 * d + 2 * config.head_width
    block = MODULATIONS * d + 2 * attention + 2 * d + 2 * d * config.hidden + config.hidden + d
    ends = c * d + d + 2 * (d * d + d) + d * c + c
    positions = d * (config.chunk // config.patch[0]) + 2 * FREQUENCIES * d + d
    time = 2 * FREQUENCIES * d + d + d * d + d + MODULATIONS * (d * d + d)
    text = config.text_width + config.text_width * d + d + d * d + d + d
    return config.depth * block + ends + positions + time + text


def dit_flops(config: DiTConfig, latent: tuple[int, int, int], text_tokens: int) -> Flops:
    """FLOPs of a `VideoDiT` on a latent of `latent` = (t, h, w) cells with that many text tokens, alone in its batch."""
    grid = config.grid(latent)
    n, m, d = grid[0] * grid[1] * grid[2], text_tokens + 1, config.width
    # Layers that read what nothing is learned from pass no gradient further back: once in the backward pass, not twice.
    inputs = 2 * n * config.token_channels * d + 2 * grid[0] * 2 * FREQUENCIES * d + 2 * 2 * FREQUENCIES * d
    ends = 2 * n * d * config.token_channels + 2 * d * 2 * d
    conditions = 2 * d * d + 2 * d * MODULATIONS * d + 2 * text_tokens * d * (config.text_width + d)
    linear = 8 * n * d * d + (4 * n + 4 * m) * d * d + 4 * n * d * config.hidden
    attention = 4 * n * (n + m) * d
    forward = inputs + ends + conditions + config.depth * (linear + attention)
    # Backward is twice the forward pass, but 2.5 times for fused attention, which computes its weights again.
    return Flops(forward, 3 * forward - inputs + config.depth * attention // 2)


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of whatever `work` does with tensors, backward passes included."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_KERNELS) as counter:
        work()
    total: int = counter.get_total_flops()
    return total


def saved_bytes(forward: Callable[[], Result], owned: Iterable[nn.Module]) -> tuple[Result, int]:
    """What `forward` returns, and the bytes that autograd keeps for it: each storage once, the weights of `owned` not at all."""
    weights = {_storage(tensor) for module in owned for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        # The storage itself is held: its address may be given to another once it is gone.
        kept.setdefault(_storage(tensor), tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    return result, sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


def training_cost(build: Callable[[], Trained], batch: Batch, *, bf16: bool = False) -> TrainingCost:
    """Cost of one step on one micro-batch, of which only shapes and types matter; no weight and no number is ever computed."""
    with torch.device("meta"):
        trainable = build()
    modules = [*trainable.players.values(), *trainable.frozen.values()]
    batch = batch | {SEEDS: torch.arange(len(next(iter(batch.values()))))}
    activations: list[int] = []

    def step(player: nn.Module) -> None:
        (loss, _), kept = saved_bytes(lambda: player(batch, LAST_STEP), modules)
        activations.append(kept)
        torch.autograd.grad(loss, _learned(player), allow_unused=True)

    players = trainable.players.values()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for module in modules:
            _leave_meta(module)
        batch |= {name: torch.empty_like(values, device="cpu") for name, values in batch.items() if name != SEEDS}
        flops = sum(count_flops(partial(step, player)) for player in players)
    trained = sum(weight.numel() for player in players for weight in _learned(player))
    return TrainingCost(
        trained=trained,
        frozen=sum(weight.numel() for module in modules for weight in module.parameters()) - trained,
        base=sum(weight.numel() for player in players for weight in player.parameters()) - trained,
        flops=flops // len(batch[SEEDS]),
        activations=max(activations),
    )


@dataclass(frozen=True)
class PassCost:
    """What running frozen models takes, one micro-batch at a time."""

    parameters: int
    """Of the models and all that they stand on, whether a pass needs them or not: they are on the worker."""
    flops: int
    """One sample."""
    alive: int
    """Bytes of a micro-batch that are held at once, at most, what it is made of included."""

    @property
    def memory(self) -> int:
        """Bytes on one worker."""
        return FLOAT * self.parameters + self.alive


def pass_cost(build: Callable[[], Sequence[nn.Module]], run: Callable[..., Iterable[int]], samples: int, *, dtype: torch.dtype) -> PassCost:
    """Cost of `run(*models)` on a micro-batch of `samples`, under autocast to `dtype`; no number is ever computed.

    `run` yields after each part of its work how often that is done: of the equal steps of a sampler it takes one.
    """
    with torch.device("meta"):
        built = build()
    models = [each for model in built for each in standing(model)]
    # Before they leave the meta device, which parts weights that modules share.
    parameters = sum(weight.numel() for model in models for weight in model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for model in models:
            # A weight that goes into a module as it is, as queries do, would have the counter of FLOPs look for its gradient.
            _leave_meta(model.eval().requires_grad_(False))
        weights = [weight for model in models for weight in (*model.parameters(), *model.buffers())]
        flops = before = 0
        with Alive(weights) as alive, FlopCounterMode(display=False, custom_mapping=_CPU_KERNELS) as counter:
            for times in run(*built):
                flops += times * (counter.get_total_flops() - before)
                before = counter.get_total_flops()
    return PassCost(parameters, flops // samples, alive.peak)


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made inside, each storage once, that are alive at once: `peak` at most. `known` were made before.

    (torch's own tracker of memory refuses a module that runs twice in a pass, as a trunk does at two rates.)
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in known})

    def __torch_dispatch__(
        self, func: Callable[..., object], types: Sequence[type], args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and (storage := made.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                self._count(storage.nbytes())
                finalize(storage, self._count, -storage.nbytes()).atexit = False
        return result

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def tokenizer_flops(build: Callable[[], Tokenizer], video_shape: Sequence[int]) -> tuple[int, int]:
    """FLOPs of encoding and of decoding a video (B, 3, T, H, W)."""
    with torch.device("meta"):
        tokenizer = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _leave_meta(tokenizer)
        video_BCTHW = torch.empty(*video_shape)
        encoded: list[Tokens] = []
        encoding = count_flops(lambda: encoded.append(tokenizer.encode(video_BCTHW)))
        return encoding, count_flops(lambda: tokenizer.decode(encoded[0]))


def _learned(player: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in player.parameters() if weight.requires_grad]


def _leave_meta(module: nn.Module) -> None:
    """Give a module of the meta device fake CPU tensors: on meta, attention would take its unfused path and keep N x N weights."""
    if any(weight.is_meta and not isinstance(weight, FakeTensor) for weight in module.parameters()):
        module.to_empty(device="cpu")


def _storage(tensor: Tensor) -> int:
    """Names a storage; tensors without data all have the address 0."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _attention(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    return 4 * q.numel() * k[-2]


def _attention_backward(gradient: torch.Size, q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    return 10 * q.numel() * k[-2]


def _convolution(x: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    return 2 * out_shape.numel() * weight[1:].numel()


_CPU_KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.mkldnn_convolution: _convolution,
}
"""Fused attention and oneDNN's convolution, which torch's counter does not know."""
