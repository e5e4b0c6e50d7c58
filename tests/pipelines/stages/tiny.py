"""A tokenizer of a few numbers for tests of `encode`, which can kill itself at a chosen forward pass.

Run as a script it is the driver of one `encode`: `tiny.py CLIPS OUT` kills itself when it hears of the first committed shard.
"""

import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.stage import Progress, Resources, StageContext, StageResult
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.encoding import Encoding
from kinetok.pipelines.stages.encode import encode
from kinetok.tokenizers.base import Geometry, LowerStage, ModelConfig, Tokens, TokenSpec, weights_digest


class TinyConfig(ModelConfig):
    kind: Literal["tiny"] = "tiny"


class Tiny(LowerStage):
    """One strided convolution. `fault(batch number)` runs before each forward pass."""

    config_class = TinyConfig
    feature_channels, temporal, spatial = 6, 4, 4
    geometry = Geometry(temporal=4, spatial=4, channels=2, encoder_width=6, decoder_width=6)

    def __init__(self, fault: "Fault | None" = None) -> None:
        super().__init__()
        self.config = TinyConfig()
        self.fault = fault
        self.conv = nn.Conv3d(3, 2, 4, stride=4)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) / (number + 1))

    def spec(self) -> TokenSpec:
        return TokenSpec(tokenizer="tiny", weights=weights_digest(self), layout="grid", channels=2, temporal=4, spatial=4)

    def encode(self, video_BCTHW: Tensor) -> Tokens:
        if self.fault is not None:
            self.fault()
        return Tokens(self.conv(video_BCTHW), video_BCTHW.shape[2])

    def feature_ladder(self, video_BCTHW: Tensor, rates: int) -> list[Tensor]:
        full = self.encode(video_BCTHW).values.repeat(1, 3, 1, 1, 1)
        return [full[:, :, :: 2**rate] for rate in range(rates)]

    def decode_features(self, features_BDthw: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, tokens: Tokens) -> Tensor:
        raise NotImplementedError


class Fault:
    """SIGKILL this very process at forward pass number `at`, counted over all processes by files in `folder`."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at = folder, at

    def __call__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        count = len(list(self.folder.iterdir()))
        (self.folder / f"{count:04d}").touch()
        if count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def silent(**_: object) -> None:
    pass


def deadly(*, done: int, **_: object) -> None:
    """Progress that ends its process once anything is done."""
    if done:
        os.kill(os.getpid(), signal.SIGKILL)


def run_encode(
    clips: Artifact, out: Path, *, fault: Fault | None = None, bad: float = 0.5, progress: Progress = silent, **changes: object
) -> StageResult:
    """One attempt of `encode` with the tiny model."""
    index = ClipIndex.open(clips)
    resources = Resources(workers=1, cpus=1, batch_size=2)
    options: dict[str, object] = {"content": "tokens", "dtype": "fp32", "recipe": index.recipe, "resources": resources, **changes}
    encoding = Encoding(partial(Tiny, fault), **options)  # type: ignore[arg-type]
    ctx = StageContext("tokens", "0" * 16, {"data": clips}, Folder(str(out)), resources, progress, threading.Event())
    return encode(ctx, index, encoding, bad)


if __name__ == "__main__":
    from kinetok.infra.launch import start_ray

    folder, target = sys.argv[1:]
    found = Store(Folder(str(Path(folder).parent))).read(Folder(folder))
    assert found is not None
    start_ray(cpus=2)
    run_encode(found, Path(target), progress=deadly)
