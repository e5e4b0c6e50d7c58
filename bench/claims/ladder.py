"""The rungs that are compared, and how each is trained: the same data, loss, loop and search of the learning rate for all of them.

Two starts are compared, each for the base and for the direct models alike: `dct`, kinetok's own linear transform coder, and `torch`,
the layers' default initialisation, which is what a public MagViT-v2 begins with.

Legend: B clips, T H W C frames, rows, columns, channels, D trunk width, t h w latent positions.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from footage import footage, quadrants
from torch import Tensor
from unit import FIGURES, Course, Unit

from kinetok.tokenizers import catalog
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.presets import SMALL_4X, SMALL_GROWN, direct
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.training import ReconstructionObjective, RungTrainable
from kinetok.tokenizers.metrics import clip_psnr, frame_psnr

BATCH = 8
RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates that are tried."""
SEARCH_SHARE = 16
"""The base's steps over those of one try."""
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

    def course(self, name: str, lr: float, seed: int) -> Course:
        """A direct model gets all steps of its grown rival and of what that stands on; it is measured at the new blocks' steps too."""
        stages = {"base": 0, "direct8": 1, "direct16": 2}
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

    def seeds(self, start: str) -> list[int]:
        """Seeds whose base is trained."""
        bases = self.work.glob(f"seed*/{start}/base/{FIGURES}")
        return sorted(int(base.parents[2].name.removeprefix("seed")) for base in bases)


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

    def trained(self, name: str) -> bool:
        """Whether the rung is there."""
        return self.unit(name).figures.exists()

    def train(self, name: str) -> dict[str, object]:
        """Figures of a rung, trained now where it was not before, and all below it with it. Raises OutOfTime."""
        unit = self.unit(name)
        if unit.figures.exists():
            return unit.read()
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
        found: dict[float, float] = {}
        for lr in RATES:
            unit = Unit(self.material.work / "rates" / self.start / kind / f"{lr:g}", self.deadline)
            figures = self._run(unit, kind, Course(max(1, self.budget.base // SEARCH_SHARE), lr, seed=1000))
            found[lr] = float(str(figures["psnr"]))
        return max(found, key=lambda lr: found[lr])

    def _run(self, unit: Unit, name: str, course: Course) -> dict[str, object]:
        if unit.figures.exists():
            return unit.read()
        lower = GROWN[name][0] if name in GROWN else None
        features = self._features(lower) if lower else {}
        models: list[Rung] = []

        def build() -> RungTrainable:
            models.append(self._fresh(name))
            return RungTrainable(models[-1], ReconstructionObjective())

        def batch(step: int) -> dict[str, Tensor]:
            chosen = torch.Generator().manual_seed(course.seed * 1_000_003 + step)
            rows = torch.randint(len(self.material.train_bytes), (BATCH,), generator=chosen)
            cached = {key: stored[rows] for key, stored in features.items()}
            return {"video_BTHWC": self.material.train_bytes[rows], "seed_B": step * BATCH + torch.arange(BATCH), **cached}

        print(f"{unit.folder}: {course.steps} steps at {course.lr:g}", flush=True)
        return unit.run(build, batch, lambda: measure(models[-1], self.material.val_pixels), course)

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
            torch.save(stored, cache.with_suffix(".part"))
            cache.with_suffix(".part").rename(cache)
        loaded: dict[str, Tensor] = torch.load(cache, weights_only=True)
        return loaded


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
