"""A toy job, and folders on a disk and on an object store."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kinetok.infra.storage import Folder

TOYS = Path(__file__).with_name("toys.py")


@pytest.fixture
def toys() -> Iterator[ModuleType]:
    """The module `toys.py`, fresh."""
    spec = importlib.util.spec_from_file_location("toys", TOYS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toys"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["toys"]


@pytest.fixture(autouse=True)
def plain_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 replaces `torch.nn.functional.linear` for the whole process; other tests get torch's own back."""
    import torch.nn.functional as F

    linear = F.linear
    yield
    F.linear = linear


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder, on the local disk and on the object store."""
    if request.param == "local":
        return Folder(str(tmp_path / "folder"))
    return Folder(f"{request.getfixturevalue('object_store')}/{tmp_path.name}")
