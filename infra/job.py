"""`Job`: a job file as typed data, read with dotted overrides and checked whole before anything starts.

The file is YAML, read safely. Each entry of `stages` becomes the Stage class its `kind` names; `resources` are merged from
`default` and the stage's own entry. All problems are gathered and raised as one ConfigError, each with its path in the file and the
nearest valid name. Not covered: what would run and why (`plan.py`), running (`run.py`).
"""

import difflib
import graphlib
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, TypeAlias, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError
from pydantic_core import ErrorDetails

from kinetok.infra.config import Config
from kinetok.infra.errors import ConfigError
from kinetok.infra.secrets import where_secret
from kinetok.infra.sizing import Prices
from kinetok.infra.stage import Resources, Stage

Raw: TypeAlias = dict[str, object]
Model = TypeVar("Model", bound=BaseModel)

DEFAULT = "default"
MAX_VALUES = 100_000
"""Of a job file. Aliases of aliases can stand for more values than there are atoms; the first error message would print them."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SECRET = (
    "holds a password, a token or a signed address, which records and MLflow would show to everybody: "
    "give it in the environment (AWS_*, MLFLOW_TRACKING_URI, MLFLOW_TRACKING_PASSWORD, HF_TOKEN)"
)


class Tracking(Config):
    """Where MLflow is told what happened."""

    uri: str | None = None
    """None: `MLFLOW_TRACKING_URI`, else a SQLite file in a local store."""
    experiment: str = "kinetok"


class Job(Config):
    """Stages that refer to each other by name, and where they run and are kept."""

    name: str
    store: str = "work"
    """Folder (relative to the working folder) or s3:// prefix of all artifacts."""
    tracking: Tracking | None = Tracking()
    """None: nothing is told to MLflow until `kinetok sync`."""
    prices: Prices | None = None
    """What `kinetok plan` reckons with."""
    resources: dict[str, Resources] = Field(default_factory=dict)
    """Of every stage, defaults filled in."""
    stages: dict[str, SerializeAsAny[Stage]]

    def order(self) -> tuple[str, ...]:
        """Stage names, inputs before what is made of them, otherwise as in the file."""
        return tuple(_sorted({name: [ref for _, ref in stage.refs()] for name, stage in self.stages.items()}))

    def downstream(self, roots: Iterable[str]) -> set[str]:
        """The stages `roots` and all that are made of them."""
        found = set(roots)
        for name in self.order():
            if any(ref in found for _, ref in self.stages[name].refs()):
                found.add(name)
        return found

    def require(self, names: Iterable[str]) -> None:
        """Raise ConfigError unless every name is a stage of this job."""
        wrong = [f"{name}: not a stage of job {self.name}{nearest(name, self.stages)}" for name in names if name not in self.stages]
        if wrong:
            raise ConfigError("\n".join(wrong))


def find_job(where: str, packaged: Path) -> Path:
    """The job file at the path `where`, else the one of that name in the folder `packaged` (`main`, `main.yaml`, `jobs/main.yaml`)."""
    given = Path(where)
    brought = [packaged / given.name, packaged / f"{given.name}.yaml"] if given.parent.name in ("", "jobs") else []
    for path in (given, *brought):
        if path.is_file():
            return path
    known = sorted(path.stem for path in packaged.glob("*.yaml"))
    raise ConfigError(
        f"no job file {where}{nearest(given.stem, known)}; it is neither a path from here nor one of {', '.join(known) or 'none'}"
    )


def load_job(path: Path, catalog: Sequence[type[Stage]], overrides: Sequence[str] = ()) -> Job:
    """Read, override and check a job file; raises ConfigError with every problem found."""
    try:
        raw = read_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must be a mapping with name and stages, it is {type(raw).__name__}")
    for override in overrides:
        apply_override(raw, override)
    try:
        return parse_job(raw, catalog)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error


def apply_override(raw: Raw, override: str) -> None:
    """Set one `dotted.path=value` in place; the value is YAML. A path that begins with a stage's name begins below `stages`."""
    dotted, equals, text = override.partition("=")
    path = dotted.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"override {override!r}: write it as dotted.path=value")
    stages = raw.get("stages")
    if path[0] not in Job.model_fields and isinstance(stages, dict) and path[0] in stages:
        path = ["stages", *path]
    section: object = raw
    for depth, name in enumerate(path[:-1]):
        if not isinstance(section, dict) or not isinstance(section.get(name), dict):
            known = section if isinstance(section, dict) else ()
            raise ConfigError(
                f"override {override!r}: the job file has no section {'.'.join(path[: depth + 1])}{nearest(name, known)}; "
                f"an override sets one value of a section that is there, or a whole one: {'.'.join(path[: depth + 1])}={{...}}"
            )
        section = section[name]
    assert isinstance(section, dict)
    try:
        section[path[-1]] = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML ({error})") from error


def parse_job(raw: Raw, catalog: Sequence[type[Stage]]) -> Job:
    """`raw` as a Job; raises ConfigError listing every problem."""
    reader = _Reader({_kind(stage): stage for stage in catalog})
    stages = reader.stages(raw.get("stages"))
    resources = reader.resources(raw.get("resources"), list(stages))
    reader.problems += [f"{path}: {_SECRET}" for path in dict.fromkeys(where_secret(raw))]
    top = {name: value for name, value in raw.items() if name not in ("stages", "resources")}
    head = reader.model(Job, {**top, "stages": {}}, "")
    if not reader.problems:
        sound = {name: stage for name, stage in stages.items() if stage is not None}
        able = {name: found for name, found in resources.items() if found is not None}
        reader.problems += _wiring(sound) or _of_stages(sound, able)
    if reader.problems or head is None:
        raise ConfigError("\n".join(f"  {problem}" for problem in reader.problems))
    return head.model_copy(update={"stages": stages, "resources": resources})


@dataclass
class _Reader:
    """Turns sections into models and gathers what is wrong with them."""

    classes: Mapping[str, type[Stage]]
    problems: list[str] = field(default_factory=list)

    def stages(self, raw: object) -> dict[str, Stage | None]:
        if not isinstance(raw, dict) or not raw:
            self.problems.append("stages: at least one stage is needed, as a mapping of name to {kind: ...}")
            return {}
        return {str(name): self._stage(str(name), value) for name, value in raw.items()}

    def resources(self, raw: object, stages: Sequence[str]) -> dict[str, Resources | None]:
        """Each stage's resources: its own entries over those of `default`."""
        given = self._mapping(raw, "resources")
        for name in given:
            if name != DEFAULT and name not in stages:
                self.problems.append(f"resources.{name}: no such stage{nearest(name, [DEFAULT, *stages])}")
        entries = {name: self._mapping(value, f"resources.{name}") for name, value in given.items()}
        default = entries.get(DEFAULT, {})
        if self.model(Resources, default, f"resources.{DEFAULT}") is None:
            return {}
        return {name: self.model(Resources, {**default, **entries.get(name, {})}, f"resources.{name}") for name in stages}

    def model(self, cls: type[Model], raw: Raw, where: str) -> Model | None:
        """`raw` as a `cls`, or None with the problems noted below the path `where`."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            self.problems += [_sentence(detail, cls, raw, where) for detail in error.errors()]
            return None

    def _stage(self, name: str, raw: object) -> Stage | None:
        where = f"stages.{name}"
        if not _NAME.fullmatch(name) or name in (DEFAULT, *Job.model_fields):
            self.problems.append(
                f"{where}: a stage's name is lower-case letters, digits and _, and none of {DEFAULT}, {', '.join(Job.model_fields)}"
            )
        entries = self._mapping(raw, where)
        kind = entries.get("kind")
        if not isinstance(kind, str) or kind not in self.classes:
            self.problems.append(
                f"{where}.kind: {kind!r} is no kind of stage{nearest(str(kind), self.classes)}; there are {', '.join(self.classes)}"
            )
            return None
        return self.model(self.classes[kind], entries, where)

    def _mapping(self, raw: object, where: str) -> Raw:
        if raw is None:
            return {}
        if not isinstance(raw, dict):
            self.problems.append(f"{where}: must be a mapping, it is {raw!r}")
            return {}
        return {str(name): value for name, value in raw.items()}


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no known name is close."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def read_yaml(text: str) -> object:
    """The one document of `text`, read safely; raises yaml.YAMLError, also on what would take time or memory without bound."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _values(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError) as error:
        # Of PyYAML itself: a date in month 13, a number of thousands of digits, a list as a name.
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """`safe_load` that refuses a name given twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for name, _ in node.value:
            if name.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name.value!r} is given twice", name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


def _values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values below a node with every alias written out, as whoever walks the document meets them."""
    if isinstance(node, yaml.ScalarNode):
        node.value.encode()  # half of a surrogate pair, which no file can hold, raises UnicodeEncodeError
        return 1
    if id(node) not in known:
        known[id(node)] = None
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    found = known[id(node)]
    if found is None or found > MAX_VALUES:
        what = "an alias that holds itself" if found is None else f"more than {MAX_VALUES} values, aliases written out"
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
    return found


def _kind(stage: type[Stage]) -> str:
    return str(get_args(stage.model_fields["kind"].annotation)[0])


def _wiring(stages: Mapping[str, Stage]) -> list[str]:
    """What is wrong with the references between stages."""
    problems = []
    for name, stage in stages.items():
        accepted = stage.ref_fields()
        for field_name, ref in stage.refs():
            where, produces = f"stages.{name}.{field_name}", accepted[field_name]
            if ref not in stages:
                problems.append(f"{where}: no stage {str(ref)!r}{nearest(ref, stages)}")
            elif produces is not None and stages[ref].kind not in produces.kinds:
                able = ", ".join(other for other in stages if stages[other].kind in produces.kinds) or "none"
                needed = " or ".join(produces.kinds)
                problems.append(f"{where}: {ref} is a {stages[ref].kind} stage, needed is {needed}; of these the job has {able}")
    if not problems:
        try:
            _sorted({name: [ref for _, ref in stage.refs()] for name, stage in stages.items()})
        except graphlib.CycleError as error:
            problems.append(f"stages: {' <- '.join(error.args[1])} is a cycle; a stage cannot be made of itself")
    return problems


def _of_stages(stages: Mapping[str, Stage], resources: Mapping[str, Resources]) -> list[str]:
    """What the stages themselves find wrong, and what is asked of those that cannot give it."""
    idle = [
        f"resources.{name}.compile: a stage of kind {stage.kind} compiles nothing; leave it out"
        for name, stage in stages.items()
        if resources[name].compile and not stage.compiles
    ]
    return idle + [f"stages.{name}.{problem}" for name, stage in stages.items() for problem in stage.problems(resources[name], stages)]


def _sorted(graph: Mapping[str, Sequence[str]]) -> list[str]:
    """Topological order that keeps the file's order where it may; raises graphlib.CycleError."""
    sorter = graphlib.TopologicalSorter(graph)
    sorter.prepare()
    place = {name: index for index, name in enumerate(graph)}
    ready: list[str] = []
    order: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=place.__getitem__)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return order


def _sentence(detail: ErrorDetails, cls: type[BaseModel], raw: Raw, where: str) -> str:
    """One pydantic error as `path: what is wrong (did you mean ...?)`."""
    path, known = _locate(detail, cls, raw)
    dotted = ".".join([*([where] if where else []), *path])
    match detail["type"]:
        case "extra_forbidden":
            return f"{dotted}: unknown name{nearest(path[-1], known)}; there are {', '.join(known)}"
        case "missing":
            return f"{dotted}: is missing"
        case "union_tag_invalid":
            tags = re.findall(r"'([^']+)'", str(detail["ctx"]["expected_tags"]))
            return f"{dotted}: {detail['ctx']['tag']!r} is unknown{nearest(str(detail['ctx']['tag']), tags)}; there are {', '.join(tags)}"
        case "value_error":
            return f"{dotted}: {detail['ctx']['error']}"
    return f"{dotted}: {detail['msg'][:1].lower()}{detail['msg'][1:]}, got {detail['input']!r}"


def _locate(detail: ErrorDetails, cls: type[BaseModel], raw: Raw) -> tuple[list[str], list[str]]:
    """The path of an error in the file, without the tags that pydantic adds for unions, and the names valid beside its last part."""
    path: list[str] = []
    known: list[str] = []
    annotation: object = cls
    here: object = raw
    for index, part in enumerate(detail["loc"]):
        inside = (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int))
        absent = index == len(detail["loc"]) - 1 and detail["type"] == "missing"
        if inside or absent:
            path.append(str(part))
            annotation, known = _entry(annotation, here, str(part))
            here = here[part] if inside else None  # type: ignore[index]
    return path, known


def _entry(annotation: object, raw: object, name: str) -> tuple[object, list[str]]:
    """The annotation of entry `name` of something annotated so, and all names valid in its place."""
    choices = list(_choices(annotation))
    kind = raw.get("kind") if isinstance(raw, dict) else None
    models = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
    models.sort(key=lambda model: "kind" in model.model_fields and kind in get_args(model.model_fields["kind"].annotation), reverse=True)
    if models:
        fields = models[0].model_fields
        return (fields[name].annotation if name in fields else None), list(fields)
    containers = [choice for choice in choices if get_origin(choice) in (dict, list, tuple)]
    return (next(reversed([a for a in get_args(containers[0]) if a is not ...])) if containers else None), []


def _choices(annotation: object) -> Iterator[object]:
    """The alternatives of a union, each free of Annotated."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _choices(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for choice in get_args(annotation):
            yield from _choices(choice)
    else:
        yield annotation
