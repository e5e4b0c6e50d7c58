"""Weights of the released Divot-LLM in ours: the agent's two MLPs, and the merged Mistral under its transformers names.

    input_resampler.proj.{0,2}      ->  from_tokens.{0,2}
    output_resampler.proj.{0,2}     ->  to_head.{0,2}
    llm.* , or a merged model's *   ->  llm.*

Files are read without unpickling code, and a tensor that is missing, left over or of another shape is an error that names it.
Not covered: checkpoints whose adapters were not merged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kinetok.llm.divot.language import PretrainedLanguage, embedding, empty_language
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.llm.divot.vocabulary import Vocabulary
from kinetok.tokenizers.divot.checkpoints import LoadReport, compare, read_state

PARTS = {"from_tokens.": "input_resampler.proj.", "to_head.": "output_resampler.proj."}
LANGUAGE = "llm."


def official_names(model: DivotLM) -> dict[str, str]:
    """The published name of each of our tensors."""
    return {name: _published(name) for name in model.state_dict()}


def _published(name: str) -> str:
    for ours, theirs in PARTS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


@dataclass(frozen=True)
class Released:
    """The model in eval mode, and what was read of each of its files."""

    model: DivotLM
    agent: LoadReport
    language: LoadReport


def load_state(model: DivotLM, state: Mapping[str, Tensor], parts: tuple[str, ...] = (LANGUAGE, *PARTS.values())) -> LoadReport:
    """Copy tensors under published names into the model's `parts`; those without a prefix are the language model's.

    ValueError where they misfit.
    """
    known = (LANGUAGE, *PARTS.values())
    state = {name if name.startswith(known) else LANGUAGE + name: tensor for name, tensor in state.items()}
    own = model.state_dict()
    ours = {published: own[name] for name, published in official_names(model).items() if published.startswith(parts)}
    report = compare(ours, state).check()
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(state[name])
    return report


def open_official(agent: Path, language: Path, tokenizer: Path) -> Released:
    """The released model: the agent's file, the merged language model's folder, and that of the tokenizer of its text.

    ValueError where that one lacks visual tokens: which row of the model is whose is written nowhere else.
    """
    config = DivotLMConfig(language=PretrainedLanguage(path=str(language)))
    vocabulary, stock = Vocabulary.from_pretrained(tokenizer), empty_language(language)
    rows = embedding(stock).num_embeddings
    if vocabulary.added or len(vocabulary) > rows:
        wrong = (
            f"lacks {len(vocabulary.added)} of the {len(vocabulary.visual)} visual tokens"
            if vocabulary.added
            else f"has ids up to {len(vocabulary) - 1}, the model {rows} rows"
        )
        raise ValueError(
            f"the vocabulary at {tokenizer} {wrong}, so that its ids are not those the model was trained with: name the tokenizer folder "
            "that was released beside the model (cvlm_mistral_instruct_tokenizer), not that of its base"
        )
    model = DivotLM(config, stock, vocabulary)
    read = load_state(model, read_state(agent), tuple(PARTS.values()))
    return Released(model.eval(), read, load_state(model, read_folder(language), (LANGUAGE,)))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's `.safetensors` files, or where it has none, of its `.bin` files."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ValueError(f"{folder} holds neither .safetensors nor .bin files: name the folder of the merged language model")
    return {name: tensor for file in files for name, tensor in read_state(file).items()}
