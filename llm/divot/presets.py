"""The full-size Divot-LLM (arXiv 2412.04432; its released configuration) in numbers.

`MISTRAL_7B` is Mistral-7B-Instruct-v0.1 without its files: for cost, memory and tests. Training starts from `PretrainedLanguage` instead.
"""

from typing import Final

from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLMConfig

MISTRAL_7B: Final = UntrainedLanguage(width=4096, hidden=14336, depth=32, heads=32, key_heads=8, vocabulary=32262, window=4096)
"""arXiv 2310.06825 with 262 visual tokens."""
DIVOT_7B: Final = DivotLMConfig(language=MISTRAL_7B)
