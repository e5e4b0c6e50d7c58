"""Divot-LLM's training step against a plain transformers loop, and what its mixture head costs.

- **training step**: a batch of clips that are read, then one of clips that are written, against the loop that any user of transformers
  would write around the same language model: the same ids, lengths and labels, and a causal mask. Ours projects clips, bends the mask and
  has its head on top; theirs makes logits at every position.
- **mixture head**: output projection and likelihood, forward and backward, as part of a step on written clips; at the published sizes
  on paper.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from caches import CAPTION, Step, language_weights, training_step
from line import Line
from tokenizer import medians
from torch import Tensor

from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.heads import GMMConfig
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.mask import PADDING
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.llm.divot.presets import DIVOT_7B, MISTRAL_7B
from kinetok.llm.divot.sequences import IGNORED, Packed, depict, describe
from kinetok.llm.divot.training import PLAYER, DivotLMObjective, DivotLMTrainable
from kinetok.llm.gmm import parameter_count
from kinetok.tokenizers.base import Batch

BATCH: Final = 4
MODEL = DivotLMConfig(language=UntrainedLanguage(width=384, hidden=1024, depth=8, heads=6, key_heads=3), clip_tokens=64, token_width=32)
"""Large enough that the step is the language model's, as it is at full size."""
GENERATION_POSITIONS: Final = 180
"""Of a published generation sample; 64 of them are queries."""


def lines(work: Path) -> list[Line]:
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = DivotLM.build(MODEL)
    step = training_step(DivotLMTrainable(model, DivotLMObjective()).players[PLAYER])
    batches = [
        batch_of(model, lambda clip_CND: describe(model.vocabulary, clip_CND, CAPTION, limit=256)),
        batch_of(model, lambda clip_CND: depict(model.vocabulary, CAPTION, clip_CND, limit=256)),
    ]
    return [against_transformers(step, batches), *head_share(model, step, batches[1])]


def against_transformers(ours: Step, batches: list[Batch]) -> Line:
    """Positions per second, padding not counted."""
    theirs, plain = plain_step(DivotLM.build(MODEL)), [plain_batch(batch) for batch in batches]
    took = medians({"ours": lambda: [ours(batch) for batch in batches], "theirs": lambda: [theirs(batch) for batch in plain]})
    positions = sum(int((batch["codes_BL"] != PADDING).sum()) for batch in batches)
    name = "Divot-LLM training step (floor: plain transformers loop)"
    return Line(name, positions / took["ours"], "tokens/s", positions / took["theirs"], ">= 0.95")


def head_share(model: DivotLM, step: Step, batch: Batch) -> list[Line]:
    """Percent of a step on written clips."""
    assert isinstance(MODEL.language, UntrainedLanguage)
    hidden_BNW = torch.randn(BATCH, MODEL.clip_tokens, MODEL.language.width, requires_grad=True)

    def head_alone() -> None:
        loss_BN = model.head.loss(model.to_head(hidden_BNW), batch["written_BND"], batch["seed_B"].tolist())
        loss_BN.mean().backward()

    took = medians({"step": lambda: step(batch), "head": head_alone})
    size = sum(weight.numel() for weight in model.llm.parameters()) / 1e6
    return [
        Line(f"mixture head's share of a step, language model of {size:.0f} M", 100 * took["head"] / took["step"], "%", None, "< 5"),
        Line("mixture head's share of a step, language model of 7 B, on paper", 100 * published_share(), "%", None, "< 5"),
    ]


def published_share() -> float:
    """Multiplications with weights of the output projection, over all of a generation sample.

    The likelihood itself has some ten operations for each number that the projection makes: a thousandth of the projection.
    """
    assert isinstance(DIVOT_7B.head, GMMConfig)
    parameters = parameter_count(DIVOT_7B.head.components, DIVOT_7B.token_width)
    head = DIVOT_7B.clip_tokens * parameters * (MISTRAL_7B.width + parameters)
    return head / (head + GENERATION_POSITIONS * language_weights(MISTRAL_7B))


def batch_of(model: DivotLM, sample: Callable[[Tensor], Packed]) -> Batch:
    """`BATCH` samples on random tokens."""
    return collate([sample(clip_CND) for clip_CND in torch.randn(BATCH, 1, MODEL.clip_tokens, MODEL.token_width)], range(BATCH))


def plain_step(model: DivotLM) -> Step:
    """The loop anyone would write."""
    language = model.llm
    optimizer = torch.optim.AdamW(language.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        language(**batch).loss.backward()
        optimizer.step()

    return step


def plain_batch(batch: Batch) -> Batch:
    """Ids, mask and labels as transformers wants them."""
    labels_BL, kept = torch.full_like(batch["ids_BL"], IGNORED), batch["label_BM"] != IGNORED
    rows_BM = torch.arange(len(kept))[:, None].expand_as(kept)
    labels_BL[rows_BM[kept], batch["label_at_BM"][kept] + 1] = batch["label_BM"][kept]
    return {"input_ids": batch["ids_BL"], "attention_mask": (batch["codes_BL"] != PADDING).long(), "labels": labels_BL}


if __name__ == "__main__":
    for line in lines(Path()):
        floor = "" if line.floor is None else f", floor {line.floor:.3f}, ratio {line.ratio:.2f}"
        print(f"{line.name}: {line.value:.3f} {line.unit}{floor}, aim {line.aim}")
