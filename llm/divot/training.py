"""How Divot-LLM is trained, and the trainable that `kinetok.infra.training.fit` drives (by structure: nothing of infra is imported).

    L = text * cross-entropy of the labels + head * loss of the written tokens

each a mean over what a batch has of it. One objective serves pre-training, both kinds of instruction tuning and storytelling: they
differ in their sequences, in what is frozen, and in the model that they start from. Batches come from `collate`: tokens and text,
never pixels; `task_B` says which task a sample is of. LoRA's dropout is the one thing that is not drawn by a sample's own seed.

Legend: B samples, M labels of a sample, N written tokens of a sample.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kinetok.llm.card import language_card
from kinetok.llm.divot.language import LoRAConfig, tune
from kinetok.llm.divot.mask import PADDING
from kinetok.llm.divot.model import DivotLM
from kinetok.tokenizers.base import Batch, Config, tensors_digest, weights_digest
from kinetok.tokenizers.card import CARD_FILE

PLAYER = "divot_lm"
BASE = "base"
"""Name of what adapters leave frozen."""
TASK = "task_B"
RAW = ("lm_nats", "lm_labels", "head_sum", "writing")
"""Last parts of the names of figures that `conclude` makes others of, and that say little by themselves."""

Weight = Annotated[float, Field(ge=0)]


class DivotLMObjective(Config):
    """What is learned, and by which weights of the model."""

    players: ClassVar[tuple[str, ...]] = (PLAYER,)
    """Names of what gets an optimizer."""
    text: Weight = 1.0
    """Of the cross-entropy."""
    head: Weight = 1.0
    """Of the written tokens' loss."""
    lora: LoRAConfig | None = None
    """Adapters beside the frozen language model; None trains all of it."""
    frozen: Literal["from_tokens", "to_head"] | None = None
    """A projection that keeps its weights: the reference freezes `to_head` when it tunes comprehension, `from_tokens` when generation."""


class Player(nn.Module):
    """What the optimizer sees: the model, and the loss as `forward`."""

    def __init__(self, model: DivotLM, objective: DivotLMObjective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, its parts, and `tokens`, positions of a sample; `head_loss` is 0 in batches that write nothing, `writing`
        the part of the samples that do."""
        losses = self.model(batch)
        text, head = losses.text(), losses.head()
        figures = {
            "lm_loss": text,
            "head_loss": head,
            "writing": losses.written_BN.any(1).float().mean(),
            "tokens": (batch["codes_BL"] != PADDING).sum(1).float().mean(),
        }
        return self.objective.text * text + self.objective.head * head, {name: value.detach() for name, value in figures.items()}


class FrozenPart(nn.Module):
    """Stands for the weights that a model's own training leaves alone, so that they are watched like any frozen module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # A tuple, or the model would be a sub-module: the weights belong to the player.
        self.source = (model,)

    def digest(self) -> str:
        """Digest of the parameters without gradient."""
        return tensors_digest({name: weight for name, weight in self.source[0].named_parameters() if not weight.requires_grad})


class DivotLMTrainable:
    """A Divot-LLM as the training loop takes it."""

    def __init__(
        self,
        model: DivotLM,
        objective: DivotLMObjective,
        *,
        tasks: tuple[str, ...] = (),
        checkpointing: bool = False,
        watched: bool = True,
    ) -> None:
        """`tasks` are the names of what batches call tasks 0, 1, ...: validation figures are told of each. `checkpointing` computes each
        layer twice instead of keeping what is inside it: less memory, the same numbers. Under ZeRO-3, whose ranks hold pieces of a weight,
        what is frozen cannot be `watched`.
        """
        self.model, self.objective, self.tasks = model, objective, tasks
        self.marks = torch.tensor([*model.vocabulary.visual, model.vocabulary.eos])
        tune(model.llm, objective.lora)
        if objective.frozen is not None:
            model.get_submodule(objective.frozen).requires_grad_(False)
        if checkpointing:
            model.llm.activation_checkpointing_enable({"use_reentrant": False})
        self.players: Mapping[str, nn.Module] = {PLAYER: Player(model, objective)}
        frozen = any(not weight.requires_grad for weight in model.parameters())
        self.frozen: Mapping[str, nn.Module] = {BASE: FrozenPart(model)} if frozen and watched else {}

    def active(self, player: str, step: int) -> bool:
        """The one player always takes part."""
        return True

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Per-sample figures, each (B,): `lm_loss`, the mean over a sample's labels, and those of `RAW`, of all samples and, under its
        name, of every task; the others' samples count as 0 there.

        `lm_nats` and `lm_labels` are of samples that learn words. One that makes a clip and learns tags and its end alone has no
        part in a perplexity: those are said after every clip.
        """
        losses, label_BM = self.model(batch), batch["label_BM"]
        nats_B, labels_B, written_B = losses.text_BM.sum(1), losses.labelled_BM.sum(1), losses.written_BN.sum(1)
        words_B = (losses.labelled_BM & ~torch.isin(label_BM, self.marks.to(label_BM.device))).any(1)
        raw = {
            "lm_nats": torch.where(words_B, nats_B, 0.0),
            "lm_labels": torch.where(words_B, labels_B, 0).float(),
            "head_sum": losses.head_BN.sum(1) / written_B.clamp(min=1),
            "writing": (written_B > 0).float(),
        }
        figures = {"lm_loss": nats_B / labels_B.clamp(min=1), **raw}
        for number, task in enumerate(self.tasks):
            own_B = batch[TASK] == number
            figures |= {f"{task}/{name}": torch.where(own_B, values_B, 0.0) for name, values_B in raw.items()}
        return figures

    def conclude(self, means: Mapping[str, float]) -> dict[str, float]:
        """Of all tasks and of each: `perplexity` per label of samples that learn words, all labels alike, infinite where it is past a
        float; `head_loss`, the mean over samples that make a clip. Of what has no such samples there is none."""
        return {name: value for part in ("", *(f"{task}/" for task in self.tasks)) for name, value in _concluded(means, part)}

    def digest(self, module: nn.Module) -> str:
        """Digest of a module's weights, of a `FrozenPart` those that it stands for."""
        return module.digest() if isinstance(module, FrozenPart) else weights_digest(module)

    def export(self, folder: Path) -> None:
        """Save the model, its adapters merged; its card names the objective."""
        self.model.save_pretrained(folder)
        (folder / CARD_FILE).write_text(language_card(self.model, self.objective))


def _concluded(means: Mapping[str, float], part: str) -> Iterator[tuple[str, float]]:
    if means[f"{part}lm_labels"]:
        nats = torch.tensor(means[f"{part}lm_nats"] / means[f"{part}lm_labels"], dtype=torch.float64)
        yield f"{part}perplexity", nats.exp().item()
    if means[f"{part}writing"]:
        yield f"{part}head_loss", means[f"{part}head_sum"] / means[f"{part}writing"]
