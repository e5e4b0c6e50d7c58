"""Ray clusters of several nodes on this machine, and a line to them that loses connections."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import psutil

STORE_BYTES = 80 << 20


@dataclass(frozen=True)
class Running:
    """A cluster under way."""

    address: str
    """Of its head: what `RAY_ADDRESS` wants."""
    dashboard: str
    """URL of its dashboard, where jobs are submitted."""


@contextmanager
def cluster(nodes: Sequence[Mapping[str, float]], *, head_cpus: int = 0) -> Iterator[Running]:
    """A head with its dashboard, and one more node for each entry of `nodes`: its CPUs as `CPU`, and custom resources."""
    from ray._private.services import node_ip_address_from_perspective
    from ray.cluster_utils import Cluster

    port = free_port()
    # Where this process drives a local Ray already, nodes that are not told take its address, 127.0.0.1. Such a head listens there alone,
    # but its agent has Ray's habit of looking for a loopback address at the machine's other one: no submitted job is ever taken.
    every = {"node_ip_address": node_ip_address_from_perspective(), "object_store_memory": STORE_BYTES}
    # Jobs are submitted through the head's agent, whose usual port another cluster of this machine may hold.
    dashboard = {
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": port,
        "dashboard_agent_listen_port": free_port(),
    }
    group = Cluster(initialize_head=True, head_node_args={**every, **dashboard, "num_cpus": head_cpus})
    with ExitStack() as undo:
        folders = [undo.enter_context(_folder()) for _ in nodes]
        undo.callback(group.shutdown)
        for node, own in zip(nodes, folders, strict=True):
            custom = {name: amount for name, amount in node.items() if name != "CPU"}
            group.add_node(num_cpus=int(node["CPU"]), resources=custom, temp_dir=own, **every)
        yield Running(group.address, f"http://127.0.0.1:{port}")


def _folder() -> "tempfile.TemporaryDirectory[str]":
    """A node's own, as on a machine of its own: nodes that share one unpack and delete the wheel below each other's feet.

    Its path is short, because those of Ray's sockets must be.
    """
    return tempfile.TemporaryDirectory(prefix="kn", dir="/tmp", ignore_cleanup_errors=True)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Line:
    """A proxy in front of a port of this machine. It keeps what was sent, and breaks connections as it is told."""

    target: int
    break_after_request: list[bytes] = field(default_factory=list)
    """The next connection whose request begins so is cut once the request has been passed on, before any answer; each once."""
    break_answers: int = 0
    """So many connections whose request asks for a log are cut after their first answer."""
    sent: list[bytes] = field(default_factory=list)
    """Everything that each connection carried towards the target."""
    cut: int = 0
    port: int = 0

    @contextmanager
    def open(self) -> Iterator[str]:
        """The URL of the near end."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
            threading.Thread(target=self._accept, args=(server,), daemon=True).start()
            yield f"http://127.0.0.1:{self.port}"

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = server.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        far = socket.create_connection(("127.0.0.1", self.target))
        number = len(self.sent)
        self.sent.append(b"")
        threading.Thread(target=self._answer, args=(near, far, number), daemon=True).start()
        with suppress(OSError):
            while data := near.recv(1 << 16):
                self.sent[number] += data
                far.sendall(data)
        _close(near, far)

    def _answer(self, near: socket.socket, far: socket.socket, number: int) -> None:
        with suppress(OSError):
            while data := far.recv(1 << 16):
                request = self.sent[number]
                doomed = [start for start in self.break_after_request if request.startswith(start)]
                tailing = re.match(rb"GET \S+/logs/tail", request) is not None and not data.startswith(b"HTTP/1.1 101")
                if doomed:
                    self.break_after_request.remove(doomed[0])
                    self.cut += 1
                    break
                near.sendall(data)
                if tailing and self.break_answers:
                    self.break_answers -= 1
                    self.cut += 1
                    break
        _close(near, far)


def _close(*sockets: socket.socket) -> None:
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


BRIDGE, NETWORK = "kinetok0", "10.77.0"


@contextmanager
def namespaces(nodes: Sequence[Mapping[str, float]]) -> Iterator[Running]:
    """The same as `cluster`, each node in a network namespace of its own, with an address of its own on a bridge of this machine.

    Wants root and iproute2. The store may be any folder: all nodes see it, as they would a network file system.
    """
    places = [f"kinetok{number}" for number in range(1, len(nodes) + 2)]
    with ExitStack() as undo:
        _ip(f"link add {BRIDGE} type bridge")
        undo.callback(_ip, f"link del {BRIDGE}")
        _ip(f"addr add {NETWORK}.254/24 dev {BRIDGE}")
        _ip(f"link set {BRIDGE} up")
        for number, place in enumerate(places, 1):
            _ip(f"netns add {place}")
            undo.callback(_ip, f"netns del {place}")
            _ip(f"link add {place}v type veth peer name eth0 netns {place}")
            _ip(f"link set {place}v master {BRIDGE} up")
            _ip(f"-n {place} addr add {NETWORK}.{number}/24 dev eth0")
            _ip(f"-n {place} link set eth0 up")
            _ip(f"-n {place} link set lo up")
            _ip(f"-n {place} route add default via {NETWORK}.254")
        address = f"{NETWORK}.1"
        head = ["--head", "--port=6379", "--num-cpus=0", f"--dashboard-host={address}"]
        undo.enter_context(_started(places[0], [*head, f"--node-ip-address={address}"]))
        dashboard = f"http://{address}:8265"
        _await(dashboard)
        for number, node in enumerate(nodes, 2):
            custom = json.dumps({name: amount for name, amount in node.items() if name != "CPU"})
            joins = [f"--address={address}:6379", f"--num-cpus={node['CPU']:g}", f"--resources={custom}"]
            undo.enter_context(_started(places[number - 1], [*joins, f"--node-ip-address={NETWORK}.{number}"]))
        yield Running(f"{address}:6379", dashboard)


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@contextmanager
def _started(place: str, options: Sequence[str]) -> Iterator[None]:
    """`ray start` in a namespace, in a folder of its own; its processes are gone afterwards."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--object-store-memory={STORE_BYTES}"]
    # Gloo would take the address that the machine's name leads to, which no namespace has.
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "eth0"}
    with _folder() as folder:
        command = ["ip", "netns", "exec", place, *ray, *options, f"--temp-dir={folder}"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            mine = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait()
            for child in mine:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def _await(url: str) -> None:
    """Wait until something answers there."""
    host, _, port = url.removeprefix("http://").partition(":")
    while True:
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.2)
