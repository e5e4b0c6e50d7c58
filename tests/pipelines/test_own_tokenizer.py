"""Of several trainings that decode the same tokens, the one that knows most of a language model."""

from pathlib import Path

import pytest

from kinetok.infra.artifact import Artifact, InputInfo, Record, Store, publish
from kinetok.infra.errors import StoreError
from kinetok.infra.fingerprint import fingerprint
from kinetok.infra.storage import Folder
from kinetok.pipelines.own_tokenizer import own_tokenizer
from kinetok.tokenizers.divot.training import DivotObjective


class Made:
    """A store of artifacts without files, each made a second after the one before."""

    def __init__(self, folder: Path) -> None:
        self.store, self.second = Store(Folder(str(folder))), 0

    def __call__(self, kind: str, name: str, stage: str | None = None, **inputs: Artifact) -> Artifact:
        self.second += 1
        behind = {field: (InputInfo(kind=a.kind, name=a.name, key=a.key, digest=a.digest),) for field, a in inputs.items()}
        key = fingerprint({"name": name, "inputs": {field: a.key for field, a in inputs.items()}, "second": self.second})
        config = {"objective": DivotObjective.model_validate({"stage": stage}).model_dump()} if stage else {}
        record = Record(
            kind=kind,
            name=name,
            key=key,
            version=1,
            config=dict(config),
            inputs=behind,
            digest="",
            started=f"2026-01-01T00:00:{self.second:02}+00:00",
            seconds=1.0,
        )
        return publish(self.store.folder(kind, name, key), record)


def test_the_tokenizer_that_knows_most_of_a_model_is_its_own(tmp_path: Path) -> None:
    """As the stages of jobs/divot.yaml come into a store, one after the other."""
    made = Made(tmp_path)
    joint = made("train", "joint", "joint")
    tokens = made("encode", "tokens", model=joint)
    language = made("language", "language", tokens=tokens)
    tuned = made("language", "tuned", tokens=tokens, start=language)
    other = made("language", "other", tokens=tokens)

    def owns() -> list[str]:
        return [own_tokenizer(name, made.store).name for name in ("language", "tuned", "other")]

    assert owns() == ["joint", "joint", "joint"]
    made("train", "elsewhere", "refine", tokens=made("encode", "others", model=made("train", "joint2", "joint")))
    made("train", "rung")
    assert owns() == ["joint", "joint", "joint"]
    refined = made("train", "refined", "refine", tokens=tokens, start=joint)
    assert owns() == ["refined", "refined", "refined"]
    made("train", "adapted", "adapt", tokens=made("write", "written", model=language), start=refined)
    assert owns() == ["adapted", "adapted", "refined"]
    made("train", "again", "adapt", tokens=made("write", "written", model=tuned), start=refined)
    made("train", "late", "refine", tokens=tokens, start=joint)
    assert owns() == ["adapted", "again", "late"]
    assert own_tokenizer(str(other.folder), made.store).name == "late"
    made("train", "newest", "adapt", tokens=made("write", "more", model=tuned), start=refined)
    assert own_tokenizer(tuned.key, made.store).name == "newest"


def test_a_refinement_that_was_trained_from_features_counts(tmp_path: Path) -> None:
    made = Made(tmp_path)
    joint = made("train", "joint", "joint")
    made("language_model", "released", tokens=made("encode", "tokens", model=joint))
    made("train", "refined", "refine", features=made("vit", "vit"), start=joint)
    assert own_tokenizer("released", made.store).name == "refined"


def test_a_store_that_does_not_tell_is_an_error(tmp_path: Path) -> None:
    made = Made(tmp_path)
    tokens = made("encode", "tokens", model=made("train", "joint", "joint"))
    made("language", "language", tokens=tokens)
    tokens.folder.remove("record.json")
    for name in ("language", "nothing"):
        with pytest.raises(StoreError, match=rf"--tokenizer: {name} does not say which tokenizer it speaks for; name it"):
            own_tokenizer(name, made.store)
