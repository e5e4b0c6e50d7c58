"""`own_tokenizer`: which tokenizer of a store shows what an artifact's language model writes, where nobody names one.

Training the de-tokenizer alone leaves tokens as they are, so several trainings decode the same tokens: the joint one, which never did
without a condition and so cannot be guided; `refine`, which learned that; `adapt`, which learned from what a language model wrote. The
one that knows most of this model is taken. Not covered: whether the two belong together (`VideoLM.open` compares their specs).
"""

from collections.abc import Iterator

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.errors import StoreError
from kinetok.tokenizers.divot.training import ADAPT, DIVOT, REFINE


def own_tokenizer(model: str, store: Store) -> Artifact:
    """A `train` or `model` artifact; StoreError where the store does not tell.

    The newest `adapt` training on what the model wrote, or else the one it started from, and so on; else the newest `refine` training on
    the tokens it learned from, or from the model that made them; else that model itself.
    """
    try:
        language = store.find(model)
        trainings = sorted(store.of_kind("train"), key=lambda found: found.record.started, reverse=True)
        for speaker in _line(language, store):
            written = {found.key for found in store.of_kind("write") if speaker.key in _behind(found, "model")}
            for training in trainings:
                if _stage(training) == ADAPT and written & _behind(training, "tokens"):
                    return training
        maker = _made_of(_made_of(language, "tokens", store), "model", store)
        tokens = _behind(language, "tokens")
        for training in trainings:
            if _stage(training) == REFINE and (tokens & _behind(training, "tokens") or maker.key in _behind(training, "start")):
                return training
        return maker
    except (StoreError, LookupError) as error:
        raise StoreError(f"--tokenizer: {model} does not say which tokenizer it speaks for; name it") from error


def _line(language: Artifact, store: Store) -> Iterator[Artifact]:
    """The model, the one it started from, and so on, as far as they are there."""
    found: Artifact | None = language
    while found is not None:
        yield found
        start = found.record.inputs.get("start")
        found = store.get(start[0].kind, start[0].name, start[0].key) if start else None


def _stage(training: Artifact) -> object:
    """Which stage of Divot's training it was; None of any other training."""
    objective = training.record.config.get("objective")
    return objective.get("stage") if isinstance(objective, dict) and objective.get("kind") == DIVOT else None


def _behind(artifact: Artifact, field: str) -> set[str]:
    """Keys of what stood behind a field of an artifact."""
    return {info.key for info in artifact.record.inputs.get(field, ())}


def _made_of(artifact: Artifact, field: str, store: Store) -> Artifact:
    """The first artifact behind a field of another one; LookupError where it is gone."""
    info = artifact.record.inputs[field][0]
    found = store.get(info.kind, info.name, info.key)
    if found is None:
        raise LookupError(info.name)
    return found
