"""`DivotLM`: a language model that reads and writes continuous video tokens (arXiv 2412.04432, section 3.2).

Tokens of shown clips pass an MLP and stand in the sequence in place of embeddings. A clip is made by queries: learned embeddings at
its places, of which all see each other; what the last layer says there passes a second MLP to a head (`heads.py`) that predicts or
draws the tokens, all in one pass. The two other mechanisms of the paper's ablations: `causal` queries see the earlier ones only,
and `autoregressive` has no queries: each token is predicted at the position before its own, and then read. Position-dependent
tokens instead of resampled ones are a matter of numbers: `clip_tokens` and `token_width` are then those of the tokenizer's trunk.

The mask goes to the stock model of transformers. Where a batch makes no clip, or sees nothing (then nothing is passed through the other
MLP), the unused part still takes part with weight zero: under ZeRO every rank must compute the same gradients in the same order.

Not covered: the sequences (`sequences.py`), training (`training.py`), generation (`generation.py`), other people's weights (`official.py`).

Legend: B samples, L positions, N tokens of all a sample's clips, D token width, W width of the language model, P numbers a head reads of
a token, M labels, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.llm.card import language_card
from kinetok.llm.divot.heads import GMMConfig, HeadConfig, build_head
from kinetok.llm.divot.language import LanguageConfig, PretrainedLanguage, build_language, embedding, merged, output_layer, window_of
from kinetok.llm.divot.mask import QUERY, READ, visible
from kinetok.llm.divot.sequences import IGNORED
from kinetok.llm.divot.vocabulary import MOST_TOKENS, Vocabulary
from kinetok.tokenizers.base import CONFIG_FILE, WEIGHTS_FILE, Batch, Config, Count
from kinetok.tokenizers.card import CARD_FILE

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

LANGUAGE = "llm"
"""Folder of a saved model that holds the language model and its vocabulary, as transformers saves them."""


class DivotLMConfig(Config):
    """Numbers of a Divot-LLM; defaults are the reference's."""

    kind: Literal["divot_lm"] = "divot_lm"
    language: LanguageConfig
    clip_tokens: Annotated[Count, Field(le=MOST_TOKENS)] = 64
    """Tokens of one clip."""
    token_width: Count = 256
    head: HeadConfig = GMMConfig()
    mechanism: Literal["bidirectional", "causal", "autoregressive"] = "bidirectional"


@dataclass(frozen=True)
class Losses:
    """Losses of a batch before any mean; what a mask does not name is zero."""

    text_BM: Tensor
    """Cross-entropy of each label, in nats."""
    labelled_BM: Tensor
    head_BN: Tensor
    """Of each written token, divided by its width; (B, 1) where the batch writes none."""
    written_BN: Tensor

    def text(self) -> Tensor:
        """Mean over all labels of the batch."""
        return self.text_BM.sum() / self.labelled_BM.sum().clamp(min=1)

    def head(self) -> Tensor:
        """Mean over all written tokens of the batch; zero where it has none."""
        return self.head_BN.sum() / self.written_BN.sum().clamp(min=1)


class Projection(nn.Sequential):
    """Linear, GELU, Linear, at the width of the output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


class DivotLM(nn.Module):
    """See the module."""

    def __init__(self, config: DivotLMConfig, language: "PreTrainedModel", vocabulary: Vocabulary) -> None:
        """ValueError where one mask cannot serve all layers of the language model (`window_of`)."""
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.llm = language
        self.window = window_of(language)
        width: int = language.config.get_text_config().hidden_size
        self.head = build_head(config.head, config.token_width)
        self.from_tokens = Projection(config.token_width, width)
        self.to_head = Projection(width, self.head.inputs)

    @classmethod
    def build(cls, config: DivotLMConfig) -> Self:
        """A model with a fresh head and fresh projections."""
        return cls(config, *build_language(config.language))

    def forward(self, batch: Batch) -> Losses:
        """Losses of a batch of `collate`; ValueError where its clips have another number of tokens than the model's."""
        self._check(batch)
        hidden_BLW = self.hidden(self.embed(batch), self._mask(batch))
        label_BM = batch["label_BM"]
        logits_BMV = self.logits(pick(hidden_BLW, batch["label_at_BM"])).float()
        text_BM = F.cross_entropy(logits_BMV.transpose(1, 2), label_BM, ignore_index=IGNORED, reduction="none")
        return Losses(text_BM, label_BM != IGNORED, *self._head_losses(hidden_BLW, batch))

    def embed(self, batch: Batch) -> Tensor:
        """What enters the language model, (B, L, W): embeddings, with projected tokens at the places of clips that are seen."""
        embeds_BLW: Tensor = embedding(self.llm)(batch["ids_BL"])
        names = {READ: "read_BND", QUERY: "written_BND"} if self.autoregressive else {READ: "read_BND"}
        seen = {code: batch[name] for code, name in names.items() if name in batch}
        if not seen:
            return embeds_BLW + 0 * self.project(embeds_BLW.new_zeros(1, 1, self.config.token_width)).sum()
        # One call whatever there is: under ZeRO-3 every call gathers weights from all ranks.
        projected_BNW = self.project(torch.cat(list(seen.values()), dim=1))
        parts = torch.split(projected_BNW, [token_BND.shape[1] for token_BND in seen.values()], dim=1)
        for code, part_BNW in zip(seen, parts, strict=True):
            embeds_BLW = place(embeds_BLW, batch["codes_BL"] == code, part_BNW)
        return embeds_BLW

    def project(self, token_BND: Tensor) -> Tensor:
        """Tokens as the language model reads them, (B, N, W)."""
        projected_BNW: Tensor = self.from_tokens(token_BND.to(embedding(self.llm).weight.dtype))
        return projected_BNW

    def hidden(
        self, embeds_BLW: Tensor, mask_BRL: Tensor | None, *, positions_BL: Tensor | None = None, cache: "Cache | None" = None
    ) -> Tensor:
        """The language model's last states after its final norm, (B, L, W). No mask means causal, no positions 0, 1, ..."""
        output = self.llm.base_model(
            inputs_embeds=embeds_BLW,
            attention_mask=mask_BRL,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden_BLW: Tensor = output.last_hidden_state
        return hidden_BLW

    def logits(self, hidden_BLW: Tensor) -> Tensor:
        """Of the id after each position, (..., V)."""
        logits_BLV: Tensor = output_layer(self.llm)(hidden_BLW)
        return logits_BLV

    def mask(self, codes_BL: Tensor, last: int | None = None) -> Tensor:
        """Which position sees which, as `mask.visible` says for this mechanism."""
        block = self.config.clip_tokens if self.config.mechanism == "bidirectional" else 1
        return visible(codes_BL, block=block, window=self.window, last=last)

    @property
    def autoregressive(self) -> bool:
        return self.config.mechanism == "autoregressive"

    def _check(self, batch: Batch) -> None:
        tokens = self.config.clip_tokens
        for name in batch.keys() & {"read_BND", "written_BND"}:
            count = batch[name].shape[1]
            if count % tokens:
                raise ValueError(
                    f"{name}: {count} tokens are no whole clips of {tokens}: set clip_tokens to what the tokenizer makes of a clip"
                )

    def _mask(self, batch: Batch) -> Tensor | None:
        """None where attention is causal: batches are padded on the right, so nothing else needs hiding, and SDPA is at its fastest.

        (The price is small: without a mask transformers looks at one number a pass, for packed sequences.)
        """
        return self.mask(batch["codes_BL"]) if self.config.mechanism == "bidirectional" and "written_BND" in batch else None

    def _head_losses(self, hidden_BLW: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses of the written tokens, and where there are any."""
        seeds = batch["seed_B"].tolist()
        if "written_BND" not in batch:
            token_B1D = hidden_BLW.new_zeros(len(seeds), 1, self.config.token_width)
            unused_B1 = 0 * self.head.loss(self.to_head(hidden_BLW[:, :1]), token_B1D, seeds)
            return unused_B1, torch.zeros_like(unused_B1, dtype=torch.bool)
        token_BND, length = batch["written_BND"], hidden_BLW.shape[1]
        at_BN = nth(batch["codes_BL"] == QUERY, token_BND.shape[1])
        condition_BNP = self.to_head(pick(hidden_BLW, at_BN.clamp(max=length - 1) - int(self.autoregressive)))
        written_BN = at_BN < length
        return torch.where(written_BN, self.head.loss(condition_BNP, token_BND, seeds), 0.0), written_BN

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` (projections and head), the card, and `llm/`, into which adapters are merged."""
        target = Path(folder)
        self.llm.save_pretrained(target / LANGUAGE, state_dict=merged(self.llm))
        self.vocabulary.save_pretrained(target / LANGUAGE)
        (target / CONFIG_FILE).write_text(json.dumps(self.config.model_dump(mode="json"), indent=1, sort_keys=True))
        own = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items() if not name.startswith(f"{LANGUAGE}.")
        }
        save_file(own, target / WEIGHTS_FILE)
        (target / CARD_FILE).write_text(language_card(self))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model saved in `folder`, in eval mode and without adapters; raises on missing or unexpected weights."""
        source = Path(folder)
        config = DivotLMConfig.model_validate_json((source / CONFIG_FILE).read_text())
        model = cls(config, *build_language(PretrainedLanguage(path=str(source / LANGUAGE))))
        own = load_file(source / WEIGHTS_FILE)
        expected = {name for name in model.state_dict() if not name.startswith(f"{LANGUAGE}.")}
        if set(own) != expected:
            raise ValueError(
                f"{source / WEIGHTS_FILE} differs from its config.json in {', '.join(sorted(set(own) ^ expected))}: they are of "
                "two models; take the whole folder again from where it was saved"
            )
        model.load_state_dict(own, strict=False)
        return model.eval()


def nth(mask_BL: Tensor, count: int) -> Tensor:
    """Positions of a row's first, second ... true element, (B, count); L where it has fewer."""
    number_BN = torch.arange(1, count + 1, device=mask_BL.device).expand(len(mask_BL), count).contiguous()
    return torch.searchsorted(mask_BL.cumsum(1), number_BN)


def pick(x_BLW: Tensor, at_BN: Tensor) -> Tensor:
    """Rows of `x_BLW` at these positions, (B, N, W)."""
    return x_BLW.gather(1, at_BN[..., None].expand(-1, -1, x_BLW.shape[-1]))


def place(x_BLW: Tensor, mask_BL: Tensor, value_BNW: Tensor) -> Tensor:
    """`x_BLW` with a row's values, in order, where its mask is true."""
    rank_BL = (mask_BL.cumsum(1) - 1).clamp(0, value_BNW.shape[1] - 1)
    return torch.where(mask_BL[..., None], pick(value_BNW, rank_BL).to(x_BLW.dtype), x_BLW)
