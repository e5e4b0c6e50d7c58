"""The fuzzer finds what it is there to find, and the readers hold for a few inputs of each sort; `bench/fuzz.py` runs thousands."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    """Imported by name, as its child processes do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("fuzz")


def test_a_seed_makes_the_same_inputs(fuzz: ModuleType) -> None:
    made = [[fuzz.Corpus.of(seed, None).mutate(target) for target in fuzz.TARGETS] for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_outcomes_are_told_apart(fuzz: ModuleType, tmp_path: Path) -> None:
    """What a parser lets through, what takes memory (in a process without a higher peak behind it), what a sound input gives."""
    hungry = "lambda data: str(len(bytearray(80_000_000)))"
    code = f"import fuzz; assert fuzz._measured({hungry}, b'x', fuzz._Lines()).megabytes > 60"
    subprocess.run([sys.executable, "-c", code], cwd=BENCH, check=True)
    lines = fuzz._Lines()
    found = fuzz._measured(lambda data: str(1 // len(data)), b"", lines)
    assert found.kind == "escaped ZeroDivisionError" and found.bad
    run = fuzz._targets(tmp_path)
    assert fuzz._measured(run["tar"], fuzz.pack([("a.mp4", b"x")]), lines).kind == "members"
    assert not fuzz._measured(run["video"], b"", lines).bad


@pytest.mark.slow
def test_a_few_inputs_of_each_sort_hold_in_a_process_with_limits(fuzz: ModuleType) -> None:
    runner = fuzz.Runner(seconds=60, megabytes=1500)
    try:
        tally = fuzz.Tally()
        fuzz.fuzz(range(80), 5, runner, fuzz.Corpus.of(5, None), None, tally)
        assert not tally.found and {target for target, _ in tally.counts} == set(fuzz.TARGETS)
        os.kill(runner._pid, 9)
        assert runner.run("tar", bytes(512)).kind == "died -9"
        assert runner.run("tar", bytes(512)).kind == "DamagedShard", "a new child took its place"
    finally:
        runner.close()
