"""`Jobs`: jobs on a Ray cluster through its Jobs API: send one, follow it, ask about it, stop it.

What travels is this package, as its wheel holds it, and the job file, nothing else: no working tree, no environment variables, no
secrets. The driver runs on the cluster's head, as `kinetok run` on the job file, and reads stores and secrets from its nodes' environment.
A submission's id is made of what is sent and a counter, so a request that is sent again after a lost connection finds the job that the
first one started. While waiting, a lost connection is asked for again; nothing that happens here ends the job there but `cancel`.
Not covered: what the driver does (`run.py`), clusters themselves.
"""

import asyncio
import hashlib
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.markup import escape
from rich.table import Table

from kinetok.infra import provenance
from kinetok.infra.errors import ClusterError, ConfigError
from kinetok.infra.plan import human_seconds
from kinetok.infra.wheel import unpacked

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PREFIX = "kinetok-"
JOB_FILE = "job.yaml"
RETRY_SECONDS = 60.0
"""For how long a request is sent again to a head that does not answer."""
LOST_SECONDS = 900.0
"""The same while a job is followed."""
STOP_SECONDS = 300
"""What a cancelled driver has to reach its stages' next safe points."""
POLL_SECONDS = 1.0
REQUEST_SECONDS = 60.0
SILENCE_SECONDS = 120.0
"""A log that is silent for so long is asked for anew: the connection may have been dropped on the way."""
T = TypeVar("T")


@dataclass(frozen=True)
class Parcel:
    """What is sent: a job file, the arguments it is run with, and the code."""

    name: str
    """Of the job."""
    job: bytes
    """Content of the job file."""
    options: tuple[str, ...]
    """Of `kinetok run`."""
    wheel: Path

    @property
    def key(self) -> str:
        """Names all of it, in 12 hex digits."""
        parts = [self.name, hashlib.sha256(self.job).hexdigest(), *self.options, self.wheel.name]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def command(self) -> str:
        """Runs the job in a folder that holds it as `JOB_FILE`."""
        return shlex.join(["python3", "-m", "kinetok.pipelines.cli", "run", JOB_FILE, *self.options])

    @property
    def prefix(self) -> str:
        """What the ids of all its submissions begin with."""
        return f"{PREFIX}{re.sub('[^A-Za-z0-9_]+', '_', self.name)}-{self.key}-"

    def environment(self, folder: Path) -> dict[str, object]:
        """The Ray runtime environment that carries it; `folder` becomes the driver's working folder and holds the job file alone."""
        (folder / JOB_FILE).write_bytes(self.job)
        return {
            "working_dir": str(folder),
            "py_modules": [str(unpacked(self.wheel))],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
        }


class Jobs:
    """The jobs of one cluster, behind the address of its dashboard."""

    def __init__(self, address: str) -> None:
        self.address = address
        _find_token()
        self.client = self._patiently(lambda: _client(address), RETRY_SECONDS)

    def submit(self, parcel: Parcel) -> tuple[str, bool]:
        """The id of the job, and whether it was there already: the same parcel is not run twice at a time."""
        earlier = [job for job in self.all() if (job.submission_id or "").startswith(parcel.prefix)]
        for job in earlier:
            if not job.status.is_terminal():
                return str(job.submission_id), True
        name = f"{parcel.prefix}{1 + max((int(str(job.submission_id).rpartition('-')[2]) for job in earlier), default=0)}"
        with tempfile.TemporaryDirectory(prefix="kinetok-submit-") as aside:
            there = self._patiently(lambda: self._send(name, parcel, Path(aside)), RETRY_SECONDS)
        return name, there

    def _send(self, name: str, parcel: Parcel, aside: Path) -> bool:
        """Send a job under a name; says whether one of that name was there already."""
        commit = provenance.commit()
        try:
            self.client.submit_job(
                entrypoint=parcel.command,
                submission_id=name,
                runtime_env=parcel.environment(aside),
                metadata={provenance.WHEEL: parcel.wheel.name} | ({provenance.COMMIT: commit} if commit else {}),
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                return True
            raise
        return False

    def all(self) -> "list[JobDetails]":
        """Submissions of kinetok's, oldest first."""
        found = self._patiently(self.client.list_jobs, RETRY_SECONDS)
        ours = [job for job in found if (job.submission_id or "").startswith(PREFIX)]
        return sorted(ours, key=lambda job: job.start_time or 0)

    def find(self, start: str) -> str:
        """The id of the one submission that begins with `start`."""
        found = [str(job.submission_id) for job in self.all() if str(job.submission_id).startswith((start, PREFIX + start))]
        if len(found) != 1 and start not in found:
            what = f"{len(found)} submissions begin with {start}: {', '.join(found)}" if found else f"no submission begins with {start}"
            raise ClusterError(f"{what}; `kinetok status --address {self.address}` lists all")
        return start if start in found else found[0]

    def info(self, name: str) -> "JobDetails":
        return self._patiently(lambda: self.client.get_job_info(name), RETRY_SECONDS)

    def logs(self, name: str) -> str:
        """Everything that the driver has printed."""
        return self._patiently(lambda: self.client.get_job_logs(name), RETRY_SECONDS)

    def follow(self, name: str, say: Callable[[str], None], note: Callable[[str], None]) -> bool:
        """Pass on what the driver prints until it has ended; says whether it succeeded. `note` is told of lost connections.

        Each piece is passed on once, however often the connection is lost: the log is read again from its beginning, and what was
        passed on is left out.
        """
        said = 0

        async def tail() -> None:
            nonlocal said
            seen, pieces = 0, aiter(self.client.tail_job_logs(name))
            while (text := await asyncio.wait_for(anext(pieces, None), SILENCE_SECONDS)) is not None:
                seen += len(text)
                if seen > said:
                    say(text[len(text) - (seen - said) :])
                    said = seen

        while True:
            with suppress(TimeoutError):
                self._patiently(lambda: asyncio.run(tail()), LOST_SECONDS, note)
            status = self._patiently(lambda: self.client.get_job_status(name), LOST_SECONDS, note)
            if status.is_terminal():
                return status.value == "SUCCEEDED"
            time.sleep(POLL_SECONDS)

    def cancel(self, name: str) -> bool:
        """Ask the driver to stop at its stages' next safe points; says whether it was running."""
        return self._patiently(lambda: self.client.stop_job(name), RETRY_SECONDS)

    def _patiently(self, ask: Callable[[], T], seconds: float, note: Callable[[str], None] = lambda text: None) -> T:
        """The answer of the head; while it gives none, it is asked again for so long."""
        silent, wait = None, POLL_SECONDS
        while True:
            began = time.monotonic()
            try:
                with _named_errors(self.address):
                    return ask()
            except ConnectionError as error:
                now = time.monotonic()
                if silent is None or now - began > 2 * REQUEST_SECONDS:  # a log that was followed for long had been answered
                    silent, wait = now, POLL_SECONDS
                if now - silent > seconds:
                    raise ClusterError(
                        f"{self.address} does not answer: {error}; a job that was sent goes on without this connection: see to the tunnel "
                        "or the address, then `kinetok status`"
                    ) from error
                if wait == POLL_SECONDS:
                    note(f"{self.address} does not answer; the job goes on there, asking again")
                time.sleep(wait)
                wait = min(2 * wait, 10.0)


def require_shared(store: str) -> None:
    """Raise ConfigError where a store is a folder that only this machine has."""
    if "://" not in store and not Path(store).is_absolute():
        raise ConfigError(
            f"store: {store} is a folder of the machine that runs the job; name one that every node reaches: s3://bucket/prefix, or the "
            "whole path of a shared folder"
        )


def _client(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """With a limit to how long a request may take: a connection that was dropped on the way would be waited for for ever."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, timeout=REQUEST_SECONDS, **options)

    return Client(address)


def _find_token() -> None:
    """Authenticate where a token is known: a cluster without authentication takes no notice."""
    known = (
        any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or Path("~/.ray/auth_token").expanduser().exists()
    )
    os.environ.setdefault("RAY_AUTH_MODE", "token" if known else "disabled")


@contextmanager
def _named_errors(address: str) -> Iterator[None]:
    """What went wrong, told apart: no answer is a ConnectionError, all else a ClusterError with the remedy."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (aiohttp.ClientError, requests.ConnectionError, requests.Timeout) as error:
        raise ConnectionError(_last_line(error)) from error
    except AuthenticationError as error:
        raise ClusterError(
            f"{address} asks for a token that is missing or wrong: put the cluster's into ~/.ray/auth_token or RAY_AUTH_TOKEN, "
            "and leave RAY_AUTH_MODE alone or set it to token"
        ) from error
    except RuntimeError as error:
        status = re.search(r"status code (\d+)", str(error))
        if "WebSocket" in str(error) or (status and int(status[1]) >= 500):
            raise ConnectionError(_last_line(error)) from error
        raise ClusterError(f"{address}: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def submission_table(jobs: "Iterable[JobDetails]") -> Table:
    """Submissions, one row each."""
    table = Table(title="submissions", title_justify="left", header_style="bold")
    for column in ("id", "state", "started", "time", "wheel", "message"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        began = datetime.fromtimestamp(job.start_time / 1000, UTC) if job.start_time else None
        ended = datetime.fromtimestamp(job.end_time / 1000, UTC) if job.end_time else datetime.now(UTC)
        spent = human_seconds((ended - began).total_seconds()) if began else ""
        wheel = (job.metadata or {}).get(provenance.WHEEL, "").removesuffix("-py3-none-any.whl")
        when = f"{began:%Y-%m-%d %H:%M}" if began else ""
        table.add_row(job.submission_id, job.status.value.lower(), when, spent, wheel, escape((job.message or "").strip()))
    return table
