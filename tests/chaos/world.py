"""Everything a job of a cluster stands on, on this machine, to be broken: Ray nodes, an object store, a tracking server, a scratch disk."""

import contextlib
import logging
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer
from tests.chaos.cluster import ENVIRONMENT, Cluster, destroy, free_port, skewed
from tests.faults.s3_proxy import S3Proxy

BUCKET = "chaos"
SCRATCH_BYTES = 400 << 20


class World:
    """Started by `open_world`; `environment` is what drivers and nodes are given."""

    def __init__(self, folder: Path, proxy: S3Proxy, environment: dict[str, str]) -> None:
        self.folder, self.proxy, self.environment = folder, proxy, environment
        self.store = f"s3://{BUCKET}/store"
        self.cluster = Cluster(folder, environment)
        self.tracking_port = free_port()
        self.tracking: subprocess.Popen[bytes] | None = None
        self.scratch = Path(environment["TMPDIR"])
        self.drivers: list[subprocess.Popen[bytes]] = []
        self._looked_at = self._written = 0

    def start(self) -> None:
        """Start whatever is down."""
        self.start_tracking()
        self.cluster.start()

    def start_tracking(self) -> None:
        if self.tracking is not None and self.tracking.poll() is None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.tracking_port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", f"{self.folder}/mlflow"]
        log = (self.folder / "mlflow.log").open("ab")
        self.tracking = subprocess.Popen(
            command, env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, stdout=log, stderr=log, start_new_session=True
        )

    def lose_tracking(self) -> None:
        if self.tracking is not None:
            destroy(self.tracking)

    def tracking_answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.tracking_port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def driver(self, job: Path, skew: int = 0) -> "subprocess.Popen[bytes]":
        """`kinetok run`, joined to the cluster; `skew` seconds ahead."""
        return self.kinetok("run", str(job), skew=skew)

    def kinetok(self, *arguments: str, skew: int = 0) -> "subprocess.Popen[bytes]":
        environment = os.environ | ENVIRONMENT | self.environment | skewed(self.cluster.clock, skew)
        environment |= {"RAY_ADDRESS": self.cluster.address, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.tracking_port}"}
        log = (self.folder / "driver.log").open("ab")
        command = [sys.executable, "-m", "kinetok.pipelines.cli", *arguments]
        self.drivers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        return self.drivers[-1]

    def written(self) -> int:
        """Objects written so far; leases and the states of runs, which are written for as long as anything lasts, do not count."""
        new = self.proxy.seen[self._looked_at :]
        self._looked_at += len(new)
        puts = [seen.request.key for seen in new if seen.request.operation in ("put", "multipart")]
        self._written += sum("/runs/" not in key and not key.endswith(("lease.json", "turn")) for key in puts)
        return self._written

    def fill_scratch(self) -> None:
        """Leave no byte on the scratch disk."""
        with (self.scratch / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * (1 << 20)):
                pass

    def empty_scratch(self) -> None:
        (self.scratch / "ballast").unlink(missing_ok=True)

    def stop(self) -> None:
        """End every process that was started here, and those below it."""
        for driver in self.drivers:
            destroy(driver)
        self.lose_tracking()
        self.cluster.stop()


@contextlib.contextmanager
def open_world(folder: Path) -> Iterator[World]:
    """A world with everything up, and nothing left of it afterwards. Processes of `World.start` included."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with S3Proxy(f"http://{host}:{port}") as proxy, scratch_disk(folder / "scratch") as scratch:
        environment = {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "TMPDIR": str(scratch),
        }
        os.environ.update({name: value for name, value in environment.items() if name != "TMPDIR"})
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        world = World(folder, proxy, environment)
        try:
            world.start()
            wait_until(world.tracking_answers, 120)
            yield world
        finally:
            world.stop()
    server.stop()


@contextlib.contextmanager
def scratch_disk(folder: Path) -> Iterator[Path]:
    """`folder` as a small disk of its own where this process may mount one, else a plain folder, which never fills."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SCRATCH_BYTES}", "tmpfs", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {condition}")
        time.sleep(0.3)
