"""What the shared process of controllers makes of one of Ray Train's; trainings that share it: `test_fit`."""

from typing import Any

import pytest
from ray.train.v2._internal.execution import controller

from kinetok.infra.controllers import Controllers


def test_a_controller_runs_to_its_end_and_tells_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        def __init__(self, **parts: Any) -> None:
            self.parts, self.ran = parts, False

        async def run(self) -> None:
            self.ran = True

        def get_result(self) -> object:
            return self.parts, self.ran

    monkeypatch.setattr(controller, "TrainController", Told)
    assert Controllers().run({"train_fn_ref": 1}) == ({"train_fn_ref": 1}, True)
