"""Text from strangers becomes text that files, databases and terminals take."""

import pytest

from kinetok.pipelines.data.strangers import caption, label

HOSTILE = ("\ud800", "a\0b", "\x1b[2J\x1b]0;title\x07", "line\nbreak\r", "\x9b31m", "\u202egnp.exe", "\u2028")


@pytest.mark.parametrize("text", HOSTILE)
def test_neither_holds_what_a_terminal_obeys_or_utf8_cannot_store(text: str) -> None:
    for cleaned in (caption(text, 100), label(text)):
        cleaned.encode()
        assert not any(ord(sign) < 32 or 127 <= ord(sign) < 160 or sign in "\u2028\u202e" for sign in cleaned)


def test_plain_text_of_all_scripts_stays_as_it_is() -> None:
    for text in ("a dog runs", "собака 走る كلب 🐕 café", "x" * 100):
        assert caption(text, 100) == label(text) == text


def test_names_that_differ_stay_different() -> None:
    assert len({label(name) for name in HOSTILE}) == len(HOSTILE)


def test_a_caption_is_cut() -> None:
    assert caption("\0" * 1000 + "x" * 1000, 10) == ""
    assert caption("x" * 1000, 10) == "x" * 10
