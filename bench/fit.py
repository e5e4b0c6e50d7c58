"""Step time of `fit` against a bare torch loop and bare DeepSpeed: same model, same batch, same threads.

Samples come from memory, so that what is measured is the loop. A rate is the median over groups of steps, the first left out. A machine's
speed drifts within a minute, so the three take turns, each run of `fit` is held against the mean of its floors before and after it, and
the turn with the median ratio is what counts.
"""

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import TypeAlias

import torch
from line import Line
from torch import Tensor, nn

from kinetok.infra.engine import EngineSettings, make_engine
from kinetok.infra.fit import FitConfig, PlayerConfig, fit
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.tokenizers import catalog
from kinetok.tokenizers.causal.autoencoder import CausalConfig
from kinetok.tokenizers.causal.training import ReconstructionObjective, RungTrainable

PLAYER = "autoencoder"
BATCH, STEPS, GROUP, TURNS = 2, 24, 4, 5
THREADS = os.cpu_count() or 1
OPTIMIZER = PlayerConfig(lr=1e-3)
MODEL = CausalConfig(patch=2, channels=24, mult=(1, 2, 4), strides=((2, 2), (2, 2)), blocks=1, groups=8)

Step: TypeAlias = Callable[[dict[str, Tensor], int], None]
"""One training step on a batch."""


class Clips:
    """A feed of sixteen noise clips of 17 frames of 64 x 64."""

    def __len__(self) -> int:
        return 16

    def batches(self, *, start: int, batch: int, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
        video = torch.randint(0, 256, (16, 17, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        position = start + rank * batch
        while True:
            rows = torch.arange(position, position + batch) % 16
            yield {"video_BTHWC": video[rows], "seed_B": rows}
            position += batch * world


def build() -> RungTrainable:
    """The base model of the main job."""
    torch.manual_seed(0)
    return catalog.trainable(catalog.build(MODEL), ReconstructionObjective())


def lines(work: Path) -> list[Line]:
    """One line against each floor."""
    torch.set_num_threads(THREADS)
    loops = {"a bare torch loop": bare_torch(), "bare DeepSpeed": bare_deepspeed()}
    turns, before = [], [_rate(step) for step in loops.values()]
    for turn in range(TURNS):
        ours, after = with_fit(Folder(str(work / f"fit{turn}"))), [_rate(step) for step in loops.values()]
        turns.append([(ours, (one + other) / 2) for one, other in zip(before, after, strict=True)])
        before = after
    torch.distributed.destroy_process_group()
    middle = [sorted(pairs, key=lambda pair: pair[0] / pair[1])[TURNS // 2] for pairs in zip(*turns, strict=True)]
    return [Line(f"fit() (floor: {name})", ours, "steps/s", floor, ">= 0.95") for name, (ours, floor) in zip(loops, middle, strict=True)]


def bare_torch() -> Step:
    """The loop anyone would write."""
    player = build().players[PLAYER]
    optimizer = torch.optim.AdamW(player.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, weight_decay=0.0)

    def step(batch: dict[str, Tensor], number: int) -> None:
        optimizer.zero_grad()
        loss, _ = player(batch, number)
        loss.backward()
        nn.utils.clip_grad_norm_(player.parameters(), OPTIMIZER.clip)
        optimizer.step()

    return step


def bare_deepspeed() -> Step:
    """A DeepSpeed engine on one process, whose group stays up: DeepSpeed holds on to the first it sees."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    torch.distributed.init_process_group("gloo")
    with contextlib.redirect_stdout(io.StringIO()):
        engine = make_engine(build().players[PLAYER], OPTIMIZER, EngineSettings(zero=0, bf16=False, micro_batch=BATCH, accumulation=1))

    def step(batch: dict[str, Tensor], number: int) -> None:
        loss, _ = engine(batch, number)
        engine.backward(loss)
        engine.step()

    return step


def with_fit(out: Folder) -> float:
    """Steps per second of `fit` on one Ray Train worker that has all cores; the floors run without Ray's processes beside them."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = FitConfig(steps=STEPS, global_batch=BATCH, optimizers={PLAYER: OPTIMIZER}, log_every=GROUP, checkpoint_every=10**6)
    resources = Resources(batch_size=BATCH, cpus=THREADS)
    fit(build, Clips(), None, config, out=out, resources=resources, progress=lambda **_: None, stop=threading.Event())
    ray.shutdown()
    return median([float(line["train/samples_per_second"] or 0) / BATCH for line in read_metrics(out)][1:])


def _rate(step: Step) -> float:
    """Steps per second of the median group."""
    batches = Clips().batches(start=0, batch=BATCH, rank=0, world=1)
    rates = []
    for group in range(STEPS // GROUP):
        began = time.perf_counter()
        for number in range(GROUP):
            step(next(batches), group * GROUP + number + 1)
        rates.append(GROUP / (time.perf_counter() - began))
    return median(rates[1:])
