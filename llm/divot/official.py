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

from kinetok.llm.divot.heads import GMMConfig
from kinetok.llm.divot.language import LanguageConfig, PretrainedLanguage, embedding, empty_language
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.llm.divot.vocabulary import Vocabulary
from kinetok.llm.gmm import parameter_count
from kinetok.tokenizers.divot.checkpoints import LoadReport, compare, read_state

PARTS = {"from_tokens.": "input_resampler.proj.", "to_head.": "output_resampler.proj."}
LANGUAGE = "llm."
FIRST, LAST = "input_resampler.proj.0.weight", "output_resampler.proj.2.weight"
"""Whose sizes are the width of a token, and the numbers that describe the mixture of one."""


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


def agent_config(agent: Mapping[str, Tensor], language: LanguageConfig, clip_tokens: int) -> DivotLMConfig:
    """The numbers of the model whose two MLPs `agent` holds, under published names and possibly among others.

    Token width and Gaussians follow from the sizes of the MLPs, `clip_tokens` is in no tensor. ValueError where the second MLP ends in what
    no mixture of such tokens has. Where one is no matrix or missing, the published numbers: loading then says which.
    """
    matrices = [agent[name].shape for name in (FIRST, LAST) if name in agent and agent[name].ndim == 2]
    if len(matrices) < 2:
        return DivotLMConfig(language=language, clip_tokens=clip_tokens)
    (_, width), (numbers, _) = matrices
    components, rest = divmod(numbers, parameter_count(1, width))
    if rest or not components:
        raise ValueError(f"{LAST} has {numbers} rows: tokens of {width} numbers need a multiple of {parameter_count(1, width)}")
    return DivotLMConfig(language=language, clip_tokens=clip_tokens, token_width=width, head=GMMConfig(components=components))


def open_official(agent: Path, language: Path, tokenizer: Path, clip_tokens: int = 64) -> Released:
    """The released model: the agent's file, the merged language model's folder, and that of the tokenizer of its text.

    Of other sizes too, which the files say (`agent_config`). ValueError where the tokenizer lacks visual tokens: which row of the model is
    whose is written nowhere else.
    """
    state = read_state(agent)
    config = agent_config(state, PretrainedLanguage(path=str(language)), clip_tokens)
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
    read = load_state(model, state, tuple(PARTS.values()))
    return Released(model.eval(), read, load_state(model, read_folder(language), (LANGUAGE,)))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's `.safetensors` files, or where it has none, of its `.bin` files."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ValueError(f"{folder} holds neither .safetensors nor .bin files: name the folder of the merged language model")
    return {name: tensor for file in files for name, tensor in read_state(file).items()}
