"""Parts of models that say they are worth compiling are compiled in place, and nothing else is."""

import shutil
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kinetok.infra import compiling
from kinetok.infra.compiling import compile_parts
from kinetok.infra.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile hides it by itself


class Part(nn.Module):
    """What is worth compiling."""

    worth_compiling: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Those that are compiled from now on; a "compiler" that leaves them as they are."""
    torch._dynamo.reset()
    seen: list[GraphModule] = []

    def backend(graph: GraphModule, _: object) -> GraphModule:
        seen.append(graph)
        return graph

    monkeypatch.setattr(compiling, "BACKEND", backend)
    return seen


def test_parts_are_compiled_in_place_and_share_what_was_compiled(graphs: list[GraphModule]) -> None:
    model = nn.Sequential(Part(), nn.Linear(4, 4), Part())
    x, names = torch.randn(3, 4, requires_grad=True), list(model.state_dict())
    expected = model(x)
    compile_parts([model])
    assert torch.equal(model(x), expected) and list(model.state_dict()) == names
    assert len(graphs) == 1, "two parts of one class and one shape"
    nn.Sequential(Part())(x)
    assert len(graphs) == 1, "another model of that class is left alone"


def test_models_without_such_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no part of these models is worth compiling.* set compile: false"):
        compile_parts([nn.Linear(4, 4)])


def test_a_worker_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no-such-compiler is not on this one: install it, name another in CXX, or set compile: false"):
        compile_parts([Part()])
    monkeypatch.setenv("CXX", "sh")
    assert shutil.which("sh")
    compile_parts([Part()])
