"""`Vocabulary`: a language model's text tokens, and the visual ones that Divot adds to them (arXiv 2412.04432).

Six tags around clips and 256 frame tokens, `<frame_00000>` and so on, of which the first are the places of a clip's tokens: a
placeholder where a clip is shown, a learned query where one is made. Text comes from strangers, so a tag written in it is read as
plain letters. For runs without a network there is a vocabulary of bytes and, if wanted, of some words. Not covered: the rows of the
embedding (`language.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self, TypeAlias

from kinetok.tokenizers.base import import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Media: TypeAlias = Literal["video", "image"]

TAGS: Final = ("<img>", "</img>", "<vid>", "</vid>", "<frame>", "</frame>")
MOST_TOKENS: Final = 256
"""Frame tokens, the most tokens that a clip can have."""
BYTES: Final = ("<pad>", "<s>", "</s>", "<unk>")
"""What the vocabulary of bytes begins with."""
TEXTS_HELD: Final = 4096
"""Texts whose ids are kept: the marks of instructions stand in every sample, and small data sets come again in every epoch."""
MOST_IDS: Final = 2**15
"""Of that vocabulary: more than words that somebody lists need."""


class Vocabulary:
    """Text to ids and back; visual tokens that the tokenizer lacks are added to it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """ValueError where the tokenizer marks no beginning and end of a sequence."""
        visual = [*TAGS, *(f"<frame_{index:05d}>" for index in range(MOST_TOKENS))]
        known = tokenizer.get_vocab().keys()
        lacking = [token for token in visual if token not in known]
        tokenizer.add_tokens(visual, special_tokens=True)
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError(
                f"{tokenizer.name_or_path} has no token for the beginning or the end of a sequence: name another language model"
            )
        self.tokenizer = tokenizer
        self.bos: int = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        found = [ids for token in visual if isinstance(ids := tokenizer.convert_tokens_to_ids(token), int)]
        self.begin_image, self.end_image, self.begin_video, self.end_video, self.begin_frame, self.end_frame = found[: len(TAGS)]
        self.frames = found[len(TAGS) :]
        self.added: list[int] = [number for token, number in zip(visual, found, strict=True) if token in set(lacking)]
        """Visual ids that the tokenizer lacked: nothing was learned of them yet."""
        self._read: dict[str, list[int]] = {}

    def __len__(self) -> int:
        """Rows that an embedding needs."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def tags(self, media: Media) -> tuple[int, int]:
        """What opens and closes a video or an image."""
        return (self.begin_video, self.end_video) if media == "video" else (self.begin_image, self.end_image)

    @property
    def visual(self) -> list[int]:
        """The ids of all visual tokens."""
        return [self.begin_image, self.end_image, self.begin_video, self.end_video, self.begin_frame, self.end_frame, *self.frames]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, none of them special."""
        if text not in self._read:
            if len(self._read) == TEXTS_HELD:
                self._read.clear()
            self._read[text] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return list(self._read[text])

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def spelt(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens by their names."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer's files, as transformers does."""
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """The vocabulary of a language model, by folder or hub id."""
        import_transformers()
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(path, trust_remote_code=False))

    @classmethod
    def of_bytes(cls, words: Sequence[str] = ()) -> Self:
        """One id for each byte of UTF-8, and for each of `words`, with the space before it and without; needs no file."""
        return cls(byte_tokenizer(words))


def byte_tokenizer(words: Sequence[str] = ()) -> "PreTrainedTokenizerBase":
    """Reads bytes and `words`, and knows no visual token yet."""
    import_transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # Pairs are merged until every word is one id; the parts of words on the way there keep theirs.
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_IDS, min_frequency=1, special_tokens=list(BYTES), initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator([before + word for word in words for before in ("", " ")], trainer)
    pad, begin, end, unknown = BYTES
    marks = {"pad_token": pad, "bos_token": begin, "eos_token": end, "unk_token": unknown}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **marks)  # type: ignore[no-untyped-call]
