"""What a Ray cluster can hold, against what the stages of a job ask of it.

Ray lets work that no node can hold wait for ever. Here it is refused before it starts, with what is asked for beside what there is; and
where work waits for room that may come, the stage's progress says so. An autoscaling cluster is judged by the nodes it may add: `ray up`
leaves their kinds in a file on the head. KubeRay's autoscaler tells nobody; there, nothing is refused, and the progress note says what
its autoscaler does. Not covered: how many processes run at once, which is Ray's to decide.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from kinetok.infra.errors import ConfigError
from kinetok.infra.plan import human_bytes
from kinetok.infra.stage import ACCELERATOR, Ask

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the cluster's configuration on the head, for the autoscaler."""
WAITS = "waits for room for"
STATUS_SECONDS = 5
_UNCOUNTED = ("node:", "object_store_memory")


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind: those that are there, or as many as an autoscaler may have."""

    each: Mapping[str, float]
    """Resources of one node, by Ray's names."""
    count: float = 1

    def room(self, ask: Ask) -> float:
        """How many of the processes all of these nodes could hold."""
        return self.count * min((self.each.get(name, 0) // amount for name, amount in ask.each.items()), default=math.inf)


@dataclass(frozen=True)
class Cluster:
    """A cluster's nodes, free or not."""

    present: tuple[Nodes, ...]
    addable: tuple[Nodes, ...] = ()
    """All that an autoscaler may have at once, present ones among them."""
    grows_unseen: bool = False
    """Whether an autoscaler adds nodes of kinds that cannot be known."""

    def total(self, resource: str, *, beside: Mapping[str, float] | None = None) -> float:
        """Amount of a resource over all nodes that also have everything in `beside`."""

        def over(kinds: Iterable[Nodes]) -> float:
            return sum(kind.count * kind.each.get(resource, 0) for kind in kinds if (beside or {}).keys() <= kind.each.keys())

        return max(over(self.present), over(self.addable))

    def share(self, one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        """Whether some node has the resources named in both."""
        return any((one.keys() | other.keys()) <= kind.each.keys() for kind in (*self.present, *self.addable))

    def refusal(self, ask: Ask) -> str | None:
        """Why the cluster can never hold what is asked, None where it can."""
        if self.grows_unseen:
            return None
        room = max(sum(kind.room(ask) for kind in kinds) for kinds in (self.present, self.addable))
        if room >= ask.together:
            return None
        whole = f"{ask.together} x {ask.what} of {_amounts(ask.each)}"
        if room:
            return f"asks for {whole} at once, the whole cluster has room for {room:g}"
        return f"asks for {whole}, which no node can hold: {', '.join(self._beside(ask))}"

    def _beside(self, ask: Ask) -> Iterator[str]:
        """For each resource that is asked for, the most that one node and the whole cluster have."""
        for name in ask.each:
            largest = max((kind.each.get(name, 0) for kind in (*self.present, *self.addable)), default=0)
            most, whole = (human_bytes(n) if name == "memory" else f"{n:g}" for n in (largest, self.total(name)))
            yield f"{name.removeprefix(ACCELERATOR)} {most} on the biggest node and {whole} in the whole cluster"


def look() -> Cluster:
    """The cluster that this process is connected to."""
    import ray
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    present = tuple(Nodes({name: have for name, have in each.items() if not name.startswith(_UNCOUNTED)}) for each in nodes)
    grows = bool(is_autoscaler_v2(fetch_from_server=True, gcs_client=global_worker.gcs_client))  # type: ignore[attr-defined]
    configured = BOOTSTRAP.expanduser()
    addable = tuple(addable_nodes(configured.read_text())) if grows and configured.is_file() else ()
    return Cluster(present, addable, grows_unseen=grows and not addable)


def addable_nodes(configuration: str) -> Iterator[Nodes]:
    """The kinds of nodes of a cluster file, with the most there may be of each."""
    cluster = yaml.safe_load(configuration)
    for name, kind in cluster["available_node_types"].items():
        count = 1 if name == cluster.get("head_node_type") else kind.get("max_workers", cluster.get("max_workers", 0))
        # Their memory is known once one is there.
        yield Nodes({"memory": math.inf, **kind.get("resources", {})}, count)


def require(asks: Mapping[str, Sequence[Ask]]) -> None:
    """Raise ConfigError where the cluster could never hold what one of the stages, by name, asks for."""
    if not any(asks.values()):
        return
    cluster = look()
    refusals = [(name, cluster.refusal(ask)) for name, each in asks.items() for ask in each]
    wrong = [f"{name} {refusal}" for name, refusal in refusals if refusal]
    if wrong:
        raise ConfigError("\n".join([*wrong, "ask for less under resources in the job, or add such nodes to the cluster"]))


def waiting(asks: Iterable[Ask]) -> str:
    """What of the processes asked for finds no room at present, and what an autoscaler does about it; empty where none waits."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.exceptions import RayError

    if not ray.is_initialized():
        return ""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=STATUS_SECONDS)
    except RayError:
        # A note is not worth an error: a head that is gone ends the stage by itself.
        return ""
    demands = status.resource_demands
    bundles = [bundle for one in (*demands.placement_group_demand, *demands.ray_task_actor_demand) for bundle in one.bundles_by_count]
    lacking = [f"{ask.what} of {_amounts(ask.each)}" for ask in asks if any(dict(ask.each) == bundle.bundle for bundle in bundles)]
    if not lacking:
        return ""
    coming = [f"{launch.count} x {launch.ray_node_type_name}" for launch in status.pending_launches]
    coming += [node.ray_node_type_name for node in status.pending_nodes]
    failed = [f"{launch.ray_node_type_name}: {launch.details}" for launch in status.failed_launches]
    about = [f"starting {', '.join(coming)}"] if coming else [f"no node could be had of {'; '.join(failed)}"] if failed else []
    return "; ".join([f"{WAITS} {', '.join(lacking)}", *about])


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(_amount(name, amount) for name, amount in resources.items())


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{human_bytes(amount)} memory"
    return name.removeprefix(ACCELERATOR) if name.startswith(ACCELERATOR) else f"{amount:g} {name}"
