"""A Ray cluster of separate `ray start` processes on this machine: nodes that can be lost without warning and come back, clocks off.

Each node is a process group of its own below one `ray start --block`; losing a node is SIGKILL for all of it, its workers included.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from kinetok.infra.launch import RAY_DEFAULTS

_RAY = str(Path(sys.executable).with_name("ray"))
OBJECT_STORE_BYTES = 80_000_000
HEALTH = {
    # A lost node is noticed in seconds, and a lost head ends its drivers and nodes as quickly: the test cannot wait for minutes.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
ENVIRONMENT = RAY_DEFAULTS | HEALTH | {"OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def build_clock(folder: Path) -> Path | None:
    """The preloaded clock as a shared library; None where there is no compiler."""
    compiler, library = shutil.which("cc"), folder / "clock.so"
    if compiler is None:
        return None
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def skewed(clock: Path | None, seconds: int) -> dict[str, str]:
    """Environment of processes whose clock is `seconds` ahead."""
    return {"LD_PRELOAD": str(clock), "CLOCK_SKEW": str(seconds)} if clock and seconds else {}


def descendants(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def destroy(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL a process and all below it, and wait until it is gone. Asked again because a parent may start one more meanwhile."""
    for _ in range(3):
        for child in descendants(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


class Cluster:
    """A head without CPUs and `nodes` nodes of `cpus` each. `folder` has a short path, because those of Ray's sockets must be."""

    def __init__(self, folder: Path, environment: dict[str, str], *, nodes: int = 2, cpus: int = 2) -> None:
        self.folder, self.environment, self.cpus = folder, environment, cpus
        self.port = free_port()
        self.head: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes] | None] = [None] * nodes
        self.skews = [0] * nodes
        self.clock = build_clock(folder)
        self.starts = 0
        self.logs: dict[int, Path] = {}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start what is not running; the head first, and with a new head everything."""
        if self.head is None or self.head.poll() is not None:
            self.stop()
            self.port = free_port()
            self.head = self._launch(["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"], {})
            self._wait_for_head()
        for number, node in enumerate(self.nodes):
            if node is None or node.poll() is not None:
                self.start_node(number)

    def joined(self) -> bool:
        """Start what is not running, and say whether all nodes have joined: kinetok refuses what a cluster without nodes cannot hold."""
        self.start()
        return all(b"Ray runtime started" in self.logs[node.pid].read_bytes() for node in self.nodes if node is not None)

    def start_node(self, number: int) -> None:
        arguments = [f"--address={self.address}", f"--num-cpus={self.cpus}"]
        self.nodes[number] = self._launch(arguments, skewed(self.clock, self.skews[number]))

    def lose_node(self, number: int) -> None:
        node, self.nodes[number] = self.nodes[number], None
        if node is not None:
            destroy(node)

    def drain(self, number: int, *, seconds: int) -> None:
        """Announce that a node will be taken away, as an autoscaler does on a notice of its cloud."""
        arguments = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "notice", "--deadline-remaining-seconds", str(seconds)]
        command = [_RAY, "drain-node", "--address", self.address, "--node-id", self.node_id(number), *arguments]
        subprocess.run(command, check=True, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL)

    def node_id(self, number: int) -> str:
        """Ray's id of a node, as its raylet's command line says it."""
        node = self.nodes[number]
        assert node is not None
        raylet = next(process for process in descendants(node) if process.name() == "raylet")
        return next(word.removeprefix("--node_id=") for word in raylet.cmdline() if word.startswith("--node_id="))

    def lose_head(self) -> None:
        if self.head is not None:
            destroy(self.head)
        self.head = None

    def stop(self) -> None:
        for number in range(len(self.nodes)):
            self.lose_node(number)
        self.lose_head()

    def workers(self) -> Iterator[psutil.Process]:
        """Processes that run tasks or actors now; Ray titles them `ray::`."""
        for node in self.nodes:
            for process in descendants(node) if node else ():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::") and "IDLE" not in process.cmdline()[0]:
                        yield process

    def _launch(self, arguments: list[str], extra: dict[str, str]) -> "subprocess.Popen[bytes]":
        self.starts += 1
        common = [f"--object-store-memory={OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0", "--block"]
        # A folder of its own, as on a machine of its own: nodes that share one unpack and delete the wheel below each other's feet.
        common += ["--node-ip-address=127.0.0.1", "--disable-usage-stats", f"--temp-dir={self.folder}/{self.starts}"]
        log = self.folder / f"node-{self.starts}.log"
        environment = os.environ | ENVIRONMENT | self.environment | extra
        with log.open("wb") as file:
            command = [_RAY, "start", *arguments, *common]
            started = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        self.logs[started.pid] = log
        return started

    def _wait_for_head(self) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert self.head is not None and self.head.poll() is None, f"the head ended: see {self.folder}"
            time.sleep(0.2)
        raise TimeoutError(f"the head does not listen on {self.port}: see {self.folder}")


def terminate(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
