"""One player under DeepSpeed: what the training loop uses of an engine, and how one is made.

Engines run in fp32, or in fp32 with bf16 autocast: weights, gradients and optimizer state stay fp32, so model code sees the tensors
it was written for. The optimizer is torch's AdamW, because DeepSpeed's own are compiled on first use.
Not covered: fp16, offload to CPU or NVMe.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kinetok.infra.fit import PlayerConfig
from kinetok.infra.optim import adamw


class Engine(Protocol):
    """The part of `deepspeed.DeepSpeedEngine` that the loop and the checkpoints use."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __call__(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...
    def save_checkpoint(self, save_dir: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> object: ...
    def load_checkpoint(self, load_dir: str, tag: str, load_module_strict: bool) -> tuple[str | None, object]: ...


@dataclass(frozen=True)
class EngineSettings:
    """What all engines of a run share."""

    zero: int
    bf16: bool
    micro_batch: int
    accumulation: int
    universal: bool = False
    """Whether the checkpoint to be loaded was converted for another worker count; DeepSpeed must know beforehand."""


def make_engine(module: nn.Module, player: PlayerConfig, settings: EngineSettings) -> Engine:
    """Wrap `module`, already on its device; the default process group must be up. A collective."""
    _quiet(torch.device(next(module.parameters()).device))
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": player.clip,
        "zero_optimization": {"stage": settings.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
        "checkpoint": {"load_universal": settings.universal},
    }
    if settings.bf16:
        # By default the gradients of linear and convolution layers, and under ZeRO-3 their weights, would travel as bf16.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    with contextlib.redirect_stdout(io.StringIO()):
        engine: Engine = deepspeed.initialize(model=module, optimizer=adamw(module, player), config=config)[0]
    return engine


def _quiet(device: torch.device) -> None:
    """Keep DeepSpeed from compiling its shared-memory collective on a CPU (only inference uses it) and from logging every detail."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with _absent("mlflow"):
        import deepspeed.ops

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@contextlib.contextmanager
def _absent(package: str) -> Iterator[None]:
    """Let imports in the block do without `package` unless it is there already.

    DeepSpeed imports its autotuner, which imports MLflow where it is installed: most of the time that DeepSpeed takes to import, and
    nothing here tunes.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # which makes its import an ImportError
    try:
        yield
    finally:
        del sys.modules[package]
