"""The repository's own rules, checked by reading the code: floors, sizes, one training loop, shared namespaces."""

import ast
import itertools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("infra", "tokenizers", "llm", "pipelines")
FORBIDDEN = {
    "infra": ("kinetok.tokenizers", "kinetok.llm", "kinetok.pipelines"),
    "tokenizers": ("kinetok.infra", "kinetok.llm", "kinetok.pipelines", "ray", "deepspeed", "mlflow", "av"),
    "llm": ("kinetok.infra", "kinetok.pipelines", "ray", "deepspeed", "mlflow", "av"),
    "pipelines": (),
}
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_floors_hold(path: Path) -> None:
    forbidden = FORBIDDEN[path.relative_to(ROOT).parts[0]]
    wrong = {name for name in _imports(ast.parse(path.read_text())) for floor in forbidden if name == floor or name.startswith(floor + ".")}
    assert not wrong, f"{_id(path)} imports {wrong}"


def test_tokenizer_families_share_what_the_docs_say() -> None:
    families = ("causal", "pretrained", "divot")
    found = {}
    for family, other in itertools.permutations(families, 2):
        start = f"kinetok.tokenizers.{other}."
        paths = (ROOT / "tokenizers" / family).glob("*.py")
        if used := {name.removeprefix(start) for path in paths for name in _imports(ast.parse(path.read_text())) if name.startswith(start)}:
            found[family, other] = used
    shared = {
        ("pretrained", "causal"): {"layers", "posterior", "rung"},
        ("divot", "causal"): {"training"},
        ("divot", "pretrained"): {"base"},
    }
    assert found == shared


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_files_and_functions_stay_small_and_explain_themselves(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is, why, and what it does not cover"
    assert len(text.splitlines()) <= 500
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 80
    ]
    assert not long, long


def test_tokenizers_never_becomes_a_package_at_the_root() -> None:
    """An `__init__.py` there would hide Hugging Face's `tokenizers` from everything started in the repository root."""
    for folder in ("tokenizers", "tests/tokenizers", "infra", "llm", "pipelines"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


def test_one_training_loop() -> None:
    """`backward` and optimizer steps stand in infra/ alone, in one module."""
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
                found.add(_id(path))
    assert len(found) <= 1 and all(name.startswith("infra/") for name in found), found


def test_nothing_from_outside_is_unpickled() -> None:
    wrong = [_id(path) for path in MODULES for bad in ("allow_pickle=True", "pickle.load", "yaml.load(") if bad in path.read_text()]
    assert not wrong, wrong


def test_no_large_files() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    sizes = {name: (ROOT / name).stat().st_size for name in tracked if name and (ROOT / name).is_file()}
    assert not {name for name, size in sizes.items() if size > 1_500_000}
    assert sum(size for name, size in sizes.items() if name.startswith("pipelines/data/embedded/")) <= 6_000_000
