"""What a trained Divot-LLM makes: clips for a caption, text about clips, a story of both (arXiv 2412.04432, sections 3.3 and 4).

A prompt is the beginning of a sequence (`sequences.py`: `ask_clip`, `ask_caption`, `ask`, `ask_story`). Clips come in one pass over
their queries, or token by token from an autoregressive model; the decoder of the tokenizer makes them video. Text is drawn id by id, visual
ids left out. All that is drawn comes from the seeds given, one a prompt; a prompt's answer does not depend on its batch beyond rounding.
The official code lets the model say the tag that opens a clip; here it is put, so that a request for a clip always gets one.

What follows a clip that was made of queries sees the queries, which are the same whatever was drawn of them: the rest of a story does not
know the clip, only the texts, as in the published model. `tell(..., reread=True)` shows it the drawn clip, for a model that was trained so
(`sequences.narrate`); one that makes clips token by token reads each anyway.

Not covered: beam search, penalties, the de-tokenizer.

Legend: B prompts, K draws, L positions, N tokens of a clip, D token width, P width of what a head draws from, W width of the language
model, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kinetok.llm.divot.mask import PADDING, QUERY, READ, TEXT
from kinetok.llm.divot.model import DivotLM
from kinetok.llm.divot.sequences import Packed, ask_story
from kinetok.llm.divot.vocabulary import Media
from kinetok.tokenizers.base import Config, Count

SEED_STRIDE = 1_000_003
"""Between the seeds of what one seed draws in turn: the clips of a story, or the tokens of an autoregressive clip."""


class Decoding(Config):
    """How text is drawn; defaults are the reference's."""

    max_tokens: Count = 256
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """0 takes the most likely id."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Ids are drawn from the likeliest ones that have so much probability together."""


@dataclass(frozen=True)
class StoryPart:
    """A text and the clip that follows it."""

    text: str
    token_ND: Tensor


@torch.no_grad()
def complete(model: DivotLM, prompts: Sequence[Packed], seeds: Sequence[int], decoding: Decoding) -> list[str]:
    """What the model says after each prompt, until it ends or `decoding.max_tokens`."""
    stream, draws = Stream(model, prompts), Draws(seeds)
    said = stream.say(draws, decoding, banned=model.vocabulary.visual, stop=model.vocabulary.eos)
    return [model.vocabulary.decode(ids) for ids in said]


@torch.no_grad()
def make_clips(
    model: DivotLM, prompts: Sequence[Packed], seeds: Sequence[int], *, media: Media = "video", variance_scale: float | None = None
) -> Tensor:
    """The tokens of one clip for each prompt, (B, N, D) float32; None takes the variance scale of the head's configuration."""
    return Stream(model, prompts).make_clip(seeds, media, variance_scale)


@torch.no_grad()
def draw_clips(
    model: DivotLM,
    prompts: Sequence[Packed],
    seeds_KB: Sequence[Sequence[int]],
    *,
    media: Media = "video",
    variance_scale: float | None = None,
) -> Tensor:
    """`make_clips` with each of K lots of seeds, (K, B, N, D); the model is asked once where a clip comes in one pass."""
    if model.autoregressive:
        drawn = [make_clips(model, prompts, seeds, media=media, variance_scale=variance_scale) for seeds in seeds_KB]
    else:
        stream = Stream(model, prompts)
        condition_BNP = stream.ask_clip(media)
        drawn = [stream.draw(condition_BNP, seeds, variance_scale) for seeds in seeds_KB]
    return torch.stack(drawn)


@torch.no_grad()
def tell(
    model: DivotLM, request: str, *, clips: int, seed: int, decoding: Decoding, variance_scale: float | None = None, reread: bool = False
) -> list[StoryPart]:
    """A story of `clips` texts, each with its clip. A text ends where the model opens a clip, at the latest at `decoding.max_tokens`.

    `reread` shows each clip to the model before it goes on, as it was trained where its stories had `reread`.
    """
    vocabulary = model.vocabulary
    stream, draws, parts = Stream(model, [ask_story(vocabulary, request)]), Draws([seed]), []
    # The clip's tag is what ends a text; nothing else that is visual may be said, and not the end.
    banned = [*(set(vocabulary.visual) - {vocabulary.begin_video}), vocabulary.eos]
    for number in range(clips):
        (ids,) = stream.say(draws, decoding, banned=banned, stop=vocabulary.begin_video)
        token_BND = stream.make_clip([nth_seed(seed, number + 1)], "video", variance_scale)
        stream.close_clip("video")
        if reread:
            stream.show_clip(token_BND, "video")
        parts.append(StoryPart(vocabulary.decode(ids), token_BND[0]))
    return parts


class Draws:
    """Uniform numbers, one stream a prompt."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self) -> Tensor:
        """(B,) in [0, 1)."""
        return torch.stack([torch.rand((), generator=generator) for generator in self.generators])


class Stream:
    """Prompts that a model has read, with its keys and values kept, to be gone on with. Shorter prompts are padded on the left."""

    def __init__(self, model: DivotLM, prompts: Sequence[Packed]) -> None:
        from transformers import DynamicCache

        # A cache that knows of no window keeps every position: the mask is what hides the old ones.
        self.model, self.cache = model, DynamicCache()
        self.device = next(model.parameters()).device
        self.codes_BL = torch.zeros(len(prompts), 0, dtype=torch.int64, device=self.device)
        batch = {
            "ids_BL": left_padded([prompt.ids_L for prompt in prompts], model.vocabulary.pad).to(self.device),
            "codes_BL": left_padded([prompt.codes_L for prompt in prompts], PADDING).to(self.device),
        }
        if any(len(prompt.read_CND) for prompt in prompts):
            read = [prompt.read_CND.reshape(-1, model.config.token_width).float() for prompt in prompts]
            batch["read_BND"] = pad_sequence(read, batch_first=True).to(self.device)
        self.last_BW = self._go_on(model.embed(batch), batch["codes_BL"])[:, -1]

    def say(self, draws: Draws, decoding: Decoding, *, banned: Sequence[int], stop: int) -> list[list[int]]:
        """Draw ids of text until every prompt has said `stop` or `max_tokens` of them; `stop` itself is not among them, nor read."""
        said: list[list[int]] = [[] for _ in draws.generators]
        open_B = torch.ones(len(said), dtype=torch.bool)
        for _ in range(decoding.max_tokens):
            logits_BV = self.model.logits(self.last_BW).float()
            logits_BV[:, list(banned)] = -torch.inf
            id_B = draw_ids(logits_BV, draws.uniform(), decoding).cpu()
            open_B &= id_B != stop
            if not open_B.any():
                break
            for row in open_B.nonzero()[:, 0].tolist():
                said[row].append(int(id_B[row]))
            self._read_ids(id_B[:, None], torch.where(open_B, TEXT, PADDING)[:, None])
        return said

    def make_clip(self, seeds: Sequence[int], media: Media, variance_scale: float | None) -> Tensor:
        """Open a clip and draw its tokens, (B, N, D)."""
        if self.model.autoregressive:
            self._read_row(self._opening(media), [TEXT, TEXT])
            return self._token_by_token(seeds, variance_scale)
        return self.draw(self.ask_clip(media), seeds, variance_scale)

    def ask_clip(self, media: Media) -> Tensor:
        """Open a clip and read its queries: what the head draws all its tokens from, (B, N, P)."""
        queries = self.model.vocabulary.frames[: self.model.config.clip_tokens]
        hidden_BLW = self._read_row([*self._opening(media), *queries], [TEXT, TEXT, *[QUERY] * len(queries)])
        condition_BNP: Tensor = self.model.to_head(hidden_BLW[:, -len(queries) :])
        return condition_BNP

    def draw(self, condition_BNP: Tensor, seeds: Sequence[int], variance_scale: float | None) -> Tensor:
        """Tokens (B, N, D) that the head draws; None takes the variance scale of its configuration."""
        scale = self.model.config.head.variance_scale if variance_scale is None else variance_scale
        return self.model.head.sample(condition_BNP, seeds, scale)

    def _opening(self, media: Media) -> list[int]:
        return [self.model.vocabulary.tags(media)[0], self.model.vocabulary.begin_frame]

    def close_clip(self, media: Media) -> None:
        """Read the tags that end a clip."""
        self._read_row([self.model.vocabulary.end_frame, self.model.vocabulary.tags(media)[1]], [TEXT, TEXT])

    def show_clip(self, token_BND: Tensor, media: Media) -> None:
        """Read a clip, with its tags, as one that is shown."""
        opening, closing = self.model.vocabulary.tags(media)
        places = self.model.vocabulary.frames[: token_BND.shape[1]]
        ids = [opening, self.model.vocabulary.begin_frame, *places, self.model.vocabulary.end_frame, closing]
        codes = [TEXT, TEXT, *[READ] * len(places), TEXT, TEXT]
        self._read_row(ids, codes, token_BND)

    def _token_by_token(self, seeds: Sequence[int], variance_scale: float | None) -> Tensor:
        """Each token from what was said before it, then read."""
        token_B1D = []
        for number in range(self.model.config.clip_tokens):
            drawn = [nth_seed(seed, number) for seed in seeds]
            token_B1D.append(self.draw(self.model.to_head(self.last_BW[:, None]), drawn, variance_scale))
            code_B1 = torch.full((len(seeds), 1), QUERY, device=self.device)
            self.last_BW = self._go_on(self.model.project(token_B1D[-1]), code_B1)[:, -1]
        return torch.cat(token_B1D, dim=1)

    def _read_row(self, ids: list[int], codes: list[int], read_BND: Tensor | None = None) -> Tensor:
        """The same ids after every prompt; `read_BND` stands at those whose code says so."""
        rows = len(self.codes_BL)
        return self._read_ids(torch.tensor([ids] * rows), torch.tensor([codes] * rows), read_BND)

    def _read_ids(self, ids_BL: Tensor, codes_BL: Tensor, read_BND: Tensor | None = None) -> Tensor:
        batch = {"ids_BL": ids_BL.to(self.device), "codes_BL": codes_BL.to(self.device)}
        if read_BND is not None:
            batch["read_BND"] = read_BND.to(self.device)
        hidden_BLW = self._go_on(self.model.embed(batch), batch["codes_BL"])
        self.last_BW = hidden_BLW[:, -1]
        return hidden_BLW

    def _go_on(self, embeds_BLW: Tensor, codes_BL: Tensor) -> Tensor:
        """Last states of positions that follow all those read so far."""
        self.codes_BL, new = torch.cat([self.codes_BL, codes_BL], dim=1), codes_BL.shape[1]
        positions_BL = ((self.codes_BL != PADDING).cumsum(1) - 1).clamp(min=0)[:, -new:]
        return self.model.hidden(embeds_BLW, self.model.mask(self.codes_BL, last=new), positions_BL=positions_BL, cache=self.cache)


def nth_seed(seed: int, number: int) -> int:
    """A seed of its own for draw `number` of a sample."""
    return int((seed + SEED_STRIDE * number) % 2**63)


def left_padded(rows: Sequence[list[int]], value: int) -> Tensor:
    """(B, L) of the longest row's length."""
    length = max(map(len, rows))
    return torch.tensor([[value] * (length - len(row)) + row for row in rows])


def draw_ids(logits_BV: Tensor, uniform_B: Tensor, decoding: Decoding) -> Tensor:
    """An id for each row by nucleus sampling (arXiv 1904.09751), (B,); `uniform_B` in [0, 1) decides which."""
    if decoding.temperature == 0:
        return logits_BV.argmax(-1)
    chance_BV, id_BV = (logits_BV / decoding.temperature).softmax(-1).sort(descending=True)
    before_BV = chance_BV.cumsum(-1) - chance_BV
    kept_BV = torch.where(before_BV < decoding.top_p, chance_BV, 0).cumsum(-1)
    rank_B1 = (kept_BV <= uniform_B.to(kept_BV)[:, None] * kept_BV[:, -1:]).sum(-1, keepdim=True)
    return id_BV.gather(-1, rank_B1.clamp(max=kept_BV.shape[1] - 1))[:, 0]
