"""`SceneJudge`: a small classifier of what a clip of one drawn shape shows: its colour, its shape, its way to move.

It scores generated clips. It is trained by the one loop on scenes that are drawn for it alone (`SceneFeed`), and validated on others, so
that its own accuracy is known. Half of the scenes are blurred, because what it is to judge has been through decoders. Not covered: what is
scored with it (`stages/score.py`), any other kind of video.

Legend: B clips, C colours, T H W frames, rows, columns, D features, V values of a factor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.infra.training import Batch
from kinetok.pipelines.data.instructions import OPTIONS, Factor, fact_of
from kinetok.pipelines.data.order import sample_seed
from kinetok.pipelines.data.positions import PositionFeed, Split
from kinetok.pipelines.data.scenes import draw_scene
from kinetok.tokenizers.base import weights_digest

PLAYER: Final = "judge"
FRAMES: Final = 8
EDGE: Final = 32
WIDTHS: Final = (24, 48, 64, 96)
STRIDES: Final = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))
TRAINED: Final = 4000
"""Scenes that it is trained on; drawn once in each process."""
TESTED: Final = 400
OWN_SEED: Final = 1_000_003
"""Added to the seed of a data set: the judge never sees its scenes."""
WEIGHTS = "model.safetensors"


class SceneJudge(nn.Module):
    """Logits of every factor."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            layer
            for (inputs, outputs), stride in zip(pairwise((3, *WIDTHS)), STRIDES, strict=True)
            for layer in (nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())
        ]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({factor: nn.Linear(2 * WIDTHS[-1], len(values)) for factor, values in OPTIONS.items()})

    def forward(self, video_BCTHW: Tensor) -> dict[Factor, Tensor]:
        """(B, V) of every factor, of videos in [-1, 1] of any size and length."""
        small_BCTHW = F.interpolate(video_BCTHW, size=(FRAMES, EDGE, EDGE), mode="trilinear", align_corners=False)
        features_BDthw = self.trunk(small_BCTHW)
        features_BD = torch.cat([features_BDthw.amax((2, 3, 4)), features_BDthw.mean((2, 3, 4))], dim=1)
        return {factor: self.heads[factor](features_BD) for factor in OPTIONS}

    @torch.no_grad()
    def sees(self, video_BCTHW: Tensor) -> list[dict[Factor, str]]:
        """What it takes each video to show, in the words of answers."""
        chosen = {factor: logits_BV.argmax(-1).tolist() for factor, logits_BV in self(video_BCTHW).items()}
        return [{factor: OPTIONS[factor][chosen[factor][place]] for factor in OPTIONS} for place in range(len(video_BCTHW))]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SceneJudge":
        """The judge saved in `folder`, in eval mode."""
        judge = cls()
        judge.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return judge.eval()


class JudgePlayer(nn.Module):
    """What the optimizer sees: the judge, and its cross-entropy as `forward`."""

    def __init__(self, judge: SceneJudge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of all factors together; a sample's own seed decides whether it is blurred, and its noise."""
        seen_BCTHW = torch.stack([_worn(clip, int(seed)) for clip, seed in zip(batch["video_BCTHW"], batch["seed_B"], strict=True)])
        logits = self.judge(seen_BCTHW)
        return torch.stack([F.cross_entropy(logits[factor], batch[factor]) for factor in OPTIONS if factor in batch]).sum(), {}


class JudgeTrainable:
    """A judge as the training loop takes it."""

    def __init__(self) -> None:
        self.judge = SceneJudge()
        self.players: Mapping[str, nn.Module] = {PLAYER: JudgePlayer(self.judge)}
        self.frozen: Mapping[str, nn.Module] = {}

    def active(self, player: str, step: int) -> bool:
        """The one player always takes part."""
        return True

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Whether each factor is seen rightly, (B,)."""
        logits = self.judge(batch["video_BCTHW"])
        return {factor: (logits[factor].argmax(-1) == batch[factor]).float() for factor in OPTIONS if factor in batch}

    def digest(self, module: nn.Module) -> str:
        """Digest of a module's weights; nothing is frozen."""
        return weights_digest(module)

    def export(self, folder: Path) -> None:
        """Save the weights."""
        save_file(self.judge.state_dict(), folder / WEIGHTS)


@dataclass(frozen=True)
class SceneFeed(PositionFeed):
    """Drawn scenes of one shape, at the size that a judge sees them.

    Batches hold `video_BCTHW` (float32 in [-1, 1]), the index of each factor's value where it has one, (B,), and `seed_B`.
    """

    split: Split
    seed: int
    """Of the data set that is to be judged."""
    fps: float
    """Of a clip."""
    frames: int
    seconds: float
    """Of a whole scene, of which the clip is the beginning."""
    plain: bool
    """Whether each of the data set's backgrounds is of one colour."""
    loaders: int = 0

    @property
    def title(self) -> str:
        """What the samples are of, for errors."""
        return "drawn scenes"

    def __len__(self) -> int:
        return TRAINED if self.split == "train" else TESTED

    def load(self, positions: list[int]) -> Batch:
        """The samples at these global positions."""
        clips, labels = zip(*(self._clip(position) for position in positions), strict=True)
        told: Batch = {factor: torch.tensor([label[factor] for label in labels]) for factor in labels[0]}
        seeds = torch.tensor([sample_seed(self.seed, position) for position in positions])
        return {"video_BCTHW": torch.stack(clips), "seed_B": seeds, **told}

    def _clip(self, position: int) -> tuple[Tensor, dict[Factor, int]]:
        number = position % len(self) + (0 if self.split == "train" else TRAINED)
        return _drawn(self.seed + OWN_SEED, number, self.fps, self.frames, self.seconds, self.plain)


@lru_cache(maxsize=TRAINED + TESTED)
def _drawn(seed: int, number: int, fps: float, frames: int, seconds: float, plain: bool) -> tuple[Tensor, dict[Factor, int]]:
    """One scene as a clip of `FRAMES` frames, and the place among `OPTIONS` of the value of each factor that it has."""
    scene = draw_scene(seed, number, frames=max(frames, round(seconds * fps)), size=EDGE, most=1, plain=plain)
    kept = np.linspace(0, frames - 1, FRAMES).round().astype(int)
    video_CTHW = torch.from_numpy(scene.pixels_THWC[kept]).permute(3, 0, 1, 2).float() / 127.5 - 1
    answers = fact_of(scene.shapes[0]).answers
    return video_CTHW, {factor: OPTIONS[factor].index(answer) for factor, answer in answers.items()}


def _worn(video_CTHW: Tensor, seed: int) -> Tensor:
    """The clip with a little noise, or blurred and with more."""
    generator = torch.Generator().manual_seed(seed)
    noise_CTHW = torch.randn(video_CTHW.shape, generator=generator).to(video_CTHW.device)
    if torch.rand((), generator=generator) < 0.5:
        return video_CTHW + 0.05 * noise_CTHW
    small_CTHW = F.interpolate(video_CTHW, scale_factor=0.5, mode="bilinear", antialias=True)
    return F.interpolate(small_CTHW, size=video_CTHW.shape[-2:], mode="bilinear") + 0.1 * noise_CTHW
