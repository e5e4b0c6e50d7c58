"""Ray clusters of several nodes on this machine, and a line to them that loses connections."""

import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

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
    from ray.cluster_utils import Cluster

    port = free_port()
    common = {"object_store_memory": STORE_BYTES}
    head = {**common, "num_cpus": head_cpus, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    group = Cluster(initialize_head=True, head_node_args=head)
    try:
        for node in nodes:
            custom = {name: amount for name, amount in node.items() if name != "CPU"}
            group.add_node(**common, num_cpus=int(node["CPU"]), resources=custom)
        yield Running(group.address, f"http://127.0.0.1:{port}")
    finally:
        group.shutdown()


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
