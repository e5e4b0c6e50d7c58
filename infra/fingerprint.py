"""Canonical bytes of plain values, and the 16-hex fingerprint made of them.

A key decides what is computed again, so anything without one canonical form is refused rather than guessed:
callables, objects with a default repr, NaN and infinity, non-string mapping keys. Pydantic models are dumped
to JSON first. Not covered: file contents (see `artifact.py`) and source text (a change of meaning bumps a stage's version).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TypeAlias

from pydantic import BaseModel

Plain: TypeAlias = bool | int | float | str | list["Plain"] | dict[str, "Plain"] | None


def plain(value: object) -> Plain:
    """`value` as JSON-ready data with one canonical form; raises TypeError naming the offending type."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, float):
        return value or 0.0  # -0.0 is 0.0
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"a fingerprint needs string keys, got {name!r}")
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__qualname__} has no canonical form: turn it into numbers, text, lists and mappings first")


def canonical(value: object) -> bytes:
    """Compact, key-sorted JSON; raises ValueError on NaN or infinity, TypeError on anything without a canonical form."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def fingerprint(value: object) -> str:
    """First 16 hex digits of the sha256 of `canonical(value)`."""
    return hashlib.sha256(canonical(value)).hexdigest()[:16]
