"""Reads `tests/golden/*.safetensors`: what a model's official code computed from random weights, to compare ours with.

A file holds `state.<official key>`, `in.<name>` and `out.<name>`; its metadata say what made it and how near the numbers must come.
Weights too large to keep follow from a recipe in the metadata. A large file is cut in two, `x.safetensors` and `x.second.safetensors`;
two more, too large for the repository, and what was left out of 09, are read from the folder `shared/golden` beside the checkout, and their
tests skipped without.
"""

import json
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
BESIDE = Path(__file__).parents[2] / "shared" / "golden"


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

    def state(self) -> dict[str, Tensor]:
        """The weights under their official names, from the file or by its recipe."""
        return _by_recipe(self) if "recipe" in self.metadata else self.under("state")

    def check(self, actual: Tensor, expected: str) -> None:
        """Raise AssertionError where `actual` is further from `out.<expected>` than the file allows."""
        torch.testing.assert_close(
            actual, self.tensors[f"out.{expected}"], atol=float(self.metadata["tolerance_abs"]), rtol=1e-5, check_dtype=False
        )


def read(name: str, *, whole: bool = False) -> Golden:
    """The file `name`, without its suffix; `whole` for the one beside the checkout though the repository has most of it."""
    path = FOLDER / f"{name}.safetensors"
    if whole or not path.exists():
        path = BESIDE / path.name
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    second = path.with_suffix(".second.safetensors")
    return Golden(tensors | load_file(second) if second.exists() else tensors, metadata)


def _by_recipe(golden: Golden) -> dict[str, Tensor]:
    """Uniform numbers of the mean and deviation that the recipe names, from a bit stream seeded by the key; checked against `check.*`."""
    state = {}
    for key, (shape, mean, std) in json.loads(golden.metadata["recipe"]).items():
        bits = np.random.PCG64(zlib.crc32((golden.metadata["salt"] + key).encode())).random_raw(prod(shape))
        uniform = (np.atleast_1d(bits) >> np.uint64(11)) * 2.0**-53
        values = np.asarray(mean + std * np.sqrt(3) * (2 * uniform - 1), dtype=np.float32)
        state[key] = torch.from_numpy(values.reshape(shape))
    assert torch.equal(torch.stack([tensor.flatten()[0].double() for tensor in state.values()]), golden.tensors["check.first"].double())
    sums = torch.stack([tensor.double().sum() for tensor in state.values()])
    torch.testing.assert_close(sums, golden.tensors["check.sum"], atol=1e-6, rtol=0)
    return state
