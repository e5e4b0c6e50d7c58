"""A toy job, and an object store on this machine."""

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


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """URL of a bucket on a server of moto's, with the environment that leads there."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="toys")
        yield "s3://toys"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder, on the local disk and on the object store."""
    if request.param == "local":
        return Folder(str(tmp_path / "folder"))
    return Folder(f"{request.getfixturevalue('object_store')}/{tmp_path.name}")
