"""What a stage's key is made of, and what it is not."""

import threading
from types import ModuleType

import pytest

from kinetok.infra.errors import Cancelled
from kinetok.infra.stage import Ref, Resources, StageContext
from kinetok.infra.storage import Folder


def test_references_are_told_from_literals(toys: ModuleType) -> None:
    stage = toys.Sum(numbers="few", more=("a", "b"))
    assert list(stage.refs()) == [("numbers", "few"), ("more", "a"), ("more", "b")]
    assert all(isinstance(ref, Ref) for _, ref in stage.refs())
    assert stage.literals() == {"scale": {"factor": 1.0, "offset": 0.0}}
    assert {name: produces.kinds for name, produces in toys.Sum.ref_fields().items()} == {
        "numbers": ("numbers",),
        "more": ("numbers",),
        "start": ("sum",),
    }


def test_a_reference_that_is_not_set_is_no_part_of_the_identity(toys: ModuleType) -> None:
    identity = toys.Sum(numbers="few").identity({"numbers": "0" * 16})
    assert identity == {
        "kind": "sum",
        "version": 1,
        "config": {"scale": {"factor": 1.0, "offset": 0.0}},
        "facts": {},
        "inputs": {"numbers": "0" * 16},
    }


def test_the_key_follows_literals_version_facts_and_input_keys_but_no_names(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(numbers: str = "few", **fields: object) -> str:
        return str(toys.Sum(numbers=numbers, **fields).key({"numbers": "0" * 16}))

    first = key()
    assert key(numbers="renamed") == first
    assert key(scale=toys.Scale(factor=1)) == first
    assert key(scale=toys.Scale(factor=2)) != first
    assert toys.Sum(numbers="few").key({"numbers": "1" * 16}) != first
    monkeypatch.setattr(toys.Sum, "version", 2)
    assert key() != first
    monkeypatch.undo()
    monkeypatch.setattr(toys.Sum, "facts", lambda self: {"listing": "x"})
    assert key() != first


def test_a_context_hands_out_inputs_and_stops() -> None:
    stop = threading.Event()
    ctx = StageContext("s", "k", {"several": ()}, Folder("nowhere"), Resources(), lambda **_: None, stop)
    assert ctx.several("several") == () == ctx.several("absent")
    assert ctx.optional("absent") is None
    ctx.check()
    stop.set()
    with pytest.raises(Cancelled, match="stage s was asked to stop"):
        ctx.check()
