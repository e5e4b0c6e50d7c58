"""An engine on a CPU needs no compiler; what engines compute is tested with the loop."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kinetok.infra.engine import EngineSettings, make_engine
from kinetok.infra.fit import PlayerConfig


class Mean(nn.Module):
    """Player whose loss is the mean of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.net(batch["x"]).mean(), {}


def test_nothing_is_compiled_on_a_cpu(process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    engine = make_engine(Mean(), PlayerConfig(lr=0.1), EngineSettings(zero=0, bf16=False, micro_batch=2, accumulation=1))
    before = engine.module.net.weight.detach().clone()
    loss, _ = engine({"x": torch.ones(2, 2)}, 1)
    engine.backward(loss)
    engine.step()
    assert not torch.equal(engine.module.net.weight, before)
    assert not list(tmp_path.iterdir())


def test_a_worker_does_not_wait_for_the_import_of_mlflow() -> None:
    script = """
        import sys

        import torch
        from kinetok.infra.engine import _quiet

        _quiet(torch.device("cpu"))
        assert "deepspeed" in sys.modules and "mlflow" not in sys.modules
        import mlflow  # still there for who wants it
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
