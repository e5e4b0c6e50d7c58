"""How well a Divot-LLM understands clips: exact match of what it says, choice among given answers, perplexity of the true ones.

A choice is the option that the model finds least surprising as the answer, by its mean cross-entropy per id, so that long options are not
at a disadvantage. The perplexity of answers is exp of their cross-entropy per id, all ids of all answers alike, whether the model would
have said them or not. `MATCHING`, `CHOICE` and `PERPLEXITY` say so in words, `sequences.template` and `generation.Decoding` say what was
asked and how text was drawn: `stages/understand.py` writes all five beside its figures, and the report prints them. Not covered: answers
judged by another language model.

Legend: O options, M labels of an option, C clips, N tokens of a clip, D token width.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.model import DivotLM
from kinetok.llm.divot.sequences import answer, describe
from kinetok.llm.divot.vocabulary import Media
from kinetok.tokenizers.base import Batch

MATCHING = "what is said equals the answer but for case, punctuation, the articles a, an and the, and spaces"
"""What `same_answer` does."""
CHOICE = "the option of least mean cross-entropy per id as the answer, the end of the text included"
"""What `Costs.choice` is."""
PERPLEXITY = "exp of the cross-entropy per id of the true answers, the ends of the texts included, in the model's own vocabulary"
"""What `Costs` of many answers add up to."""
ARTICLES = re.compile(r"\b(a|an|the)\b")


def same_answer(said: str, expected: str) -> bool:
    """Exact match but for case, punctuation, articles and spaces (SQuAD's rule, arXiv 1606.05250)."""
    return _bare(said) == _bare(expected)


def _bare(text: str) -> list[str]:
    letters = text.lower().translate(str.maketrans("", "", string.punctuation))
    return ARTICLES.sub(" ", letters).split()


@dataclass(frozen=True)
class Costs:
    """What options cost a model as answers to one question, ends included."""

    nats_O: Tensor
    """Cross-entropy, summed over an option's ids."""
    ids_O: Tensor
    """Ids of each."""

    @property
    def per_id(self) -> Tensor:
        """Nats, (O,)."""
        return self.nats_O / self.ids_O

    @property
    def choice(self) -> int:
        """The place of the option that the model chooses."""
        return int(self.per_id.argmin())


@torch.no_grad()
def cost(
    model: DivotLM,
    clips_CND: Tensor,
    question: str,
    options: Sequence[str],
    *,
    limit: int,
    media: Media = "video",
    instructed: bool = True,
) -> Costs:
    """Of each option as the answer to a question about the clips, or of a model that was not instruction-tuned as their caption."""
    if instructed:
        samples = [answer(model.vocabulary, clips_CND, [(question, option)], limit=limit, media=media) for option in options]
    else:
        samples = [describe(model.vocabulary, clips_CND, option, limit=limit, media=media) for option in options]
    device = next(model.parameters()).device
    batch: Batch = {name: tensor.to(device) for name, tensor in collate(samples, [0] * len(samples)).items()}
    losses = model(batch)
    return Costs(losses.text_BM.sum(1), losses.labelled_BM.sum(1))


def choose(model: DivotLM, clips_CND: Tensor, question: str, options: Sequence[str], *, limit: int, media: Media = "video") -> int:
    """The place of the option that the model chooses."""
    return cost(model, clips_CND, question, options, limit=limit, media=media).choice
