"""What torch.compile would save the small base tokenizer on a CPU, and what the fused AdamW saves it and Divot's U-Net: CPU seconds of one
thread, and of the compilation.

Prints them; takes minutes and needs a C++ compiler. Compiled are the two trunks, as with `resources.compile` of a stage, which is all but
the heads and the loss. Their results are compared in `tests/pipelines/test_compiled.py`.
"""

import time
from collections.abc import Callable

import torch
from tokenizer import medians
from torch import Tensor, nn

from kinetok.infra.compiling import compile_parts
from kinetok.infra.fit import PlayerConfig
from kinetok.infra.optim import adamw
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.presets import SMALL_4X
from kinetok.tokenizers.causal.training import AUTOENCODER, ReconstructionObjective, RungTrainable
from kinetok.tokenizers.divot.presets import SMALL
from kinetok.tokenizers.divot.unet import VideoUNet

ENCODED, TRAINED = 8, 4
"""Clips at a time, as in the main job."""
CLIP = (17, 64, 64, 3)


def main() -> None:
    torch.set_num_threads(1)
    calls: dict[str, Callable[[], object]] = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        for what, call in (("encode", encoding(compiled)), ("training step", training(compiled))):
            began = time.perf_counter()
            call()
            print(f"{what}, {name}: the first took {time.perf_counter() - began:.1f} s of wall-clock time")
            calls[f"{what}, {name}"] = call
    trained = {"the base": CausalTokenizer(SMALL_4X), "Divot's U-Net": VideoUNet(SMALL.detokenizer.unet)}
    calls |= {f"AdamW alone, {name}, fused={fused}": optimizer(net, fused) for name, net in trained.items() for fused in (False, True)}
    for name, seconds in medians(calls, time.process_time).items():
        print(f"{name}: {seconds * 1e3:.1f} ms")


def model(compiled: bool) -> CausalTokenizer:
    torch.manual_seed(0)
    built = CausalTokenizer(SMALL_4X)
    if compiled:
        compile_parts([built])
    return built


def encoding(compiled: bool) -> Callable[[], object]:
    tokenizer, video_BCTHW = model(compiled).eval(), torch.rand(ENCODED, *CLIP).permute(0, 4, 1, 2, 3) * 2 - 1
    return lambda: tokenizer.encode(video_BCTHW)


def training(compiled: bool) -> Callable[[], object]:
    player = RungTrainable(model(compiled), ReconstructionObjective()).players[AUTOENCODER].train()
    stepper = adamw(player, PlayerConfig(lr=1e-4))
    video_BTHWC = torch.randint(0, 256, (TRAINED, *CLIP), dtype=torch.uint8)
    batch: dict[str, Tensor] = {"video_BTHWC": video_BTHWC, "seed_B": torch.arange(TRAINED)}

    def step() -> None:
        stepper.zero_grad()
        loss, _ = player(batch, 1)
        loss.backward()
        nn.utils.clip_grad_norm_(player.parameters(), 1.0)
        stepper.step()

    return step


def optimizer(module: nn.Module, fused: bool) -> Callable[[], object]:
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=fused).step


if __name__ == "__main__":
    main()
