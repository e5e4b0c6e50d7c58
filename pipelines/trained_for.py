"""`trained_for`: which language model of a store `kinetok ask`, `generate` and `tell` take, where nobody names one.

A job trains several of one start: one that reads, one that writes, one for stories. What each is for is told by the tasks of its stage,
which its record holds. Not covered: its tokenizer (`own_tokenizer.py`).
"""

from typing import Literal, TypeAlias

from pydantic import BaseModel

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.errors import StoreError

Command: TypeAlias = Literal["ask", "generate", "tell"]
TASKS: dict[Command, tuple[str, ...]] = {"ask": ("answering", "captioning"), "generate": ("generation",), "tell": ("storytelling",)}
"""Kinds of tasks that teach what a command asks for, the better ones first."""


class _Learned(BaseModel):
    """What counts here of a task in a record. Its other fields are left unread: the record may be of another version of the stage."""

    kind: str
    instructed: bool = False
    weight: float = 1.0


class _Config(BaseModel):
    tasks: tuple[_Learned, ...] = ()


def trained_for(command: Command, store: Store) -> Artifact:
    """The newest `language` artifact among those that fit `command` best; StoreError where none does.

    Best is the better kind of task, then one in the form of instructions, then one that no other task of the model outweighs: a storyteller
    also learns to write clips, and is made after the writer that it starts from.
    """
    models = list(store.of_kind("language"))
    fits = [(fit, model.record.started, model) for model in models if (fit := _fit(_tasks(model), TASKS[command])) is not None]
    if fits:
        return max(fits, key=lambda found: found[:2])[2]
    elsewhere = [f"{model.name} (trained elsewhere)" for model in store.of_kind("language_model")]
    there = [*(f"{model.name} ({', '.join(dict.fromkeys(task.kind for task in _tasks(model)))})" for model in models), *elsewhere]
    raise StoreError(
        f"--model: no language model in {store.root} was trained on {' or '.join(TASKS[command])}; it holds {', '.join(there) or 'none'}. "
        "Train one (`kinetok run divot`), name another with --model, or set KINETOK_STORE to the store that has it"
    )


def _tasks(model: Artifact) -> tuple[_Learned, ...]:
    return _Config.model_validate(model.record.config).tasks


def _fit(tasks: tuple[_Learned, ...], kinds: tuple[str, ...]) -> tuple[int, bool, bool] | None:
    """How well tasks suit a command, more is better; None where none of them is of its kinds."""
    most = max((task.weight for task in tasks), default=0.0)
    return max(((-kinds.index(task.kind), task.instructed, task.weight == most) for task in tasks if task.kind in kinds), default=None)
