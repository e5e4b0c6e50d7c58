"""Judges of what was generated: small classifiers of what a plain scene shows, trained on renders that nothing else is trained on.

One looks at clips. It sees scenes as they come out of the frozen autoencoder, which is what every generated clip comes out of, and the
renders themselves. One looks at tokens, so that what a language model says can be scored whatever the de-tokenizer makes of it. A
generated clip counts as right if the judge sees in it what its caption asks for; a judge's own accuracy on held-out scenes bounds that.
Clips are compared as sets too, by the Fréchet distance of Gaussians fitted to the judge's last features (arXiv 1706.08500): FVD's
formula on other features, so its figures compare with each other alone.

Legend: B clips, C channels, T H W frames, rows, columns, M tokens of a clip, D features.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final

import plain
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH: Final = 32
FEATURES: Final = 48
NOISE: Final = 0.2
"""Deviation of the noise that covers every second sample in training, so that no single number decides."""
PLAYER: Final = "judge"
FILE: Final = "judge.safetensors"


class Judge(nn.Module):
    """Clips (B, 3, T, H, W) in [-1, 1], or tokens (B, M, D), to logits of each factor."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({factor: nn.Linear(FEATURES, len(values)) for factor, values in plain.FACTORS.items()})

    def forward(self, batch: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of all factors of the batch's `seen`."""
        seen = batch["seen"]
        noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(step))
        noise[::2] = 0
        features_BD = self.trunk(seen + NOISE * noise)
        losses = [F.cross_entropy(head(features_BD), batch[factor]) for factor, head in self.heads.items()]
        return torch.stack(losses).sum(), {}


def of_clips() -> Judge:
    """Frames are channels: nothing here lasts longer than a clip."""
    widths = (3 * plain.FRAMES, WIDTH, WIDTH, WIDTH)
    convolutions = [layer for before, after in pairwise(widths) for layer in (nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU())]
    dense = (nn.Flatten(), nn.Linear(WIDTH * (plain.EDGE // 8) ** 2, FEATURES), nn.SiLU())
    return Judge(nn.Sequential(nn.Flatten(1, 2), *convolutions, *dense))


def of_tokens(numbers: int) -> Judge:
    """`numbers` of all a clip's tokens."""
    return Judge(nn.Sequential(nn.Flatten(), nn.Linear(numbers, 2 * FEATURES), nn.SiLU(), nn.Linear(2 * FEATURES, FEATURES), nn.SiLU()))


class JudgeTrainable:
    """As the loop of `unit` takes it."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.players: Mapping[str, nn.Module] = {PLAYER: judge}

    def export(self, folder: Path) -> None:
        """Save the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.judge.state_dict(), folder / FILE)


def load(judge: Judge, folder: Path) -> Judge:
    """A trained judge's weights into a fresh one."""
    judge.load_state_dict(load_file(folder / FILE))
    return judge.eval()


@torch.no_grad()
def score(judge: Judge, seen: Tensor, labels: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of the samples that show the asked value of each factor, of `all` of them, and the `mean` of the factors' shares."""
    features_BD = judge.trunk(seen)
    right = {factor: head(features_BD).argmax(-1) == labels[factor] for factor, head in judge.heads.items()}
    everything = torch.stack(list(right.values())).all(0)
    shares = {factor: float(hit.float().mean()) for factor, hit in right.items()}
    return shares | {"all": float(everything.float().mean()), "mean": sum(shares.values()) / len(shares)}


@torch.no_grad()
def distance(judge: Judge, seen: Tensor, real: Tensor) -> float:
    """Fréchet distance of two sets of samples in the judge's features."""
    (mean_D, spread_DD), (real_D, real_DD) = (_gaussian(judge.trunk(samples)) for samples in (seen, real))
    cross = torch.linalg.eigvals(spread_DD @ real_DD).real.clamp(min=0).sqrt().sum()
    return float((mean_D - real_D).square().sum() + spread_DD.trace() + real_DD.trace() - 2 * cross)


def _gaussian(features_BD: Tensor) -> tuple[Tensor, Tensor]:
    return features_BD.double().mean(0), features_BD.double().T.cov()
