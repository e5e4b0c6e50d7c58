"""A small Divot-LLM, and clips and sequences for it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.llm.divot.vocabulary import Vocabulary

TINY = UntrainedLanguage(width=32, hidden=48, depth=2, heads=4, key_heads=2)
TOKENS, WIDTH = 8, 6


def tiny(**changes: Any) -> DivotLM:
    """A model of other numbers where `changes` name them; always the same weights."""
    torch.manual_seed(0)
    numbers: dict[str, Any] = {"language": TINY, "clip_tokens": TOKENS, "token_width": WIDTH}
    return DivotLM.build(DivotLMConfig(**numbers | changes))


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.of_bytes()


@pytest.fixture
def clips() -> Iterator[Callable[[int], Tensor]]:
    """(clips, tokens, width) of noise, others at each call."""
    generator = torch.Generator().manual_seed(1)
    yield lambda count: torch.randn(count, TOKENS, WIDTH, generator=generator)
