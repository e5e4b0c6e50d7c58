"""What a diffusion transformer gains from fewer tokens: one small model, trained from the cached latents of each rung for equal steps.

No text is shown: what is compared is the cost of a step, the memory, and the flow-matching loss on held-out clips, in latents brought
to mean 0 and deviation 1. Costs are those of 68 frames, four chunks, in a process of their own.

Legend: B clips, Z latent channels, t h w latent positions, L text tokens, E text width.
"""

import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from ladder import BATCH, Ladder
from torch import Tensor
from unit import aside

from kinetok.llm.dit import DiTConfig, VideoDiT
from kinetok.llm.training import DiffusionObjective, DiTTrainable

RUNGS = {"4x": "base", "8x": "grown8", "16x": "grown16"}
LR = 1e-3
TEXT_WIDTH = 8
CHUNKS = 4
TIMED_STEPS = 4


def generator(ladder: Ladder, rate: str) -> dict[str, object]:
    """Figures of the transformer trained on one rung's latents: `flow_loss`, tokens of 68 frames, seconds and megabytes of a step."""
    name = f"dit-{rate}"
    unit, course = ladder.unit(name), ladder.budget.course(name, LR, ladder.seed)
    if unit.figures.exists():
        return unit.read(course.steps)
    train, val = (_latents(ladder, RUNGS[rate], split) for split in ("train", "val"))
    models: list[VideoDiT] = []

    def build() -> DiTTrainable:
        statistics_BZ = train.transpose(0, 1).flatten(1)
        models.append(_model(tuple(train.shape[1:])).set_statistics(statistics_BZ.mean(1), statistics_BZ.std(1)))
        return DiTTrainable(models[-1], DiffusionObjective())

    def batch(step: int) -> dict[str, Tensor]:
        chosen = torch.Generator().manual_seed(ladder.seed * 1_000_003 + step)
        return _batch(train[torch.randint(len(train), (BATCH,), generator=chosen)], step * BATCH)

    def measure() -> dict[str, object]:
        losses = DiTTrainable(models[-1], DiffusionObjective()).evaluate(_batch(val, 0))["flow_loss"]
        return {"flow_loss": float(losses.mean()), **cost(tuple(val.shape[1:]))}

    return unit.run(build, batch, measure, course)


def cost(chunk: tuple[int, ...]) -> dict[str, object]:
    """Tokens, seconds and added peak megabytes of a training step on `CHUNKS` chunks of latents of that shape (Z, t, h, w)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, megabytes = pool.apply(_timed, (chunk,))
    return {"tokens": CHUNKS * chunk[1] * chunk[2] * chunk[3], "step_seconds": seconds, "step_megabytes": megabytes}


def _timed(chunk: tuple[int, ...]) -> tuple[float, float]:
    torch.set_num_threads(1)
    player = DiTTrainable(_model(chunk), DiffusionObjective()).players["dit"]
    optimizer = torch.optim.AdamW(player.parameters())
    batch = _batch(torch.randn(BATCH, chunk[0], CHUNKS * chunk[1], *chunk[2:]), 0)
    before, took = _peak_megabytes(), []
    for step in range(TIMED_STEPS):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss, _ = player(batch, step)
        loss.backward()
        optimizer.step()
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:]), _peak_megabytes() - before


def _peak_megabytes() -> float:
    """Of this process; `ru_maxrss` would be its parent's where that is the larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _model(chunk: tuple[int, ...]) -> VideoDiT:
    return VideoDiT(DiTConfig(z=chunk[0], width=96, depth=4, heads=4, text_width=TEXT_WIDTH, chunk=chunk[1]))


def _batch(latent_BZthw: Tensor, first_seed: int) -> dict[str, Tensor]:
    B = len(latent_BZthw)
    no_text = {"text_BLE": torch.zeros(B, 1, TEXT_WIDTH), "text_mask_BL": torch.zeros(B, 1, dtype=torch.bool)}
    return {"latent_BZthw": latent_BZthw, "seed_B": first_seed + torch.arange(B), **no_text}


def _latents(ladder: Ladder, name: str, split: str) -> Tensor:
    """Latents of all windows of a split by one rung, encoded once."""
    cache = ladder.unit(name).folder / f"latents-{split}.pt"
    if not cache.exists():
        rung = ladder.rung(name)
        with aside(cache) as part:
            torch.save(torch.cat([rung.encode(windows).values for windows in ladder.material.windows(split).split(16)]), part)
    loaded: Tensor = torch.load(cache, weights_only=True)
    return loaded
