"""Configs are frozen, strict, finite, and explain their fields."""

import pytest
from pydantic import ValidationError

from kinetok.infra.config import Config


class Settings(Config):
    rate: float = 1.0
    """Samples a second."""


def test_unknown_and_infinite_values_are_refused() -> None:
    for fields in ({"rtae": 1}, {"rate": float("nan")}, {"rate": float("inf")}, {"rate": "fast"}):
        with pytest.raises(ValidationError):
            Settings.model_validate(fields)


def test_configs_are_values() -> None:
    assert Settings(rate=1) == Settings() and hash(Settings(rate=1)) == hash(Settings())
    with pytest.raises(ValidationError):
        Settings().rate = 2.0  # type: ignore[misc]


def test_text_numbers_are_numbers() -> None:
    """YAML reads `1e-4` as text."""
    assert Settings.model_validate({"rate": "1e-4"}).rate == 1e-4


def test_docstrings_become_descriptions() -> None:
    assert Settings.model_fields["rate"].description == "Samples a second."
