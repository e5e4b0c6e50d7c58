"""Encoding and decoding speed of our base autoencoder against diffusers' CogVideoX and Wan, and what growing adds to encoding.

All models have random weights, the same input, 16 latent channels and, within 5 %, the same number of parameters. Ours stands there
twice: laid out as at full size, from single pixels on, and as the small preset is, from patches of 4 x 4. The others run in whichever
memory format is the faster for them. Rounds are interleaved, and figures are medians of the CPU seconds of one thread, because machines
have other things to do. Each is measured on one clip and on four, which is what `encode` takes at a time unless told otherwise: much of
one clip torch convolves with kernels slower than oneDNN's, in the others' models but not in ours. What growing adds stands beside what it
adds in FLOPs: 1.53 and 1.82 are the frames that the base's trunk encodes of a 17-frame clip over 17, and the new blocks come on top.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from line import Line
from torch import Tensor, nn

from kinetok.llm.cost import tokenizer_flops
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.rung import Rung

CLIP = (3, 17, 64, 64)
CLIPS = {"one clip": 1, "four clips": 4}
ROUNDS = 5
TOLERANCE = 0.05
OURS = {
    "from pixels": CausalConfig(channels=28, mult=(1, 2, 2, 4), strides=((1, 2), (2, 2), (2, 2)), blocks=1, groups=4),
    "from 4x4 patches": CausalConfig(channels=32, mult=(1, 2, 4), strides=((2, 1), (2, 2)), blocks=1, patch=4, groups=8),
}
GROWN = GrownConfig(blocks=1, groups=4)
MEMOISED = {"8x": 1.53, "16x": 1.82}
"""Frames that the base's trunk encodes of a clip over the clip's, subsampled ones shared between the rungs (arXiv 2501.05442)."""


@torch.no_grad()
def lines(work: Path) -> list[Line]:
    """Encode and decode rates against the faster of the two, and the grown rungs' encoding time against the base's."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    videos = {name: torch.rand(clips, *CLIP) * 2 - 1 for name, clips in CLIPS.items()}
    return [line for name, video in videos.items() for line in against_others(name, video) + growing(name, video)]


def against_others(clips: str, video_BCTHW: Tensor) -> list[Line]:
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
        rate = {name: video_BCTHW.shape[0] * video_BCTHW.shape[2] / seconds for name, seconds in medians(calls, time.process_time).items()}
        faster = max(theirs, key=lambda name: rate[name])
        found += [
            Line(f"{direction} {clips}, our base {name} (floor: diffusers' {faster})", rate[name], "frames/s", rate[faster], ">= 1.2")
            for name in ours
        ]
    return found


def growing(clips: str, video_BCTHW: Tensor) -> list[Line]:
    """Encoding time of an 8x and a 16x rung, untrained, against that of the base below them."""
    rungs = {name: build().eval() for name, build in ladder(OURS["from pixels"], GROWN).items()}
    flops = flop_ratios(OURS["from pixels"], GROWN)
    took = medians({name: (lambda rung=rung: rung.encode(video_BCTHW)) for name, rung in rungs.items()}, time.process_time)
    return [
        Line(f"encode {clips}, {name} (floor: 4x, by FLOPs {flops[name]:.2f})", took[name] * 1e3, "ms", took["4x"] * 1e3, f"<= {aim:.2f}")
        for name, aim in MEMOISED.items()
    ]


def ladder(base: CausalConfig, grown: GrownConfig) -> dict[str, Callable[[], Rung]]:
    """What builds the base and each rung on it."""

    def rung(doublings: int) -> Rung:
        return GrownTokenizer(grown, rung(doublings - 1)) if doublings else CausalTokenizer(base)

    return {name: partial(rung, doublings) for doublings, name in enumerate(("4x", *MEMOISED))}


def flop_ratios(base: CausalConfig, grown: GrownConfig) -> dict[str, float]:
    """FLOPs of encoding at each grown rung over the base's."""
    flops = {name: tokenizer_flops(build, (1, *CLIP))[0] for name, build in ladder(base, grown).items()}
    return {name: flops[name] / flops["4x"] for name in MEMOISED}


def medians(calls: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Median seconds of each call over interleaved rounds, after one that is not counted."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            began = clock()
            call()
            took[name].append(clock() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in took.items()}


def fastest(model: nn.Module, video_BCTHW: Tensor) -> nn.Module:
    """The model in the memory format in which it encodes faster."""
    formats = (torch.contiguous_format, torch.channels_last_3d)
    took = {}
    for layout in formats:
        lay_out_(model, layout)
        took[layout] = medians({"": lambda: model.encode(video_BCTHW)}, time.process_time)[""]
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
