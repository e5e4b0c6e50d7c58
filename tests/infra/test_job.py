"""Job files: overrides, merged resources, and every mistake named with its path and the nearest valid name."""

from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from kinetok.infra.config import Config
from kinetok.infra.errors import ConfigError
from kinetok.infra.job import apply_override, find_job, load_job, parse_job
from kinetok.infra.stage import Stage


class Small(Config):
    kind: Literal["small"]
    width: Annotated[int, Field(ge=1)] = 1


class Large(Config):
    kind: Literal["large"]
    depth: int = 1


class Player(Config):
    rate: float


class Model(Stage):
    kind: Literal["model"] = "model"
    net: Annotated[Small | Large, Field(discriminator="kind")]
    players: dict[str, Player] = Field(default_factory=dict)
    layers: tuple[Small, ...] = ()
    limit: float | None = None
    mode: Literal["fast", "exact"] = "fast"


def problems(raw: dict[str, object], catalog: tuple[type[Stage], ...]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_job(raw, catalog)
    return [line.strip() for line in str(caught.value).splitlines()]


def model_problems(**fields: object) -> list[str]:
    return problems({"name": "j", "stages": {"m": {"kind": "model", "net": {"kind": "small"}, **fields}}}, (Model,))


def test_a_job_is_typed(toys: ModuleType, tmp_path: Path) -> None:
    job, _ = toys.job(tmp_path)
    assert isinstance(job.stages["total"], toys.Sum)
    assert job.stages["total"].scale == toys.Scale(factor=2)
    assert job.order() == ("few", "many", "total", "other", "last")
    assert job.downstream(["many"]) == {"many", "total", "other", "last"}
    assert job.resources["few"].cpus == 1


def test_resources_are_the_default_with_the_stages_own_over_it(toys: ModuleType, tmp_path: Path) -> None:
    raw = toys.raw_job(tmp_path)
    raw["resources"] = {"default": {"cpus": 2, "batch_size": 8}, "few": {"cpus": 1}}
    job = parse_job(raw, toys.CATALOG)
    assert (job.resources["few"].cpus, job.resources["few"].batch_size) == (1, 8)
    assert (job.resources["many"].cpus, job.resources["many"].batch_size) == (2, 8)


def test_overrides_set_values_by_path(toys: ModuleType, tmp_path: Path) -> None:
    job, _ = toys.job(
        tmp_path, "few.count=7", "stages.total.scale.factor=0.5", "total.scale.offset=1e-3", "other.more=[few]", "store=s3://b/c"
    )
    assert job.stages["few"].count == 7
    assert job.stages["total"].scale == toys.Scale(factor=0.5, offset=0.001)
    assert job.stages["other"].more == ("few",)
    assert job.store == "s3://b/c"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("few.count", "write it as dotted.path=value"),
        ("few..count=1", "write it as dotted.path=value"),
        ("fwe.count=1", r"no section fwe; "),
        ("stages.fwe.count=1", r"no section stages.fwe \(did you mean few\?\)"),
        ("other.scale.factor=2", r"no section stages.other.scale; .* stages.other.scale=\{...\}"),
        ("few.count.deep=2", r"no section stages.few.count"),
        ("few.count=[", "not YAML"),
    ],
)
def test_an_override_makes_no_section(toys: ModuleType, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_override(toys.raw_job(tmp_path), override)


def test_every_problem_is_told_at_once(toys: ModuleType, tmp_path: Path) -> None:
    raw = toys.raw_job(tmp_path)
    raw["resources"] = {"fwe": {}, "few": {"cpu": 1}}
    raw["trakcing"] = {}
    raw["stages"] |= {
        "few": {"kind": "numbers", "cuont": 3},
        "many": {"kind": "nubmers"},
        "total": {"kind": "sum", "numbers": "few", "scale": {"factor": -1, "ofset": 1}},
        "Last": {"kind": "sum", "numbers": 3},
    }
    found = problems(raw, toys.CATALOG)
    expected = [
        "stages.few.cuont: unknown name (did you mean count?); there are kind, count, bad",
        "stages.many.kind: 'nubmers' is no kind of stage (did you mean numbers?); there are numbers, sum, lossy",
        "stages.total.scale.factor: input should be greater than 0, got -1",
        "stages.total.scale.ofset: unknown name (did you mean offset?); there are factor, offset",
        "stages.Last: a stage's name is lower-case letters, digits and _, and none of default, name, store, tracking, "
        "prices, resources, stages",
        "stages.Last.numbers: input should be a valid string, got 3",
        "resources.fwe: no such stage (did you mean few?)",
    ]
    assert found[: len(expected)] == expected
    assert found[len(expected)].startswith("resources.few.cpu: unknown name (did you mean cpus?)")
    assert found[len(expected) + 1].startswith("trakcing: unknown name (did you mean tracking?)")
    assert len(found) == len(expected) + 2


def test_what_is_asked_of_a_stage_that_cannot_give_it_is_refused(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = toys.raw_job(tmp_path)
    raw["resources"] = {"few": {"compile": True}, "many": {"compile": False}}
    assert problems(raw, toys.CATALOG) == ["resources.few.compile: a stage of kind numbers compiles nothing; leave it out"]
    monkeypatch.setattr(toys.Numbers, "compiles", True)
    assert parse_job(raw, toys.CATALOG).resources["few"].compile
    for other in ({"tile": 64}, {"zero": 3}):
        (problem,) = problems(raw | {"resources": {"few": {"compile": True, **other}}}, toys.CATALOG)
        assert problem.startswith("resources.few: compile: ") and next(iter(other)) in problem.lower().replace("zero: 2", "zero")


def test_paths_hold_no_tags_of_unions() -> None:
    assert model_problems(net={"kind": "small", "widht": 2}) == [
        "stages.m.net.widht: unknown name (did you mean width?); there are kind, width"
    ]
    assert model_problems(net={"kind": "small", "width": 0}) == ["stages.m.net.width: input should be greater than or equal to 1, got 0"]
    assert model_problems(net={"kind": "smal"}) == ["stages.m.net: 'smal' is unknown (did you mean small?); there are small, large"]
    assert model_problems(players={"g": {"rte": 1, "rate": 1}}) == [
        "stages.m.players.g.rte: unknown name (did you mean rate?); there are rate"
    ]
    assert model_problems(players={"g": {}}) == ["stages.m.players.g.rate: is missing"]
    assert model_problems(layers=[{"kind": "small"}, {"kind": "small", "width": "x"}])[0].startswith("stages.m.layers.1.width: ")
    assert model_problems(limit="fast")[0].startswith("stages.m.limit: ")
    assert model_problems(limit=float("nan"))[0].startswith("stages.m.limit: input should be a finite number")
    assert model_problems(mode="slow") == ["stages.m.mode: input should be 'fast' or 'exact', got 'slow'"]


def test_references_must_lead_somewhere_fitting(toys: ModuleType, tmp_path: Path) -> None:
    raw = toys.raw_job(tmp_path)
    raw["stages"] |= {"other": {"kind": "sum", "numbers": "mnay"}, "last": {"kind": "sum", "numbers": "total", "more": ["few", "other"]}}
    assert problems(raw, toys.CATALOG) == [
        "stages.other.numbers: no stage 'mnay' (did you mean many?)",
        "stages.last.numbers: total is a sum stage, needed is numbers; of these the job has few, many",
        "stages.last.more: other is a sum stage, needed is numbers; of these the job has few, many",
    ]


def test_a_cycle_is_refused(toys: ModuleType, tmp_path: Path) -> None:
    raw = toys.raw_job(tmp_path)
    raw["stages"]["total"]["start"] = "last"
    (problem,) = problems(raw, toys.CATALOG)
    assert "is a cycle" in problem and "total" in problem and "last" in problem


@pytest.mark.parametrize("text", ["", "[]", "stages: {}", "name: x\nstages: 3", "a: [", "name: x\nstages: {few: 3}"])
def test_what_is_no_job_is_refused(toys: ModuleType, tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        load_job(path, toys.CATALOG)


def test_yaml_makes_no_objects(toys: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\nstages: {}")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_job(path, toys.CATALOG)


def test_a_stage_given_twice_is_refused(toys: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: x\nstages:\n  few: {kind: numbers}\n  few: {kind: numbers, count: 4}\n")
    with pytest.raises(ConfigError, match=r"'few' is given twice[\s\S]*line 4"):
        load_job(path, toys.CATALOG)


BILLION = "a: &a [x, x]\n" + "".join(f"{chr(n + 1)}: &{chr(n + 1)} [*{chr(n)}, *{chr(n)}]\n" for n in range(97, 121)) + "name: *y\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BILLION, "aliases written out"),
        ("name: &a [*a]", "holds itself"),
        ("name: " + "[" * 5000, "too deeply"),
        ("name: {? [a] : b}", "unhashable"),
        ("name: 2026-13-41", "month"),
        ("name: " + "9" * 5000, "digits"),
        ('name: "\\uD800"', "surrogate"),
    ],
)
def test_bombs_are_refused_in_files_and_in_overrides(toys: ModuleType, tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_job(file, toys.CATALOG)
    with pytest.raises(ConfigError, match=problem):
        apply_override({"name": "a"}, f"name={text.removeprefix('name: ')}")


def test_job_files_are_found_by_path_then_among_the_packaged(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged, here = tmp_path / "packaged", tmp_path / "here"
    packaged.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (packaged / "main.yaml").write_text(yaml.safe_dump(toys.raw_job("work")))
    for text in ("main", "main.yaml", "jobs/main.yaml"):
        assert find_job(text, packaged) == packaged / "main.yaml"
    (here / "main.yaml").write_text("")
    assert find_job("main.yaml", packaged) == Path("main.yaml")
    with pytest.raises(ConfigError, match="no job file"):
        find_job("mine/main.yaml", packaged)
    with pytest.raises(ConfigError, match=r"no job file mian \(did you mean main\?\)"):
        find_job("mian", packaged)
    assert load_job(packaged / "main.yaml", toys.CATALOG, ["few.count=4"]).stages["few"].model_dump()["count"] == 4


def test_names_that_are_no_stages_are_refused(toys: ModuleType, tmp_path: Path) -> None:
    job, _ = toys.job(tmp_path)
    with pytest.raises(ConfigError, match=r"fwe: not a stage of job toy \(did you mean few\?\)"):
        job.require(["few", "fwe"])
