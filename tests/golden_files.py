"""Reads `tests/golden/*.safetensors`: what a model's official code computed from random weights, to compare ours with.

A file holds `state.<official key>`, `in.<name>` and `out.<name>`; its metadata say what made it and how near the numbers must come.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One golden file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors called `<prefix>.<name>`, by name."""
        return {name.removeprefix(f"{prefix}."): tensor for name, tensor in self.tensors.items() if name.startswith(f"{prefix}.")}

    @property
    def constructor(self) -> dict[str, object]:
        """Arguments of the official class, by their official names."""
        arguments: dict[str, object] = json.loads(self.metadata["constructor"])
        return arguments

    def check(self, actual: Tensor, expected: str) -> None:
        """Raise AssertionError where `actual` is further from `out.<expected>` than the file allows."""
        torch.testing.assert_close(
            actual, self.tensors[f"out.{expected}"], atol=float(self.metadata["tolerance_abs"]), rtol=1e-5, check_dtype=False
        )


def read(name: str) -> Golden:
    """The file `name`, without its suffix."""
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        return Golden(load_file(path), file.metadata())
