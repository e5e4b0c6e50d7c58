"""Divot-LLM in numbers: at full size (arXiv 2412.04432; its released configuration), and at middle size, which is a choice of ours.

The language models here are without their files: for cost, memory and tests. Training starts from `PretrainedLanguage` instead, and
`PUBLISHED` says which repositories of the Hugging Face hub hold them.
"""

from collections.abc import Mapping
from typing import Final

from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLMConfig

MISTRAL_7B: Final = UntrainedLanguage(width=4096, hidden=14336, depth=32, heads=32, key_heads=8, vocabulary=32262, window=4096)
"""Mistral 7B (arXiv 2310.06825) with 262 visual tokens."""
DIVOT_7B: Final = DivotLMConfig(language=MISTRAL_7B)

TINYLLAMA_1B: Final = UntrainedLanguage(width=2048, hidden=5632, depth=22, heads=32, key_heads=4, vocabulary=32262, positions=2048)
"""TinyLlama 1.1B (arXiv 2401.02385) with 262 visual tokens."""
DIVOT_1B: Final = DivotLMConfig(language=TINYLLAMA_1B)

PUBLISHED: Final[Mapping[str, UntrainedLanguage]] = {
    "mistralai/Mistral-7B-Instruct-v0.1": MISTRAL_7B,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": TINYLLAMA_1B,
}
"""The numbers of what a repository of the hub holds."""
