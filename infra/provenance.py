"""What a record says of the code and the machine that made it: git commit, versions, host.

Nothing here is part of a key. Not covered: the content of uncommitted changes, of which only `+dirty` is told.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

import kinetok
from kinetok.infra.sizing import CPUS

WHEEL = "kinetok.wheel"
COMMIT = "kinetok.commit"
"""Names in the metadata of a Ray job."""
PACKAGES = ("kinetok", "torch", "ray", "deepspeed", "mlflow", "av", "numpy", "pyarrow", "pydantic", "safetensors", "webdataset")


class Submission(NamedTuple):
    """What `kinetok submit` says of the Ray job that this process drives."""

    id: str
    wheel: str
    """File name of the wheel it runs, whose version ends in a digest of the code."""
    commit: str | None
    """Of the checkout that the wheel was made of."""


def submission() -> Submission | None:
    """The Ray job that this process drives, None where `kinetok submit` sent none."""
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return Submission(told["job_submission_id"], told[WHEEL], told.get(COMMIT)) if WHEEL in told else None


class RayJob(NamedTuple):
    """The Ray job that does the work of a run."""

    id: str
    dashboard: str | None
    """Address of the cluster's dashboard, None where it has none."""


def ray_job() -> RayJob:
    """The Ray job of this process, which is connected to a cluster."""
    import ray
    from ray._private.worker import get_dashboard_url

    return RayJob(ray.get_runtime_context().get_job_id(), get_dashboard_url() or None)  # type: ignore[no-untyped-call]


def commit() -> str | None:
    """Git commit of the checkout that this package comes from, `+dirty` appended where it has changes; None outside one."""
    if (sent := submission()) is not None:
        return sent.commit
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _git("rev-parse", "HEAD")
    return head and head + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def environment() -> dict[str, str]:
    """Versions of Python, the platform and the installed packages whose version can change a result."""
    found = {"python": platform.python_version(), "platform": platform.platform(), CPUS: str(os.cpu_count() or 1)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    folder = Path(kinetok.__path__[0])
    try:
        answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
