"""docs/official-modules.md: its blocks load the golden files and give their numbers, its tables name every argument and the tolerances."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import golden_files

PAGE = Path(__file__).parents[1] / "docs" / "official-modules.md"
SECTIONS = {
    title.strip("`"): text for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
}
OUTPUTS = {
    "05_unet": "T4_c125.y",
    "05b_spatial_transformer": "y_c125",
    "10_projections": "input",
    "11_divot_llm": None,
    "14_autoencoder": "decoded",
}
"""What the block of a file computes, where it is not `y`; None where it loads alone."""
ALIKE = {"05d_temporal_transformer_conv1d": "05c_temporal_transformer", "05e_unet_full_topology": "05_unet"}
"""Files of the module of another section."""
WHOLE = ("mistral", "ids", "lossconfig")
"""Arguments that the page takes as one."""
FILES = [title for title in SECTIONS if re.match(r"\d\d", title)]


def block(title: str) -> str:
    """The code of a section."""
    found = re.search(r"^```python\n(.*?)^```", SECTIONS[title], re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE.name} has no code under {title}"
    return found[1]


def names(arguments: dict[str, Any]) -> set[str]:
    """Of arguments, and of those inside them."""
    inside = [names(value) for name, value in arguments.items() if isinstance(value, dict) and name not in WHOLE]
    return set(arguments).union(*inside)


@pytest.mark.parametrize("file", [*FILES, *ALIKE])
def test_blocks_load_official_weights_and_give_official_numbers(file: str) -> None:
    golden = golden_files.read(file)
    title = ALIKE.get(file, file)
    case = OUTPUTS.get(title, "y")
    prefix = f"in.{case.rpartition('.')[0]}" if case and "." in case else "in"
    scope: dict[str, Any] = {"c": golden.constructor, "state": golden.state(), "given": golden.under(prefix)}
    scope["frames"] = int(golden.metadata.get("frames", 0))
    with torch.no_grad():
        exec(compile(block("Imports of the blocks") + block(title), str(PAGE), "exec"), scope)
    assert scope["report"].loaded == len(scope["state"])
    if case:
        golden.check(scope["y"], case)


@pytest.mark.parametrize("file", [*FILES, *ALIKE])
def test_tables_name_every_official_argument(file: str) -> None:
    section = SECTIONS[ALIKE.get(file, file)]
    official = {name for row in section.splitlines() if row.startswith("|") for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    arguments = names(golden_files.read(file).constructor)
    assert arguments <= official, arguments - official


def test_tolerances_are_those_of_the_files() -> None:
    rows = [line.split("|")[1:4] for line in SECTIONS["What is compared"].splitlines() if line.startswith("| `")]
    stated = {name.strip().strip("`"): float(tolerance) for name, _, tolerance in rows}
    files = {path.name.split(".")[0] for path in golden_files.FOLDER.glob("*.safetensors")}
    assert files <= set(stated)
    assert {name: float(golden_files.read(name).metadata["tolerance_abs"]) for name in files} == {name: stated[name] for name in files}


def test_tests_that_are_named_exist() -> None:
    text = "".join(path.read_text() for path in (PAGE.parents[1] / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert named and not {name for name in named if f"def {name}(" not in text}
