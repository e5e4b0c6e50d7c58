"""What one CUDA device makes of the models at full size: correctness, bf16, torch.compile, speed and memory.

    python bench/gpu.py

needs torch and this package's `tokenizers` and `llm`, no Ray, no data and no network. All weights are random, and zeros that a start has
are shaken, so that every layer takes part. fp32 on the device is held against fp32 on the CPU, with TF32 off; bf16 weights against fp32.
Speeds are medians of interleaved rounds, memory is the allocator's peak. Not covered: several devices, DeepSpeed, anything before the
models; and what random weights do not tell, such as the quality of bf16 on trained ones.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from line import Line
from tokenizer import medians
from torch import Tensor, nn

from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.llm.divot.sequences import depict, describe
from kinetok.llm.divot.training import PLAYER, DivotLMObjective, DivotLMTrainable
from kinetok.tokenizers.base import Tokens
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.presets import FULL_4X, FULL_GROWN
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.divot.detokenizer import Detokenizer
from kinetok.tokenizers.divot.presets import MIDDLE
from kinetok.tokenizers.divot.tokenizer import DivotConfig
from kinetok.tokenizers.metrics import clip_psnr

Module = TypeVar("Module", bound=nn.Module)
FRAMES = 17
FPS = 24
"""Frames of a second of video: an aim is to keep up with it."""
CAPTION = "x" * 64
SHAKE = 0.01
LANGUAGE_1B = DivotLMConfig(language=UntrainedLanguage(width=2048, hidden=5632, depth=22, heads=32, key_heads=4))
"""Divot-LLM on a language model of a billion weights, whose optimizer one device holds."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; a test has smaller ones."""

    base: CausalConfig = FULL_4X
    grown: GrownConfig = FULL_GROWN
    compared: int = 64
    """Pixels along an edge where the CPU computes the same."""
    edges: tuple[int, ...] = (256, 512)
    divot: DivotConfig = MIDDLE
    latent: int = 16
    """Latent rows and columns of Divot's frames, one for every 8 pixels."""
    language: DivotLMConfig = LANGUAGE_1B
    samples: int = 8
    """Sequences of one step of the language model."""
    backend: str = "inductor"
    """Of torch.compile."""


def lines(device: torch.device, sizes: Sizes) -> Iterator[Line]:
    """Each line once it is measured."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    base = CausalTokenizer(sizes.base)
    grown = GrownTokenizer(sizes.grown, base)
    for name, rung in {"4x": base, "8x": grown, "16x": GrownTokenizer(sizes.grown, grown)}.items():
        yield from ladder(name, shaken(rung), device, sizes)
    del base, grown, rung
    yield from detokenizer(device, sizes)
    yield from language(device, sizes)


@torch.no_grad()
def ladder(name: str, rung: Rung, device: torch.device, sizes: Sizes) -> Iterator[Line]:
    """A rung: right, in bf16, compiled, and at each edge how fast and how large."""
    small_BCTHW = torch.rand(1, 3, FRAMES, sizes.compared, sizes.compared) * 2 - 1
    on_cpu = [rung.encode(small_BCTHW).values, rung.decode(rung.encode(small_BCTHW))]
    exact = copy.deepcopy(rung).to(device)
    latent = exact.encode(small_BCTHW.to(device)).values
    video_BCTHW = exact.decode(Tokens(on_cpu[0].to(device), FRAMES))
    for what, mine, reference in (("latents", latent, on_cpu[0]), ("video", video_BCTHW, on_cpu[1])):
        yield Line(f"{name} {what}, fp32: difference from the CPU over the root mean square", apart(mine, reference), "", None, "< 0.001")
    half = copy.deepcopy(exact).to(torch.bfloat16)
    again_BCTHW = half.decode(half.encode(small_BCTHW.to(device, torch.bfloat16))).float()
    exact_BCTHW = exact.decode(exact.encode(small_BCTHW.to(device)))
    yield Line(f"{name} video, bf16 against fp32", float(clip_psnr(again_BCTHW, exact_BCTHW).mean()), "dB", None, ">= 30")
    del exact
    for edge in sizes.edges:
        yield from rung_speed(f"{name}, {edge}x{edge}, bf16", half, torch.rand(1, 3, FRAMES, edge, edge, device=device) * 2 - 1, sizes)


def rung_speed(name: str, half: Rung, video_BCTHW: Tensor, sizes: Sizes) -> Iterator[Line]:
    """Encoding and decoding: peak memory, and the rate eager and compiled."""
    video_BCTHW = video_BCTHW.to(torch.bfloat16)
    tokens = half.encode(video_BCTHW)
    calls: dict[str, Callable[[], object]] = {"encode": lambda: half.encode(video_BCTHW), "decode": lambda: half.decode(tokens)}
    for what, call in calls.items():
        yield memory_line(f"{name}, {what}", call, video_BCTHW.device)
        yield from speed_lines(f"{name}, {what}", call, video_BCTHW.device, sizes, FRAMES, "frames/s", aim=FPS)


@torch.no_grad()
def detokenizer(device: torch.device, sizes: Sizes) -> Iterator[Line]:
    """Divot's U-Net and its sampling with guidance, of one clip."""
    config, seconds = sizes.divot, sizes.divot.frames / FPS
    net = shaken(Detokenizer(config.detokenizer, config.encoder.token_width)).eval()
    size = (config.frames, sizes.latent, sizes.latent)
    x_BZThw, t_B = torch.randn(1, config.detokenizer.unet.z, *size), torch.tensor([500])
    token_BND = torch.randn(1, config.encoder.tokens, config.encoder.token_width)
    on_cpu = net(x_BZThw, t_B, token_BND)
    net, x_BZThw, t_B, token_BND = net.to(device), x_BZThw.to(device), t_B.to(device), token_BND.to(device)
    exact = net(x_BZThw, t_B, token_BND)
    yield Line("U-Net, fp32: difference from the CPU over the root mean square", apart(exact, on_cpu), "", None, "< 0.001")
    net = net.to(torch.bfloat16)
    rough = net(x_BZThw.bfloat16(), t_B, token_BND.bfloat16())
    yield Line("U-Net, bf16: the same against fp32", apart(rough, exact), "", None, "< 0.1")

    def one_pass() -> Tensor:
        return net(x_BZThw.bfloat16(), t_B, token_BND.bfloat16())

    def sampled() -> Tensor:
        return net.sample(token_BND, torch.zeros_like(token_BND[0]), size, config.sampler, [0])

    yield from speed_lines("U-Net, bf16, one pass", one_pass, device, sizes, 1, "clips/s", aim=config.sampler.steps / seconds)
    yield memory_line(f"DDIM, bf16, {config.sampler.steps} steps", sampled, device)
    took = medians({"": settled(sampled, device)})[""]
    yield Line(f"DDIM, bf16, {config.sampler.steps} steps", 1 / took, "clips/s", None, f">= {1 / seconds:.2f}")


def language(device: torch.device, sizes: Sizes) -> Iterator[Line]:
    """A training step of Divot-LLM in bf16: loss, backward pass, AdamW. Half the sequences read a clip, half write one."""
    config = sizes.language
    model = DivotLM.build(config)
    clip_CND = torch.randn(1, config.clip_tokens, config.token_width)
    reads, writes = (describe(model.vocabulary, clip_CND, CAPTION, limit=512), depict(model.vocabulary, CAPTION, clip_CND, limit=512))
    samples = [writes if number % 2 else reads for number in range(sizes.samples)]
    batch = {name: values.to(device) for name, values in collate(samples, list(range(sizes.samples))).items()}
    player = DivotLMTrainable(model, DivotLMObjective()).players[PLAYER].to(device)
    optimizer = torch.optim.AdamW(player.parameters(), lr=1e-5)

    def losses() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss: Tensor = player(batch, 1)[0]
        return loss

    def step() -> None:
        optimizer.zero_grad()
        losses().backward()
        optimizer.step()

    with torch.no_grad():
        rough, exact = losses(), player(batch, 1)[0]
    yield Line("Divot-LLM, loss in bf16 against fp32", float((rough - exact).abs() / exact.abs()), "", None, "< 0.05")
    yield memory_line("Divot-LLM, bf16 training step", step, device)
    tokens = float(sum(map(len, samples)))
    took = medians({"": settled(step, device)})[""]
    yield Line("Divot-LLM, bf16 training step", tokens / took, "tokens/s", None, ">= 10000")
    compiled = torch.compile(player, backend=sizes.backend)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        rates = medians({"eager": settled(lambda: player(batch, 1), device), "compiled": settled(lambda: compiled(batch, 1), device)})
    yield Line("Divot-LLM, bf16 loss, compiled (floor: eager)", tokens / rates["compiled"], "tokens/s", tokens / rates["eager"], ">= 1.0")


def speed_lines(
    name: str, call: Callable[[], object], device: torch.device, sizes: Sizes, count: int, unit: str, *, aim: float
) -> Iterator[Line]:
    """The rate of a call, and that of the same compiled, against the first."""
    compiled = torch.compile(call, backend=sizes.backend)
    took = medians({"eager": settled(call, device), "compiled": settled(compiled, device)})
    yield Line(name, count / took["eager"], unit, None, f">= {aim:.1f}")
    yield Line(f"{name}, compiled (floor: eager)", count / took["compiled"], unit, count / took["eager"], ">= 1.0")


def memory_line(name: str, call: Callable[[], object], device: torch.device) -> Line:
    """Peak memory of one call, weights included: of the device, on a CPU of the process since its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    settled(call, device)()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        peak = int(found[1]) * 1024
    return Line(f"{name}, peak memory", peak / 1e9, "GB", None, "< 80")


def settled(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A call that returns when the device has done the work."""

    def work() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return work


def shaken(model: Module) -> Module:
    """Every weight moved a little: a start has zeros, behind which nothing would be compared."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(SHAKE * torch.randn_like(weight))
    return model


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference over the root mean square of `other`."""
    mine, reference = one.detach().double().cpu(), other.detach().double().cpu()
    return float((mine - reference).abs().max() / reference.square().mean().sqrt())


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    for line in lines(device, Sizes()):
        held = "" if line.floor is None else f", floor {line.floor:.4g}, ratio {line.ratio:.2f}"
        print(f"{line.name}: {line.value:.4g} {line.unit}{held}, aim {line.aim}, {'met' if line.met else 'MISSED'}", flush=True)


if __name__ == "__main__":
    main()
