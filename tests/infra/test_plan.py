"""What a plan says: cached or why not, what to expect, the same keys for ever, and nothing touched."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kinetok.infra.artifact import Store
from kinetok.infra.errors import DataError, StoreError
from kinetok.infra.plan import UNKNOWN, Step, human_bytes, human_seconds, plan, plan_table, size_table
from kinetok.infra.run import run
from kinetok.infra.stage import Stage

GOLDEN = Path(__file__).parents[1] / "golden" / "keys.json"


def steps(toys: ModuleType, store: Path, *overrides: str) -> dict[str, Step]:
    return {step.name: step for step in plan(*toys.job(store, *overrides))}


def built(toys: ModuleType, store: Path, *overrides: str) -> Store:
    job, place = toys.job(store, *overrides)
    assert run(job, place).succeeded
    return place


def why(step: Step) -> list[str]:
    return [str(change) for change in step.changes] or [step.reason]


def test_the_keys_of_the_toy_job_never_change(toys: ModuleType, tmp_path: Path) -> None:
    """If this fails, every artifact of every store would be built again: change the expectation only when that is meant."""
    assert {name: step.key for name, step in steps(toys, tmp_path).items()} == json.loads(GOLDEN.read_text())


def test_planning_touches_nothing(toys: ModuleType, tmp_path: Path) -> None:
    store = tmp_path / "work"
    assert all(why(step) == ["new"] and step.artifact is None for step in steps(toys, store).values())
    assert not store.exists()


def test_an_outline_shows_what_it_cannot_tell_and_all_else(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage whose facts are not at hand has no key, nor has what is made of it; its records still size it."""
    place = built(toys, tmp_path)
    whole = steps(toys, tmp_path)

    few = toys.job(tmp_path)[0].stages["few"]

    def facts(stage: Stage) -> dict[str, Any]:
        if stage == few:
            raise DataError("there is nothing at few")
        return {}

    monkeypatch.setattr(type(few), "facts", facts)
    job, _ = toys.job(tmp_path)
    with pytest.raises(DataError, match="there is nothing at"):
        plan(job, place)
    found = {step.name: step for step in plan(job, place, outline=True)}
    below = job.downstream(["few"])
    assert "few" in below and below != set(found)
    for name, step in found.items():
        known = name not in below
        assert (step.key != UNKNOWN) == (step.artifact is not None) == known, name
        assert not known or step.key == whole[name].key
    assert found["few"].reason.startswith("there is nothing at") and found["total"].reason.startswith("its key follows from ")
    assert found["few"].estimate.written == place.find("few").record.counts.written
    assert plan_table(found.values()).row_count == len(found) and found["few"].to_json()["cached"] is False


def test_a_job_is_sized_as_if_its_source_held_more(toys: ModuleType, tmp_path: Path) -> None:
    """Sources scale with `sources`, what is made of them with what they give, and money is hours times prices."""
    place = built(toys, tmp_path)
    job, _ = toys.job(tmp_path, "prices={cpu_hour: 36.0, storage_gb_month: 1000.0}", "resources={default: {cpus: 2}}")
    few = place.find("few").record
    sized = {step.name: step for step in plan(job, place, sources=300)}
    assert all(step.artifact is None for step in sized.values())
    guess = sized["few"].estimate
    assert (guess.samples, guess.written) == (300, 300) and guess.bytes == few.bytes * 100
    assert guess.seconds == pytest.approx(few.seconds * 100)
    assert guess.cpu_hours == pytest.approx(2 * guess.seconds / 3600) and guess.gpu_hours == 0
    assert guess.money == pytest.approx(guess.cpu_hours * 36) and guess.storage == pytest.approx(few.bytes * 100 / 1e9 * 1000)
    total = place.find("total").record
    assert sized["total"].estimate.seconds == pytest.approx(total.seconds * 100)
    assert size_table(sized.values()).columns[0].footer == "all"
    assert sized["few"].to_json()["expected"]["money"] == guess.money  # type: ignore[index, call-overload]


def test_prices_are_no_part_of_a_key(toys: ModuleType, tmp_path: Path) -> None:
    plain = {name: step.key for name, step in steps(toys, tmp_path).items()}
    assert {name: step.key for name, step in steps(toys, tmp_path, "prices={gpu_hour: 3}").items()} == plain


def test_all_is_cached_after_a_run(toys: ModuleType, tmp_path: Path) -> None:
    built(toys, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert all(step.artifact is not None and step.reason == "" for step in steps(toys, tmp_path).values())
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_miss_names_the_field_and_what_follows_names_the_stage(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(toys, tmp_path)
    found = steps(toys, tmp_path, "total.scale.factor=3", "many.count=6")
    assert why(found["many"]) == ["count: 5 -> 6"]
    assert why(found["total"]) == ["scale.factor: 2.0 -> 3.0", "more: many changed"]
    assert why(found["last"]) == ["start: total changed"]
    assert found["few"].artifact is not None
    more = steps(toys, tmp_path, "other.more=[few]", "last.numbers=many")
    assert why(more["other"]) == [f"more: unset -> few-{found['few'].key}"]
    assert why(more["last"])[0].startswith(f"numbers: few-{found['few'].key} -> many-")
    monkeypatch.setattr(toys.Numbers, "version", 2)
    monkeypatch.setattr(toys.Numbers, "facts", lambda self: {"listing": "b"})
    assert why(steps(toys, tmp_path)["few"]) == ["facts.listing: unset -> b", "version: 1 -> 2"]


def test_the_newest_artifact_is_what_a_miss_is_compared_with(toys: ModuleType, tmp_path: Path) -> None:
    built(toys, tmp_path)
    built(toys, tmp_path, "few.count=4")
    assert why(steps(toys, tmp_path, "few.count=9")["few"]) == ["count: 4 -> 9"]
    assert steps(toys, tmp_path)["few"].artifact is not None, "the older one is still there"


def test_an_unfinished_attempt_is_told(toys: ModuleType, tmp_path: Path) -> None:
    step = steps(toys, tmp_path)["few"]
    step.folder.write_text("parts/0.txt", "0")
    assert steps(toys, tmp_path)["few"].reason.startswith("unfinished")


def test_renaming_a_stage_builds_nothing(toys: ModuleType, tmp_path: Path) -> None:
    built(toys, tmp_path)
    raw = toys.raw_job(tmp_path)
    raw["stages"]["renamed"] = raw["stages"].pop("few")
    raw["stages"]["total"]["numbers"] = raw["stages"]["last"]["numbers"] = "renamed"
    job = toys.parse_job(raw, toys.CATALOG)
    assert all(step.artifact is not None for step in plan(job, Store(toys.Folder(str(tmp_path)))))


def test_expectations_grow_with_the_samples_above(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = built(toys, tmp_path)
    assert steps(toys, tmp_path / "empty")["few"].estimate.seconds is None
    record = store.find("total").record
    monkeypatch.setattr(toys.Numbers, "scales_with", ("count",))
    found = steps(toys, tmp_path, "few.count=30", "many.count=50")
    few, total = found["few"].estimate, found["total"].estimate
    assert (few.samples, few.written) == (30, 30)
    assert total.seconds == pytest.approx(10 * record.seconds) and total.bytes == 10 * record.bytes
    assert found["other"].estimate.seconds == pytest.approx(10 * store.find("other").record.seconds)


def test_a_finished_artifact_with_other_inputs_is_refused(toys: ModuleType, tmp_path: Path) -> None:
    """Somebody built `few` again and it came out otherwise: what was made of it must not pass for up to date."""
    store = built(toys, tmp_path)
    artifact = store.find("few")
    other = artifact.record.model_copy(update={"digest": "f" * 64})
    artifact.folder.write_text("record.json", other.model_dump_json())
    with pytest.raises(StoreError, match=r"was made of few with digest .* --from total --force"):
        steps(toys, tmp_path)


def test_a_plan_for_machines_and_for_people(toys: ModuleType, tmp_path: Path) -> None:
    built(toys, tmp_path)
    found = steps(toys, tmp_path, "few.count=4")
    data: dict[str, Any] = json.loads(json.dumps({name: step.to_json() for name, step in found.items()}))
    assert data["few"]["changes"] == [{"path": "count", "old": 3, "new": 4, "upstream": None}]
    assert data["total"]["inputs"] == {"numbers": "few", "more": ["many"]}
    assert data["many"]["cached"] is True and data["few"]["cached"] is False
    assert plan_table(found.values()).row_count == 5


def test_planning_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; toys = runpy.run_path(sys.argv[1], run_name='toys');"
        "from kinetok.infra.plan import plan; plan(*toys['job'](sys.argv[2]));"
        "assert not {'ray', 'torch', 'mlflow', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).with_name("toys.py")), str(tmp_path)], check=True)


def test_figures_for_people() -> None:
    assert [human_bytes(n) for n in (0, 999, 1500, 2_000_000, 3e12)] == ["0 B", "999 B", "1.5 kB", "2.0 MB", "3.0 TB"]
    assert [human_seconds(n) for n in (0.04, 9.96, 42, 185, 7800)] == ["0.0 s", "10.0 s", "42 s", "3:05 min", "2:10 h"]
