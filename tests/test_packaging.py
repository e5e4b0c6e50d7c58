"""The package as users get it: what the wheel holds, and that the folder `tokenizers/` never hides Hugging Face's package.

The same inside a Ray job with a working_dir: `infra/test_launch.py`.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("infra", "llm", "pipelines", "tokenizers")


def _tracked(*folders: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return set(listed.split())


def test_wheel_holds_exactly_the_tracked_files_of_the_four_folders(tmp_path: Path) -> None:
    from kinetok.infra.wheel import build_wheel

    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as box:
        names = {name.removeprefix("kinetok/") for name in box.namelist() if name.startswith("kinetok/")}
        assert {"__init__.py", "py.typed"} <= names
        links = [info.filename for info in box.infolist() if (info.external_attr >> 28) == 0xA]
    assert not links, "symlinks in a wheel point nowhere once installed"
    suffixes = {".py", ".yaml", ".html", ".csv", ".mp4", ".md", ".jsonl", ".css", ".js"}
    expected = {name for name in _tracked(*FOLDERS) if Path(name).suffix in suffixes and not name.startswith("infra/cluster/")}
    assert {name for name in names if name.startswith(FOLDERS) and not name.startswith("infra/cluster/")} == expected


WHOSE = "import tokenizers, transformers; assert 'site-packages' in tokenizers.__file__, tokenizers.__file__"


def test_hugging_face_tokenizers_is_not_shadowed_at_the_root() -> None:
    subprocess.run([sys.executable, "-c", WHOSE], cwd=ROOT, check=True)
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {WHOSE}; import kinetok.tokenizers.base"], cwd=ROOT, check=True
    )


def test_hugging_face_tokenizers_is_not_shadowed_under_pytest() -> None:
    import tokenizers

    assert tokenizers.__file__ is not None and "site-packages" in tokenizers.__file__


def test_help_imports_nothing_heavy() -> None:
    """The command line answers at once: no torch, Ray, MLflow, DeepSpeed or PyAV behind `--help`."""
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom kinetok.pipelines.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'deepspeed', 'av', 'pandas', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
