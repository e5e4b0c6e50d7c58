"""Which language model a command takes, where nobody names one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from kinetok.infra.artifact import Artifact, Record, Store, publish
from kinetok.infra.errors import StoreError
from kinetok.infra.job import load_job
from kinetok.infra.storage import Folder
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.cli import JOBS
from kinetok.pipelines.stages.language import Language
from kinetok.pipelines.trained_for import TASKS, trained_for


class Made:
    """A store of models without files, each made a second after the one before."""

    def __init__(self, folder: Path) -> None:
        self.store, self.second = Store(Folder(str(folder))), 0

    def __call__(self, name: str, config: Mapping[str, object], kind: str = "language") -> Artifact:
        self.second += 1
        started = f"2026-01-01T00:00:{self.second:02}+00:00"
        record = Record(
            kind=kind, name=name, key=f"k{self.second}", version=1, config=dict(config), digest="", started=started, seconds=1.0
        )
        return publish(self.store.folder(kind, name, record.key), record)

    def learned(self, name: str, *tasks: Mapping[str, object]) -> Artifact:
        return self(name, {"tasks": list(tasks)})

    def taken(self) -> Sequence[str]:
        """For `ask`, `generate` and `tell`."""
        return [trained_for(command, self.store).name for command in TASKS]


@pytest.mark.parametrize("job", ["divot", "divot-middle", "divot-7b"])
def test_of_a_finished_job_each_command_takes_the_model_that_is_for_it(job: str, tmp_path: Path) -> None:
    """The storyteller is the newest, and learned to write clips too."""
    made = Made(tmp_path)
    for name, stage in load_job(JOBS / f"{job}.yaml", STAGES).stages.items():
        if isinstance(stage, Language):
            made(name, stage.model_dump(mode="json"))
    assert made.taken() == ["reader", "writer", "storyteller"]


def test_one_that_answers_goes_before_one_that_describes_and_a_tuned_one_before_an_untuned_one(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.learned("first", {"kind": "captioning"}, {"kind": "generation"}, {"kind": "storytelling"})
    assert made.taken() == ["first", "first", "first"]
    made.learned("tuned", {"kind": "captioning", "instructed": True}, {"kind": "generation", "instructed": True, "weight": 0.5})
    made.learned("again", {"kind": "captioning"}, {"kind": "generation"}, {"kind": "storytelling", "weight": 0.5})
    assert made.taken() == ["tuned", "tuned", "first"]
    made.learned("answers", {"kind": "answering", "weight": 0.5}, {"kind": "captioning"})
    made.learned("describes", {"kind": "captioning", "instructed": True})
    assert made.taken() == ["answers", "tuned", "first"]


def test_of_equals_the_newest_is_taken(tmp_path: Path) -> None:
    made = Made(tmp_path)
    every = ({"kind": "answering"}, {"kind": "generation", "instructed": True}, {"kind": "storytelling"})
    for name in ("zebra", "ant"):
        made.learned(name, *every)
        assert made.taken() == [name] * 3


def test_where_none_was_the_error_tells_what_is_there(tmp_path: Path) -> None:
    made = Made(tmp_path)
    with pytest.raises(
        StoreError, match=r"--model: no language model in .* was trained on answering or captioning; it holds none\. Train one"
    ):
        trained_for("ask", made.store)
    made.learned("writer", {"kind": "generation"}, {"kind": "generation", "source": 1})
    made("released", {"instructed": True}, kind="language_model")
    there = r"storytelling; it holds writer \(generation\), released \(trained elsewhere\)\. .*`kinetok run divot`.*--model"
    with pytest.raises(StoreError, match=there):
        trained_for("tell", made.store)
