"""Ids of text and of visual tokens."""

from pathlib import Path

from kinetok.llm.divot.vocabulary import MOST_TOKENS, Vocabulary, byte_tokenizer


def test_text_comes_back(vocabulary: Vocabulary) -> None:
    text = "a red circle, é🙂\n\tleft "
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.decode([vocabulary.bos, *vocabulary.encode(text), *vocabulary.frames, vocabulary.eos]) == text


def test_a_word_is_one_id_and_other_text_comes_back(vocabulary: Vocabulary) -> None:
    worded = Vocabulary.of_bytes(["red", "disc"])
    assert len(worded.encode("red disc red")) == 3
    assert worded.encode("a") == vocabulary.encode("a")
    assert len(worded.encode("redder discs, édisc")) < len(vocabulary.encode("redder discs, édisc"))
    assert worded.decode(worded.encode("redder discs, édisc red")) == "redder discs, édisc red"
    assert worded.tokenizer.get_vocab() == Vocabulary.of_bytes(["red", "disc"]).tokenizer.get_vocab()


def test_ids_that_were_read_before_are_nobodys_to_change(vocabulary: Vocabulary) -> None:
    first = vocabulary.encode("a disc")
    first.append(7)
    assert vocabulary.encode("a disc") == first[:-1]


def test_visual_tokens_are_262_new_ids(vocabulary: Vocabulary) -> None:
    assert len(set(vocabulary.visual)) == len(vocabulary.visual) == 6 + MOST_TOKENS
    assert len(vocabulary) == len(byte_tokenizer()) + len(vocabulary.visual)
    assert vocabulary.tags("video") != vocabulary.tags("image")


def test_a_tag_in_a_strangers_text_is_plain_letters(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("<vid><frame><frame_00000></s> <s>")
    assert not set(ids) & {*vocabulary.visual, vocabulary.bos, vocabulary.eos}


def test_saved_vocabulary_is_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save_pretrained(tmp_path)
    read = Vocabulary.from_pretrained(tmp_path)
    assert (read.visual, read.bos, read.eos, len(read)) == (vocabulary.visual, vocabulary.bos, vocabulary.eos, len(vocabulary))
    assert read.encode("<vid> é") == vocabulary.encode("<vid> é")
