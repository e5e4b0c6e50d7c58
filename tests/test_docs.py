"""README and docs say what the code does: links and module paths resolve, formats name every field, the example stage runs."""

import ast
import json
import re
import subprocess
import types
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from kinetok.infra.artifact import Counts, FileInfo, InputInfo, Record, Store, _State, publish
from kinetok.infra.job import parse_job
from kinetok.infra.job_run import JobRun, StageRun
from kinetok.infra.plan import plan
from kinetok.infra.run import Selection, run
from kinetok.infra.stage import Stage
from kinetok.infra.storage import Folder
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.data import clip_index, sources, token_shards
from kinetok.pipelines.report import tables
from kinetok.tokenizers import catalog
from kinetok.tokenizers.base import DecodeRecipe, TokenSpec

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("infra", "tokenizers", "llm", "pipelines", "tests", "docs", "bench", "src", ".ci")
FORMATS = {
    "record.json": [Record, FileInfo, InputInfo, Counts],
    "lease.json": [_State],
    "Token and feature shards: an `encode` artifact": [TokenSpec, DecodeRecipe],
    "Evaluation: an `evaluate` artifact": [tables.Table, tables.Line, tables.RungCost, tables.Shown],
    "Reconstruction by diffusion: a `reconstruct` artifact": [tables.Carried, tables.Condition, tables.Figure, tables.Strip],
    "Answers: an `understand` artifact": [tables.Answers, tables.AnswerProtocol],
    "Job runs": [JobRun, StageRun],
}
COLUMNS = {
    "Source listing: an `ingest` artifact": [*sources._SHARDS.names, *sources._VIDEOS.names],
    "Clip index: a `clips` artifact": clip_index.SCHEMA.names,
    "Token and feature shards: an `encode` artifact": [*token_shards._INDEX.names, *token_shards._QUARANTINE.names],
}


def test_the_image_path_of_architecture_is_part_of_a_job_and_its_models_fit() -> None:
    """Beside main.yaml's videos and clips; the image model is what the video model takes over."""
    shown = yaml.safe_load(_fences(ROOT / "docs" / "architecture.md", "yaml")[0])
    main = yaml.safe_load((ROOT / "pipelines" / "jobs" / "main.yaml").read_text())
    stages = {name: main["stages"][name] for name in ("scenes", "videos", "clips")} | shown
    job = parse_job({"name": "image", "store": "work", "stages": stages}, STAGES)
    image, video = (job.stages[name].model for name in ("image", "base"))  # type: ignore[attr-defined]
    assert image == video.image
    catalog.build(video, catalog.build(image))


def _fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def _prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"", page.read_text()):
        path = (target[0] or target[1]).partition("#")[0]
        if path and "://" not in path and not path.startswith("mailto:"):
            yield path


def _tracked() -> list[str]:
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    return names.stdout.splitlines()


def _missing(word: str, tracked: list[str]) -> bool:
    """Whether a word between backticks names a file, folder or module of the repository that is not there."""
    if re.fullmatch(rf"kinetok\.({'|'.join(FOLDERS)})(\.\w+)+", word):
        return not _names_something(word.split(".")[1:])
    if not re.fullmatch(r"[\w.][\w./-]*", word):
        return False
    if word.partition("/")[0] in FOLDERS and "/" in word:
        return not (ROOT / word).exists()
    return word.endswith(".py") and word != "__init__.py" and not any(name.rpartition("/")[2] == word for name in tracked)


def _names_something(parts: list[str]) -> bool:
    """Whether `parts` below `kinetok` lead to a folder, a module, or a name that stands at the top of one."""
    for depth in range(1, len(parts) + 1):
        module = ROOT.joinpath(*parts[:depth]).with_suffix(".py")
        if module.is_file():
            return set(parts[depth : depth + 1]) <= _top_names(module)
    return ROOT.joinpath(*parts).is_dir()


def _top_names(module: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    tracked = _tracked()
    dead = [link for link in _links(page) if not (page.parent / link).exists()]
    gone = [word for word in re.findall(r"`([^`\n]+)`", _prose(page)) if _missing(word, tracked)]
    assert not dead and not gone, (dead, gone)


def test_the_check_of_paths_sees_what_is_not_there() -> None:
    wrong = ["infra/nothing.py", "nothing.py", "pipelines/none/", "kinetok.infra.stage.Nothing", "kinetok.infra.nothing"]
    right = [
        "infra/stage.py",
        "order.py",
        "pipelines/data/",
        "kinetok.infra.stage.Stage",
        "kinetok.pipelines.data",
        "kinetok.load",
        "s3://b",
    ]
    assert [word for word in wrong + right if _missing(word, _tracked())] == wrong


def _section(title: str) -> str:
    text = (ROOT / "docs" / "data-formats.md").read_text()
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/data-formats.md has no section {title}"
    return found[1]


@pytest.mark.parametrize("title", sorted(FORMATS.keys() | COLUMNS.keys()))
def test_formats_name_every_field(title: str) -> None:
    fields = [name for model in FORMATS.get(title, []) for name in model.model_fields] + COLUMNS.get(title, [])
    words = set(re.findall(r"`(\w+)`", _section(title)))
    assert set(fields) <= words, sorted(set(fields) - words)


def _example() -> type[Stage]:
    """The stage of docs/adding-a-stage.md, executed as the module it would be."""
    source = next(block for block in _fences(ROOT / "docs" / "adding-a-stage.md", "python") if "(Stage):" in block)
    module = types.ModuleType("tally")
    exec(compile(source, "docs/adding-a-stage.md", "exec"), module.__dict__)
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Stage) and value is not Stage]
    assert len(found) == 1
    return found[0]


def _rows() -> list[Mapping[str, str | float]]:
    splits = ("train", "val", "train")
    return [{"id": f"a/{n}", "split": split, "start": 2.0 * n, "end": 2.0 * n + 2, "decision": "kept"} for n, split in enumerate(splits)]


def test_the_example_stage_runs_in_a_job(tmp_path: Path) -> None:
    """From the page's own YAML, through the engine, on a finished clip index: no Ray."""
    entry: dict[str, object] = yaml.safe_load(_fences(ROOT / "docs" / "adding-a-stage.md", "yaml")[0])
    (tmp_path / "a.tar").touch()
    stages = {
        "videos": {"kind": "ingest", "source": str(tmp_path / "a.tar")},
        "clips": {"kind": "clips", "videos": "videos", "fps": 1, "frames": 2, "height": 8, "width": 8},
        **entry,
    }
    job = parse_job({"name": "docs", "tracking": None, "stages": stages}, (*STAGES, _example()))
    store = Store(Folder(str(tmp_path / "store")))
    clips = next(step for step in plan(job, store) if step.name == "clips")
    clips.folder.write_text("clips.json", json.dumps({"fps": 1.0, "frames": 2, "height": 8, "width": 8, "shard_clips": 4}))
    clips.folder.write_bytes(clip_index.part_name(0), clip_index.part_bytes(_rows()))
    made = Record(kind="clips", name="clips", key=clips.key, version=1, config={}, digest="", started="2026-01-01", seconds=1.0)
    publish(clips.folder, made.model_copy(update={"counts": Counts(input=3, written=3)}))

    state = run(job, store, Selection(only=("tally",)))

    assert state.succeeded, state.stages["tally"].error
    tally = store.find("tally")
    assert json.loads(tally.folder.read_text("tally.json")) == {"clips": 2, "seconds": 4.0}
    assert tally.record.counts == Counts(input=3, written=2, filtered=1)
    assert not list(tally.problems())
