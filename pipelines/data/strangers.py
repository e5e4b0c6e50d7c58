"""Text from strangers as text that every store, page and terminal takes: `caption` and `label`.

A JSON string may hold half of a surrogate pair, which no UTF-8 file can store; a NUL, which PostgreSQL refuses; escape sequences, which
a terminal obeys. Captions lose them, labels (names of files, ids made of them) show them as backslash escapes, so that two names stay
two. Not covered: HTML, which the templates escape, and what a caption says.
"""

import re

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Controls of C0 and C1, lone surrogates, separators of lines, and marks that reverse the direction of what follows."""


def caption(text: str, limit: int) -> str:
    """At most `limit` characters, without controls: a space stands for each."""
    return _CONTROLS.sub(" ", text[: 4 * limit]).strip()[:limit]


def label(name: str) -> str:
    """`name` with backslash escapes for what is not text."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), name)
