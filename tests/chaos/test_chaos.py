"""A job under at least thirty faults ends as the job left alone. A longer run: `python -m tests.chaos.run --faults 200 --seed 7`."""

import tempfile
from pathlib import Path

import pytest
from tests.chaos.run import chaos


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_results_under_thirty_two_faults_are_those_of_the_undisturbed_run() -> None:
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # a short path
        outcome = chaos(Path(folder), faults=32, seed=1)
    assert sum(outcome.faults.values()) == 32
    assert outcome.wrong == []
