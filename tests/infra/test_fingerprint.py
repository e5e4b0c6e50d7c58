"""Canonical bytes: one form per value, and refusal of what has none."""

import enum

import numpy as np
import pytest

from kinetok.infra.config import Config
from kinetok.infra.fingerprint import canonical, fingerprint, plain


class Colour(enum.Enum):
    RED = "red"


class Settings(Config):
    b: int = 1
    a: tuple[float, ...] = (0.5,)


def test_order_and_container_types_do_not_matter() -> None:
    assert canonical({"b": 1, "a": [1, 2]}) == canonical({"a": (1, 2), "b": 1}) == b'{"a":[1,2],"b":1}'
    assert canonical(Settings()) == b'{"a":[0.5],"b":1}'
    assert plain({"colour": Colour.RED}) == {"colour": "red"}
    assert canonical("ü") == '"ü"'.encode()


def test_values_that_differ_have_different_bytes() -> None:
    values = [None, False, 0, "0", [], [0], {}, {"0": 0}, 0.5, "", [[0]]]
    assert len({canonical(value) for value in values}) == len(values)


def test_minus_zero_is_zero() -> None:
    assert canonical(-0.0) == canonical(0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [{"a": float("-inf")}]])
def test_no_number_no_fingerprint(value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical(value)


@pytest.mark.parametrize("value", [object(), print, {1, 2}, b"bytes", {1: 2}, np.zeros(2)])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        fingerprint(value)


def test_a_known_fingerprint() -> None:
    """Fixed for ever: another value would build every artifact of every store again."""
    assert fingerprint({"kind": "numbers", "count": 3, "rate": 0.1}) == "954a8e761b07ca8a"
