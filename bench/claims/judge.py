"""The judge of generated clips: a small classifier of what a plain scene shows, trained on renders that nothing else is trained on.

It sees scenes as they come out of the frozen autoencoder, which is what every generated clip comes out of, and the renders themselves.
A generated clip is scored by whether the judge sees in it what its caption asks for; its own accuracy on held-out renders bounds that.
Clips are compared as sets too, by the Fréchet distance of Gaussians fitted to the judge's last features (arXiv 1706.08500): FVD's
formula on other features, so its figures compare with each other alone.

Legend: B clips, C channels, T H W frames, rows, columns, D features.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import plain
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH: Final = 32
FEATURES: Final = 48
PLAYER = "judge"


class Judge(nn.Module):
    """Clips (B, 3, T, H, W) in [-1, 1] to logits of each factor; frames are channels, for nothing here lasts longer than a clip."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3 * plain.FRAMES, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(WIDTH * (plain.EDGE // 8) ** 2, FEATURES),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict({factor: nn.Linear(FEATURES, len(values)) for factor, values in plain.FACTORS.items()})

    def features(self, video_BCTHW: Tensor) -> Tensor:
        """(B, D)."""
        features_BD: Tensor = self.trunk(video_BCTHW.flatten(1, 2))
        return features_BD

    def forward(self, batch: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of all factors; every second clip is covered with noise, so that no single pixel decides."""
        video_BCTHW = batch["video_BCTHW"]
        noise = torch.randn(video_BCTHW.shape, generator=torch.Generator().manual_seed(step))
        video_BCTHW = video_BCTHW + 0.2 * noise * (torch.arange(len(video_BCTHW)) % 2)[:, None, None, None, None]
        features_BD = self.features(video_BCTHW)
        losses = [F.cross_entropy(head(features_BD), batch[factor]) for factor, head in self.heads.items()]
        return torch.stack(losses).sum(), {}


class JudgeTrainable:
    """As the loop of `unit` takes it."""

    def __init__(self) -> None:
        self.judge = Judge()
        self.players: Mapping[str, nn.Module] = {PLAYER: self.judge}

    def export(self, folder: Path) -> None:
        """Save the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.judge.state_dict(), folder / "judge.safetensors")


def load(folder: Path) -> Judge:
    """A trained judge."""
    judge = Judge()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.eval()


@torch.no_grad()
def score(judge: Judge, video_BCTHW: Tensor, labels: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of the clips that show the asked value of each factor, and of all of them."""
    features_BD = judge.features(video_BCTHW)
    right = {factor: head(features_BD).argmax(-1) == labels[factor] for factor, head in judge.heads.items()}
    everything = torch.stack(list(right.values())).all(0)
    return {factor: float(hit.float().mean()) for factor, hit in right.items()} | {"all": float(everything.float().mean())}


@torch.no_grad()
def distance(judge: Judge, video_BCTHW: Tensor, real_BCTHW: Tensor) -> float:
    """Fréchet distance of two sets of clips in the judge's features."""
    (mean_D, spread_DD), (real_D, real_DD) = (_gaussian(judge.features(clips)) for clips in (video_BCTHW, real_BCTHW))
    cross = torch.linalg.eigvals(spread_DD @ real_DD).real.clamp(min=0).sqrt().sum()
    return float((mean_D - real_D).square().sum() + spread_DD.trace() + real_DD.trace() - 2 * cross)


def _gaussian(features_BD: Tensor) -> tuple[Tensor, Tensor]:
    return features_BD.double().mean(0), features_BD.double().T.cov()
