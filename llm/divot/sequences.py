"""What Divot-LLM reads and learns to write, as sequences of ids with labels (arXiv 2412.04432, sections 3.2, 3.3 and A.2).

A clip is `<frame>`, its tokens, `</frame>`; clips stand inside `<vid>...</vid>`, a picture, which is a clip of one frame repeated, inside
`<img>...</img>`. What is shown to the model is read, what it makes is written: a read clip's places are overwritten by its
projected tokens, a written one's are queries. Every function here maps text and token arrays to one `Packed` sample:

    describe    video, caption              learn the caption           pre-training, comprehension
    depict      caption, video              learn the video             pre-training, generation
    answer      [INST] video question       learn every answer          instruction tuning, several turns
    follow      [INST] request, video       learn the video             instruction tuning, generation
    narrate     [INST] request, (text, video) ...   learn texts and videos      storytelling

What has no room is cut: text at its end, never the marks around it. After learned text that was cut no end is learned, nor is the tag
of a clip: a model would learn to stop in the middle. The phrases of `follow` are our own. Not covered: batches (`collate.py`), which
samples there are, and in what mixture.

Legend: L positions, C clips, N tokens of a clip, D token width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import torch
from torch import Tensor

from kinetok.llm.divot.mask import QUERY, READ, TEXT
from kinetok.llm.divot.vocabulary import MOST_TOKENS, Media, Vocabulary

IGNORED = -100
"""Label of a position that nothing is learned at."""
REQUESTS: dict[Media, tuple[str, ...]] = {
    "video": (
        "Generate a video of {caption}",
        "Make a short clip: {caption}",
        "I would like to see a video of this: {caption}",
        "Film the following scene. {caption}",
        "{caption} Show me that as a video.",
        "Turn this description into a video: {caption}",
    ),
    "image": (
        "Generate an image of {caption}",
        "Draw this: {caption}",
        "I would like to see a picture of this: {caption}",
        "Paint the following scene. {caption}",
        "{caption} Show me that as a picture.",
        "Turn this description into an image: {caption}",
    ),
}
"""Ways to ask for a clip; inference asks in the first."""


@dataclass(frozen=True)
class Packed:
    """One sample. Read and written tokens stand in the order of their positions."""

    ids_L: list[int]
    codes_L: list[int]
    """What each position is, see `mask.py`."""
    labels_L: list[int]
    """The id itself where it is learned, else `IGNORED`."""
    read_CND: Tensor
    written_CND: Tensor

    def __len__(self) -> int:
        return len(self.ids_L)


def describe(vocabulary: Vocabulary, clips_CND: Tensor, caption: str, *, limit: int, media: Media = "video") -> Packed:
    """The clips, then their caption, which is cut to `limit` positions in all. Of clips without a caption nothing is learned."""
    draft = Draft(vocabulary, limit).begin().read(clips_CND, media)
    return draft.text(vocabulary.encode(caption), learned=True, room=1).end(learned=bool(caption))


def depict(vocabulary: Vocabulary, caption: str, clips_CND: Tensor, *, limit: int, media: Media = "video") -> Packed:
    """A caption, cut to `limit` positions in all, then the clip; only the end is learned of the ids."""
    draft = Draft(vocabulary, limit).begin()
    draft.text(vocabulary.encode(caption), room=_places(clips_CND) + 1)
    return draft.write(clips_CND, media, learned=False).end()


def answer(vocabulary: Vocabulary, clips_CND: Tensor, turns: Sequence[tuple[str, str]], *, limit: int, media: Media = "video") -> Packed:
    """Questions about the clips with their answers; the clips stand in the first. Turns that `limit` has no room for are left out; of the
    first, the question is cut, and where the answer is long, that too: it then has half of the room. Of an empty one no end is learned."""
    draft = Draft(vocabulary, limit).begin()
    for number, (question, reply) in enumerate(turns):
        before, after = vocabulary.encode("\n[INST] " if number else "[INST] "), vocabulary.encode(f"{question} [/INST]\n")
        reply_ids = vocabulary.encode(reply)
        if number and draft.room < len(before) + len(after) + len(reply_ids) + 1:
            break
        draft.text(before)
        if not number:
            draft.read(clips_CND, media)
            room = draft.room - 1 - min(len(reply_ids), draft.room // 2)
            if len(after) > room:
                closing = vocabulary.encode(" [/INST]\n")
                after = [*vocabulary.encode(question)[: max(room - len(closing), 0)], *closing]
        draft.text(after).text(reply_ids, learned=True, room=1)
    return draft.end(learned=bool(turns[-1][1]))


def follow(vocabulary: Vocabulary, caption: str, clips_CND: Tensor, *, limit: int, phrase: int = 0, media: Media = "video") -> Packed:
    """A request in words number `phrase` of `REQUESTS`, then the clip. Its tags are learned, so that the model knows to answer with one."""
    draft = Draft(vocabulary, limit).begin()
    draft.instruct(_request(caption, media, phrase), room=_places(clips_CND) + 1)
    return draft.write(clips_CND, media, learned=True).end()


def narrate(vocabulary: Vocabulary, request: str, parts: Sequence[tuple[str, Tensor]], *, limit: int, reread: bool = False) -> Packed:
    """A request, then pairs of a text and the clip (1, N, D) it tells of; pairs that `limit` has no room for are left out, and no end is
    learned then. `reread` shows every clip to the model once it was made, for what follows to know it."""
    draft = Draft(vocabulary, limit).begin()
    places = _places(parts[0][1]) * (2 if reread else 1)
    draft.instruct(request, room=places + 2)
    for number, (text, clip_CND) in enumerate(parts):
        ids = vocabulary.encode(text)
        if number and draft.room < len(ids) + places + 1:
            draft.cut = True
            break
        draft.text(ids, learned=True, room=places + 1).write(clip_CND, "video", learned=True)
        if reread:
            draft.read(clip_CND, "video")
    return draft.end()


def ask_caption(vocabulary: Vocabulary, clips_CND: Tensor, *, media: Media = "video") -> Packed:
    """The beginning of `describe`: a model that was not instruction-tuned goes on with a caption."""
    return Draft(vocabulary).begin().read(clips_CND, media).prompt()


def ask(vocabulary: Vocabulary, clips_CND: Tensor, question: str, *, media: Media = "video", instructed: bool = True) -> Packed:
    """The beginning of `answer`, or for a model that was not instruction-tuned, which knows no questions, `ask_caption`."""
    if not instructed:
        return ask_caption(vocabulary, clips_CND, media=media)
    draft = Draft(vocabulary).begin().text(vocabulary.encode("[INST] ")).read(clips_CND, media)
    return draft.text(vocabulary.encode(f"{question} [/INST]\n")).prompt()


def template(vocabulary: Vocabulary, *, media: Media = "video", instructed: bool = True) -> str:
    """What `ask` makes of a question about one clip, in letters: `{question}`, and `{tokens}` where the clip's tokens stand."""
    prompt = ask(vocabulary, torch.zeros(1, 1, 1), "{question}", media=media, instructed=instructed)
    runs = groupby(zip(prompt.ids_L, prompt.codes_L, strict=True), key=lambda position: position[1])
    return "".join("{tokens}" if code == READ else vocabulary.spelt([number for number, _ in run]) for code, run in runs)


def ask_clip(vocabulary: Vocabulary, caption: str, *, instructed: bool, media: Media = "video") -> Packed:
    """The beginning of `follow`, or of `depict` for a model that was not instruction-tuned, up to where the first clip's tag belongs."""
    draft = Draft(vocabulary).begin()
    if instructed:
        return draft.instruct(_request(caption, media, 0)).prompt()
    return draft.text(vocabulary.encode(caption)).prompt()


def ask_story(vocabulary: Vocabulary, request: str) -> Packed:
    """The beginning of `narrate`."""
    return Draft(vocabulary).begin().instruct(request).prompt()


def _request(caption: str, media: Media, phrase: int) -> str:
    return REQUESTS[media][phrase % len(REQUESTS[media])].format(caption=caption)


def _places(clips_CND: Tensor) -> int:
    """Positions of clips with all their tags."""
    return clips_CND.shape[0] * (clips_CND.shape[1] + 2) + 2


class Draft:
    """A sequence in the making."""

    def __init__(self, vocabulary: Vocabulary, limit: int | None = None) -> None:
        self.vocabulary, self.limit = vocabulary, limit
        self.ids: list[int] = []
        self.codes: list[int] = []
        self.labels: list[int] = []
        self.clips: dict[int, list[Tensor]] = {READ: [], QUERY: []}
        self.cut = False
        """Whether what is learned last is not whole."""

    @property
    def room(self) -> int:
        """Positions left."""
        return (self.limit if self.limit is not None else 1 << 30) - len(self.ids)

    def begin(self) -> Self:
        """The mark of the beginning."""
        return self._put([self.vocabulary.bos])

    def text(self, ids: list[int], *, learned: bool = False, room: int = 0) -> Self:
        """Ids of text, cut so that `room` positions remain; ValueError where not one of them would."""
        kept = ids[: max(self.room - room, 0)]
        if ids and not kept:
            raise ValueError(f"a limit of {self.limit} positions leaves no room for the text: raise it, or give fewer clips")
        self.cut = learned and len(kept) < len(ids)
        return self._put(kept, learned=learned)

    def instruct(self, request: str, *, room: int = 0) -> Self:
        """A request inside the marks of an instruction; it is cut, they are not."""
        opening, closing = self.vocabulary.encode("[INST] "), self.vocabulary.encode(" [/INST]\n")
        return self.text(opening).text(self.vocabulary.encode(request), room=room + len(closing)).text(closing)

    def read(self, clips_CND: Tensor, media: Media) -> Self:
        """Clips that are shown to the model."""
        return self._clips(clips_CND, READ, media)

    def write(self, clips_CND: Tensor, media: Media, *, learned: bool) -> Self:
        """Clips that the model makes; whether it also learns to open and close them."""
        return self._clips(clips_CND, QUERY, media, learned=learned)

    def end(self, *, learned: bool = True) -> Packed:
        """The finished sample; its end is learned where nothing before it was cut, and not where it would follow upon nothing."""
        return self._put([self.vocabulary.eos], learned=learned and not self.cut).prompt()

    def prompt(self) -> Packed:
        """The sample as it is, to be gone on with. ValueError where it is longer than the limit."""
        if self.room < 0:
            raise ValueError(f"{len(self.ids)} positions are more than the limit of {self.limit}: raise it, or give fewer clips")
        read_CND, written_CND = (_joined(clips) for clips in (self.clips[READ], self.clips[QUERY]))
        return Packed(self.ids, self.codes, self.labels, read_CND, written_CND)

    def _clips(self, clips_CND: Tensor, code: int, media: Media, *, learned: bool = False) -> Self:
        if clips_CND.ndim != 3 or not 1 <= clips_CND.shape[1] <= MOST_TOKENS:
            raise ValueError(f"clips are (clips, 1 to {MOST_TOKENS} tokens, width), not {tuple(clips_CND.shape)}")
        opening, closing = self.vocabulary.tags(media)
        self.clips[code].append(clips_CND)
        self._put([opening], learned=learned and not self.cut)
        self.cut = False
        for _ in clips_CND:
            self._put([self.vocabulary.begin_frame])
            self._put(self.vocabulary.frames[: clips_CND.shape[1]], code=code)
            self._put([self.vocabulary.end_frame])
        return self._put([closing], learned=learned)

    def _put(self, ids: list[int], *, code: int = TEXT, learned: bool = False) -> Self:
        self.ids += ids
        self.codes += [code] * len(ids)
        self.labels += ids if learned else [IGNORED] * len(ids)
        return self


def _joined(clips: list[Tensor]) -> Tensor:
    return torch.cat(clips) if clips else torch.zeros(0, 0, 0)
