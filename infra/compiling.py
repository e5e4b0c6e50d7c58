"""torch.compile where it pays: the parts of models that a stage with `resources.compile` compiles, in place.

A class of modules says with `worth_compiling = True` that most of its model's work is in it and that it comes out as one graph of tensors.
Compiling in place leaves names, weights and digests alone. Nothing is compiled before a part first runs, and once more where a size
of its input first changes; layers of one class and one shape share what was compiled. Results are the same to rounding; dropout draws
other numbers. Not covered: stages that compile nothing (`Stage.compiles`), what fuses over several devices.
"""

import os
import shutil
from collections.abc import Iterable

import torch._functorch.config
from torch import nn

from kinetok.infra.errors import ConfigError

BACKEND = "inductor"
MARK = "worth_compiling"


def compile_parts(models: Iterable[nn.Module]) -> None:
    """Compile what the models hold of such parts; ConfigError where they hold none, or this machine has no C++ compiler."""
    parts = [part for model in models for part in model.modules() if getattr(part, MARK, False)]
    if not parts:
        raise ConfigError("compile: no part of these models is worth compiling, as of those that other people trained; set compile: false")
    compiler = os.environ.get("CXX", "g++")
    if BACKEND == "inductor" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile: torch.compile needs a C++ compiler on every worker, and {compiler} is not on this one: "
            "install it, name another in CXX, or set compile: false"
        )
    # What balances a discriminator's loss walks the graph of the decoder more than once: its buffers must outlive the first walk.
    torch._functorch.config.donated_buffer = False
    for part in parts:
        part.compile(backend=BACKEND)
