"""The command line: quick to answer, plain errors, exit codes, and the commands that need no more than a toy job."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from kinetok.pipelines import catalog
from kinetok.pipelines.cli import main

TOYS = Path(__file__).parents[1] / "infra" / "toys.py"
HEAVY = ("ray", "torch", "mlflow", "deepspeed", "av", "pyarrow", "numpy", "pydantic", "fsspec", "rich", "yaml")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy job file, with the toy stages in the catalog and the folder as working folder."""
    toys = runpy.run_path(str(TOYS), run_name="toys")
    monkeypatch.setattr(catalog, "STAGES", toys["CATALOG"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KINETOK_STORE", raising=False)
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toys["raw_job"]("work"), sort_keys=False))
    return path


def kinetok(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kinetok.pipelines.cli import main\n"
        "try: main(['--help'])\n"
        f"finally: found = set({HEAVY}) & set(sys.modules); assert not found, found"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    for command in (
        "plan",
        "run",
        "submit",
        "logs",
        "cancel",
        "estimate",
        "budget",
        "status",
        "lineage",
        "verify",
        "quarantine",
        "pack",
        "tokenize",
        "reconstruct",
        "sync",
        "ui",
    ):
        assert f"\n  {command} " in answer.stdout


def test_the_main_job_is_planned_without_ray_and_without_writing(tmp_path: Path) -> None:
    code = (
        "import sys; from kinetok.pipelines.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'ray', 'mlflow', 'deepspeed'} & set(sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, "plan", "main", "--json"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert {step["reason"] for step in json.loads(answer.stdout)} == {"new"}
    assert not list(tmp_path.iterdir())


def test_plan_run_status_verify(job: Path) -> None:
    planned = kinetok("plan", "toy.yaml", "--json")
    assert planned.exit_code == 0 and {step["cached"] for step in json.loads(planned.stdout)} == {False}
    assert "few" in kinetok("plan", "toy.yaml").stdout
    assert not (job.parent / "work").exists()
    ran = kinetok("run", "toy.yaml", "--set", "few.count=4")
    assert ran.exit_code == 0 and ran.stdout.count("done") == 5
    assert kinetok("run", "toy.yaml", "--set", "few.count=4", "--from", "total").stdout.count("cached") == 2
    assert "few.count" not in (status := kinetok("status").stdout) and status.count("cached") == 2
    assert kinetok("verify", "--all").exit_code == 0
    next((job.parent / "work" / "sum").glob("total-*/sum.txt")).write_text("7")
    broken = kinetok("verify", "total")
    assert broken.exit_code == 1 and "sum.txt: 1 bytes, the record says 4" in broken.stdout
    assert kinetok("verify", "few").exit_code == 0
    assert kinetok("verify").exit_code == 2


def test_another_store_may_be_named(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kinetok("run", "toy.yaml", "--store", "elsewhere").exit_code == 0
    assert sorted(path.name for path in job.parent.iterdir()) == ["elsewhere", "toy.yaml"]
    monkeypatch.setenv("KINETOK_STORE", "elsewhere")
    assert "total" in kinetok("status").stdout


def test_a_failed_run_exits_with_one_and_shows_the_whole_error(job: Path) -> None:
    raw = yaml.safe_load(job.read_text())
    raw["stages"] = {"lossy": {"kind": "lossy"}}
    job.write_text(yaml.safe_dump(raw))
    failed = kinetok("run", "toy.yaml")
    assert failed.exit_code == 1
    assert "lossy: the lossy stage lossy lost or doubled samples" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "tpy.yaml"), "no job file tpy.yaml"),
        (("plan", "toy.yaml", "--set", "few.cuont=3"), "stages.few.cuont: unknown name (did you mean count?)"),
        (("run", "toy.yaml", "--only", "fwe"), "did you mean few?"),
        (("verify", "few"), "it holds nothing yet"),
        (("run", "toy.yaml", "--store", "toy.yaml/work"), "cannot write"),
    ],
)
def test_errors_are_plain(job: Path, arguments: tuple[str, ...], message: str) -> None:
    answer = kinetok(*arguments)
    assert answer.exit_code == 1
    assert answer.stderr.startswith("error: ") and message in answer.stderr and "Traceback" not in answer.output
