"""How well a Divot-LLM understands clips: exact match of what it says, and choice among given answers.

A choice is the option that the model finds least surprising as the answer, by its mean cross-entropy per id, so that long options are not
at a disadvantage. Perplexity is a figure of training already (`DivotLMTrainable.evaluate`). What is asked, and how text was drawn,
belongs beside every figure: `sequences.ask` and `generation.Decoding` say it. Not covered: answers judged by another language model.

Legend: O options, M labels of an option, C clips, N tokens of a clip, D token width.
"""

import re
import string
from collections.abc import Sequence

import torch
from torch import Tensor

from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.model import DivotLM
from kinetok.llm.divot.sequences import answer
from kinetok.llm.divot.vocabulary import Media
from kinetok.tokenizers.base import Batch

ARTICLES = re.compile(r"\b(a|an|the)\b")


def same_answer(said: str, expected: str) -> bool:
    """Exact match but for case, punctuation, articles and spaces (SQuAD's rule, arXiv 1606.05250)."""
    return _bare(said) == _bare(expected)


def _bare(text: str) -> list[str]:
    letters = text.lower().translate(str.maketrans("", "", string.punctuation))
    return ARTICLES.sub(" ", letters).split()


@torch.no_grad()
def surprise(model: DivotLM, clips_CND: Tensor, question: str, options: Sequence[str], *, limit: int, media: Media = "video") -> Tensor:
    """Mean cross-entropy per id of each option as the answer to a question about the clips, end included, in nats: (O,)."""
    samples = [answer(model.vocabulary, clips_CND, [(question, option)], limit=limit, media=media) for option in options]
    device = next(model.parameters()).device
    batch: Batch = {name: tensor.to(device) for name, tensor in collate(samples, [0] * len(samples)).items()}
    losses = model(batch)
    nats_O: Tensor = losses.text_BM.sum(1) / losses.labelled_BM.sum(1)
    return nats_O


def choose(model: DivotLM, clips_CND: Tensor, question: str, options: Sequence[str], *, limit: int, media: Media = "video") -> int:
    """The place of the option that the model chooses."""
    return int(surprise(model, clips_CND, question, options, limit=limit, media=media).argmin())
