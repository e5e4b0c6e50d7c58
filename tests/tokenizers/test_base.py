"""Token contracts, weight digests, and libraries that several stages meet at once."""

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kinetok.llm.text import TextConfig, TextEncoder
from kinetok.tokenizers.base import DecodeRecipe, TokenSpec, weights_digest
from kinetok.tokenizers.divot.presets import SMALL
from kinetok.tokenizers.divot.vit import FrozenViT

SPEC = TokenSpec(tokenizer="causal", weights="ab", layout="grid", channels=16, temporal=4, spatial=8)


def test_specs_name_their_first_difference() -> None:
    assert SPEC.difference(SPEC) is None
    assert SPEC.difference(SPEC.model_copy(update={"temporal": 8})) == "temporal: 4, 8"
    recipe = DecodeRecipe(fps=8, frames=17, height=64, width=64)
    assert "recipe: None" in str(SPEC.difference(SPEC.model_copy(update={"recipe": recipe})))


def test_specs_survive_json() -> None:
    assert TokenSpec.model_validate_json(SPEC.model_dump_json()) == SPEC


def test_digest_covers_values_names_shapes_and_types() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    digests = {weights_digest(model), weights_digest(nn.Sequential(model))}
    digests.add(weights_digest(nn.Linear(2, 3)))
    digests.add(weights_digest(model.bfloat16()))
    assert len(digests) == 4


def test_digest_ignores_the_order_of_insertion() -> None:
    forward, backward = nn.Module(), nn.Module()
    for name in ("a", "b"):
        forward.register_parameter(name, nn.Parameter(torch.ones(1)))
    for name in ("b", "a"):
        backward.register_parameter(name, nn.Parameter(torch.ones(1)))
    assert weights_digest(forward) == weights_digest(backward)


def test_threads_that_meet_transformers_at_once_all_find_it() -> None:
    """In a process of its own, which has not imported it yet; half of these threads failed while each imported it by name alone."""
    script = """
        from concurrent.futures import ThreadPoolExecutor
        from threading import Barrier
        from kinetok.llm.divot.vocabulary import Vocabulary
        from kinetok.tokenizers.divot.vit import FrozenViT, VitConfig

        gate = Barrier(6)

        def load(number):
            gate.wait()
            return FrozenViT.load(VitConfig(edge=16, patch=8, width=8, depth=1, heads=1)) if number % 2 else Vocabulary.of_bytes()

        with ThreadPoolExecutor(6) as pool:
            print(len(list(pool.map(load, range(6)))))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True, text=True)
    assert done.stdout == "6\n", done.stderr


@pytest.mark.parametrize(
    "build", [lambda: TextEncoder(TextConfig()).digest(), lambda: FrozenViT.load(SMALL.vit).digest()], ids=["text", "vit"]
)
def test_untrained_models_are_the_same_whatever_other_threads_draw(build: Callable[[], str]) -> None:
    alone, done = build(), threading.Event()

    def draw() -> None:
        while not done.is_set():
            torch.rand(1000)

    other = threading.Thread(target=draw)
    other.start()
    try:
        assert build() == alone
    finally:
        done.set()
        other.join()
