"""Encoding and decoding speed of our base autoencoder against diffusers' CogVideoX and Wan, and what growing adds to encoding.

All models have random weights, the same input, 16 latent channels and, within 5 %, the same number of parameters. Ours stands there
twice: laid out as at full size, from single pixels on, and as the small preset is, from patches of 4 x 4. The others run in whichever
memory format is the faster for them. Rounds are interleaved, and figures are medians, because machines have other things to do.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from line import Line
from torch import Tensor, nn

from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.rung import Rung

SHAPE = (1, 3, 17, 64, 64)
FRAMES = SHAPE[2]
ROUNDS = 5
TOLERANCE = 0.05
OURS = {
    "from pixels": CausalConfig(channels=28, mult=(1, 2, 2, 4), strides=((1, 2), (2, 2), (2, 2)), blocks=1, groups=4),
    "from 4x4 patches": CausalConfig(channels=32, mult=(1, 2, 4), strides=((2, 1), (2, 2)), blocks=1, patch=4, groups=8),
}
GROWN = GrownConfig(blocks=1, groups=4)
MEMOISED = {"8x": 1.53, "16x": 1.82}
"""Frames that the base's trunk encodes of a 17-frame clip over 17, subsampled ones shared between the rungs (arXiv 2501.05442)."""


@torch.no_grad()
def lines(work: Path) -> list[Line]:
    """Encode and decode rates against the faster of the two, and the grown rungs' encoding time against the base's."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    video_BCTHW = torch.rand(SHAPE) * 2 - 1
    return against_others(video_BCTHW) + growing(video_BCTHW)


def against_others(video_BCTHW: Tensor) -> list[Line]:
    """One line each for encoding and decoding of each of our layouts."""
    ours = {name: CausalTokenizer(config).eval() for name, config in OURS.items()}
    theirs = {"CogVideoX": fastest(cogvideox(), video_BCTHW), "Wan": fastest(wan(), video_BCTHW)}
    check_sizes({**ours, **theirs})
    encode: dict[str, Callable[[], object]] = {
        name: (lambda model=model: model.encode(video_BCTHW)) for name, model in {**ours, **theirs}.items()
    }
    latent = {name: model.encode(video_BCTHW) for name, model in ours.items()}
    decode: dict[str, Callable[[], object]] = {name: (lambda model=model, z=latent[name]: model.decode(z)) for name, model in ours.items()}
    for name, model in theirs.items():
        mean_BZthw = model.encode(video_BCTHW).latent_dist.mean
        decode[name] = lambda model=model, z=mean_BZthw: model.decode(z)
    found = []
    for direction, calls in (("encode", encode), ("decode", decode)):
        rate = {name: FRAMES / seconds for name, seconds in medians(calls).items()}
        faster = max(theirs, key=lambda name: rate[name])
        found += [
            Line(f"{direction}, our base {name} (floor: diffusers' {faster})", rate[name], "frames/s", rate[faster], ">= 1.2")
            for name in ours
        ]
    return found


def growing(video_BCTHW: Tensor) -> list[Line]:
    """Encoding time of an 8x and a 16x rung, untrained, against that of the base below them."""
    base: Rung = CausalTokenizer(OURS["from pixels"]).eval()
    grown: Rung = GrownTokenizer(GROWN, base).eval()
    rungs = {"4x": base, "8x": grown, "16x": GrownTokenizer(GROWN, grown).eval()}
    took = medians({name: (lambda rung=rung: rung.encode(video_BCTHW)) for name, rung in rungs.items()})
    return [Line(f"encode {name} (floor: 4x)", took[name] * 1e3, "ms", took["4x"] * 1e3, f"<= {aim:.2f}") for name, aim in MEMOISED.items()]


def medians(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each call over interleaved rounds, after one that is not counted."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in took.items()}


def fastest(model: nn.Module, video_BCTHW: Tensor) -> nn.Module:
    """The model in the memory format in which it encodes faster."""
    formats = (torch.contiguous_format, torch.channels_last_3d)
    took = {}
    for layout in formats:
        lay_out_(model, layout)
        took[layout] = medians({"": lambda: model.encode(video_BCTHW)})[""]
    return lay_out_(model, min(formats, key=lambda layout: took[layout]))


def lay_out_(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """3D convolution weights in a memory format; Wan has 2D ones too, which have another."""
    for parameter in model.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model


def check_sizes(models: Mapping[str, nn.Module]) -> None:
    """ValueError where the models are not of equal size."""
    sizes = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}
    if min(sizes.values()) < (1 - TOLERANCE) * max(sizes.values()):
        raise ValueError(f"parameters differ by more than {TOLERANCE:.0%}: {sizes}")


def cogvideox() -> nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    widths = (24, 48, 48, 96)
    model: nn.Module = AutoencoderKLCogVideoX(
        block_out_channels=widths, latent_channels=16, layers_per_block=1, norm_num_groups=8, sample_height=128, sample_width=128
    )
    return model.eval()


def wan() -> nn.Module:
    from diffusers import AutoencoderKLWan

    model: nn.Module = AutoencoderKLWan(
        base_dim=21, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return model.eval()


if __name__ == "__main__":
    for line in lines(Path()):
        print(f"{line.name}: {line.value:.1f} {line.unit}, floor {line.floor:.1f}, ratio {line.ratio:.2f}, aim {line.aim}")
