"""The program for a CUDA device, run on the CPU at a size of a few thousand numbers; and what a machine without one is told."""

import importlib
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLMConfig
from kinetok.tokenizers.causal.autoencoder import CausalConfig
from kinetok.tokenizers.causal.grown import GrownConfig
from kinetok.tokenizers.divot.ddim import SamplerConfig
from kinetok.tokenizers.divot.presets import SMALL

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    made = importlib.import_module("gpu")
    monkeypatch.setattr(sys.modules["tokenizer"], "ROUNDS", 1)
    yield made
    torch.compiler.reset()


@pytest.mark.slow
def test_every_line_is_measured_and_a_cpu_agrees_with_itself(gpu: ModuleType) -> None:
    language = UntrainedLanguage(width=32, hidden=48, depth=1, heads=4, key_heads=2)
    sizes = gpu.Sizes(
        base=CausalConfig(channels=8, mult=(1, 1, 1), strides=((2, 2), (2, 2)), blocks=1, z=4, groups=4),
        grown=GrownConfig(blocks=1, groups=4),
        compared=16,
        edges=(16,),
        divot=SMALL.model_copy(update={"sampler": SamplerConfig(steps=2, spacing="trailing")}),
        latent=8,
        language=DivotLMConfig(language=language, clip_tokens=4, token_width=6),
        samples=2,
        backend="eager",
    )
    found = {line.name: line for line in gpu.lines(torch.device("cpu"), sizes)}
    assert all(math.isfinite(line.value) for line in found.values())
    for rung in ("4x", "8x", "16x"):
        assert found[f"{rung} video, bf16 against fp32"].met
        assert {f"{rung}, 16x16, bf16, {what}{end}" for what in ("encode", "decode") for end in ("", ", peak memory")} <= found.keys()
    same = [line for name, line in found.items() if "difference from the CPU" in name]
    assert len(same) == 7 and all(line.value == 0 for line in same)
    assert sum("compiled (floor: eager)" in name for name in found) == 6 + 1 + 1
    assert all(line.value > 0 for name, line in found.items() if line not in same)


def test_a_difference_is_told_in_parts_of_the_signal(gpu: ModuleType) -> None:
    assert gpu.apart(torch.tensor([2.0, -2.2]), torch.tensor([2.0, -2.0])) == pytest.approx(0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_a_machine_without_a_device_is_told_so() -> None:
    answer = subprocess.run([sys.executable, BENCH / "gpu.py"], check=True, capture_output=True, text=True)
    assert answer.stdout == "no CUDA device: nothing measured\n"
