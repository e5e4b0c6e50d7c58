"""The rungs that are compared, and how each is trained: the same data, loss, loop and search of the learning rate for all of them.

Two starts are compared, each for the base and for the direct models alike: `dct`, kinetok's own linear transform coder, and `torch`,
the layers' default initialisation, which is what a public MagViT-v2 begins with.

Legend: B clips, T H W C frames, rows, columns, channels, D trunk width, t h w latent positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from footage import CROP, EDGE, PER_VIDEO, footage, quadrants
from torch import Tensor
from unit import FIGURES, WARMUP, Course, OtherBudget, Unit, aside

from kinetok.tokenizers import catalog
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.presets import SMALL_4X, SMALL_GROWN, direct
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.training import ReconstructionObjective, RungTrainable
from kinetok.tokenizers.metrics import clip_psnr, frame_psnr

BATCH = 8
RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates that are tried first."""
EXTENSIONS = 3
"""How often a rate beyond the edge is tried where the edge is best: down to 6.25e-5, up to 1.6e-2."""
SEARCH_SHARE, SEARCH_WARMUPS = 16, 4
"""The base's steps over those of one try; a try's steps over those of the warm-up, at least."""
SEARCH_HELD = 8
"""One in so many training windows is what tries are compared on, and not trained on: the last ones, and no others of their videos."""
STAGE_SHARE = 3
"""A grown stage gets this fraction of the base's steps: most of the budget is the base's, which every grown rung stands on."""
GENERATOR_SHARE, GENERATOR_STEPS = 3, 400
"""The base's steps over those of a diffusion transformer, and how many that gets at least: with fewer it knows little of the latents."""
KEPT = 4
"""Every how manieth frame is a key frame of a 16x rung."""
FIELD = {"dct": "transform", "torch": "random"}
"""`CausalConfig.start` of each start."""
STANDING: dict[str, CausalConfig] = {"base": SMALL_4X, "direct8": direct(SMALL_4X, 2), "direct16": direct(SMALL_4X, 4)}
GROWN: dict[str, tuple[str, GrownConfig]] = {
    "grown8": ("base", SMALL_GROWN),
    "grown16": ("grown8", SMALL_GROWN),
    "deeper8": ("base", SMALL_GROWN.model_copy(update={"blocks": 2})),
    "slower8": ("base", SMALL_GROWN),
    "unfrozen8": ("base", SMALL_GROWN.model_copy(update={"unfreeze_decoder": "all"})),
    "residual8": ("base", SMALL_GROWN.model_copy(update={"ada": "none"})),
    "modulated8": ("base", SMALL_GROWN.model_copy(update={"key": False})),
    "keyless8": ("base", SMALL_GROWN.model_copy(update={"key": False, "ada": "none"})),
}
"""Name, rung below, numbers.

Three levers: `deeper8` has twice the blocks, `slower8` the base's learning rate, `unfrozen8` that too and trains the decoder below. The
last three are ablations: key + r without AdaNorm; AdaNorm without the sum; no key path at all.
"""
KIND = {
    "slower8": "base",
    "unfrozen8": "base",
    "direct16": "direct8",
    "grown16": "grown8",
    **dict.fromkeys(("deeper8", "residual8", "modulated8", "keyless8"), "grown8"),
}
"""Whose learning rate a rung takes where it has no search of its own."""


@dataclass(frozen=True)
class Budget:
    """Steps: of the base, and of each grown stage."""

    base: int
    stage: int

    @classmethod
    def of(cls, base: int) -> "Budget":
        """Both in proportion."""
        return cls(base, base // STAGE_SHARE)

    def course(self, name: str, lr: float, seed: int) -> Course:
        """A direct model gets all steps of its grown rival and of what that stands on; it is measured at the new blocks' steps too."""
        stages = {"base": 0, "direct8": 1, "direct16": 2}
        if name.startswith("dit-"):
            return Course(max(GENERATOR_STEPS, self.base // GENERATOR_SHARE), lr, seed)
        if name not in stages:
            return Course(self.stage, lr, seed)
        new = stages[name] * self.stage
        return Course(self.base + new, lr, seed, (new,) if new else (self.base // 2,))


@dataclass(frozen=True)
class Material:
    """Where clips come from and where they are kept decoded."""

    source: Path
    work: Path

    @cached_property
    def train_bytes(self) -> Tensor:
        """Training samples (N, T, H, W, C)."""
        return torch.from_numpy(quadrants(footage(self.source, self.work, "train")))

    @cached_property
    def val_pixels(self) -> Tensor:
        """Held-out windows (B, C, T, H, W) in [-1, 1]."""
        return self.windows("val")

    def windows(self, split: str) -> Tensor:
        """Whole windows of a split in [-1, 1]."""
        return to_pixels(torch.from_numpy(footage(self.source, self.work, split)))

    @cached_property
    def search_pixels(self) -> Tensor:
        """Training windows that learning rates are compared on, in [-1, 1]."""
        windows = footage(self.source, self.work, "train")
        return to_pixels(torch.from_numpy(windows[-(len(windows) // SEARCH_HELD) :]))

    @property
    def search_samples(self) -> int:
        """How many training samples, the first ones, a search trains on: no video of `search_pixels` is among them."""
        per_window = (EDGE // CROP) ** 2
        windows = len(self.train_bytes) // per_window
        return per_window * (windows - windows // SEARCH_HELD - PER_VIDEO["train"] + 1)

    def seeds(self, start: str) -> list[int]:
        """Seeds whose base is trained."""
        bases = self.work.glob(f"seed*/{start}/base/{FIGURES}")
        return sorted(int(base.parents[2].name.removeprefix("seed")) for base in bases)

    def ladders(self, start: str) -> list["Ladder"]:
        """The ladders of one start in the work folder, to be read. Raises OtherBudget where the steps of their bases differ."""
        bases = {seed: Unit(self.work / f"seed{seed}" / start / "base", deadline=0.0).read() for seed in self.seeds(start)}
        steps = {int(str(figures["steps"])) for figures in bases.values()}
        if len(steps) > 1:
            of_seeds = ", ".join(f"seed {seed}: {figures['steps']}" for seed, figures in bases.items())
            raise OtherBudget(f"bases of {self.work} ({start}) have different steps ({of_seeds}): another budget needs another work folder")
        return [Ladder(self, seed, start, Budget.of(*steps), deadline=0.0) for seed in bases]


@dataclass(frozen=True)
class Ladder:
    """All rungs of one seed and one start."""

    material: Material
    seed: int
    start: str
    budget: Budget
    deadline: float

    def unit(self, name: str) -> Unit:
        return Unit(self.material.work / f"seed{self.seed}" / self.start / name, self.deadline)

    def course(self, name: str) -> Course:
        """How a rung is trained, but for its learning rate."""
        return self.budget.course(name, 0.0, self.seed)

    def searched(self, kind: str) -> Path:
        """Where the search of a kind's learning rate is kept, one for all seeds."""
        return self.material.work / "rates" / self.start / kind

    def trained(self, name: str) -> bool:
        """Whether the rung is there."""
        return self.unit(name).figures.exists()

    def train(self, name: str) -> dict[str, object]:
        """Figures of a rung, trained now where it was not before, and all below it with it. Raises OutOfTime."""
        unit = self.unit(name)
        if unit.figures.exists():
            return unit.read(self.course(name).steps)
        course = self.budget.course(name, self._rate(KIND.get(name, name)), self.seed)
        return self._run(unit, name, course)

    def rung(self, name: str) -> Rung:
        """A trained rung."""
        self.train(name)
        loaded = catalog.load(self.unit(name).model)
        assert isinstance(loaded, Rung)
        return loaded

    def _rate(self, kind: str) -> float:
        """The learning rate that is best for its kind after a short training, searched once for all seeds."""
        steps = max(SEARCH_WARMUPS * WARMUP, self.budget.base // SEARCH_SHARE)

        def reached(lr: float) -> float:
            unit = Unit(self.searched(kind) / f"{lr:g}", self.deadline)
            return float(str(self._run(unit, kind, Course(steps, lr, seed=1000), searching=True)["psnr"]))

        return best_rate(reached)

    def _run(self, unit: Unit, name: str, course: Course, *, searching: bool = False) -> dict[str, object]:
        """Train on all training samples, measured on held-out clips; a search holds out some of the training samples instead."""
        if unit.figures.exists():
            return unit.read(course.steps)
        lower = GROWN[name][0] if name in GROWN else None
        features = self._features(lower) if lower else {}
        samples = self.material.search_samples if searching else len(self.material.train_bytes)
        models: list[Rung] = []

        def build() -> RungTrainable:
            models.append(self._fresh(name))
            return RungTrainable(models[-1], ReconstructionObjective())

        def batch(step: int) -> dict[str, Tensor]:
            chosen = torch.Generator().manual_seed(course.seed * 1_000_003 + step)
            rows = torch.randint(samples, (BATCH,), generator=chosen)
            cached = {key: stored[rows] for key, stored in features.items()}
            return {"video_BTHWC": self.material.train_bytes[rows], "seed_B": step * BATCH + torch.arange(BATCH), **cached}

        print(f"{unit.folder}: {course.steps} steps at {course.lr:g}", flush=True)
        held_out = self.material.search_pixels if searching else self.material.val_pixels
        return unit.run(build, batch, lambda: measure(models[-1], held_out), course)

    def _fresh(self, name: str) -> Rung:
        if name in GROWN:
            lower, config = GROWN[name]
            return GrownTokenizer(config, self.rung(lower))
        return CausalTokenizer(STANDING[name].model_copy(update={"start": FIELD[self.start]}))

    @torch.no_grad()
    def _features(self, lower: str) -> dict[str, Tensor]:
        """Growth features of all training samples, computed once for all that is grown on `lower`."""
        rung = self.rung(lower)
        cache = self.unit(lower).folder / "features.pt"
        if not cache.exists():
            parts = [rung.growth_features(to_pixels(part)) for part in self.material.train_bytes.split(64)]
            stored = {
                "full_BDthw": torch.cat([part.full_BDthw for part in parts]),
                "key_BDthw": torch.cat([part.key_BDthw for part in parts]),
            }
            with aside(cache) as part:
                torch.save(stored, part)
        loaded: dict[str, Tensor] = torch.load(cache, weights_only=True)
        return loaded


def best_rate(reached: Callable[[float], float]) -> float:
    """The rate with which most is reached: of `RATES`, and of a few halves or doubles beyond an edge that is best."""
    found = {lr: reached(lr) for lr in RATES}
    best = max(found, key=lambda lr: found[lr])
    for _ in range(EXTENSIONS):
        if min(found) < best < max(found):
            break
        beyond = best / 2 if best == min(found) else best * 2
        found[beyond] = reached(beyond)
        best = max(found, key=lambda lr: found[lr])
    return best


@torch.no_grad()
def measure(model: Rung, val_BCTHW: Tensor) -> dict[str, object]:
    """Held-out dB, means over clips: PSNR of the clip, of its kept frames, of each frame; a 4x rung's also on kept frames alone."""
    pairs = [(model.decode(model.encode(part)), part) for part in val_BCTHW.split(16)]
    clips = torch.cat([clip_psnr(output, part) for output, part in pairs])
    frames = torch.cat([frame_psnr(output, part).clamp(max=80) for output, part in pairs])
    kept = torch.cat([clip_psnr(output[:, :, ::KEPT], part[:, :, ::KEPT]) for output, part in pairs])
    figures: dict[str, object] = {
        "psnr": float(clips.mean()),
        "kept": float(kept.mean()),
        "frames": frames.mean(0).tolist(),
        "clips": clips.tolist(),
    }
    if model.temporal == KEPT:
        alone = [part[:, :, ::KEPT] for part in val_BCTHW.split(16)]
        figures["subsampled"] = float(torch.cat([clip_psnr(model.decode(model.encode(part)), part) for part in alone]).mean())
    return figures


def to_pixels(video_BTHWC: Tensor) -> Tensor:
    """Bytes as floats in [-1, 1], (B, C, T, H, W)."""
    return video_BTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
