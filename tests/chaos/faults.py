"""What goes wrong in a chaos run, and when: a seeded plan of faults, each of which strikes a `World` and may say what repairs it later."""

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import psutil
from tests.chaos.cluster import skewed
from tests.chaos.world import World
from tests.faults import s3_proxy

Repair: TypeAlias = tuple[float, Callable[[], None]]
"""What makes it good again, and after how many seconds."""


@dataclass
class Target:
    """What a fault may strike: the world, and the driver at work in it."""

    world: World
    driver: "subprocess.Popen[bytes]"
    random: random.Random
    next_skew: int = 0
    """Seconds that the clock of the next driver is ahead."""


@dataclass(frozen=True)
class Struck:
    """That a fault really happened, to what, and how it is undone; a fault that found no victim is drawn again."""

    what: str
    repair: Repair | None = None


def lose_driver(at: Target) -> Struck:
    """SIGKILL: the machine of the driver is gone."""
    os.kill(at.driver.pid, signal.SIGKILL)
    return Struck("SIGKILL")


def stop_driver(at: Target) -> Struck:
    """SIGTERM, as an operator, a job queue or a preempted machine does."""
    os.kill(at.driver.pid, signal.SIGTERM)
    return Struck("SIGTERM")


def lose_head(at: Target) -> Struck:
    """The head with all that Ray knows; the cluster must be started anew, and the driver with it."""
    at.world.cluster.lose_head()
    return Struck("head and its store of states")


def lose_node(at: Target) -> Struck | None:
    """A node with every process on it; it comes back empty."""
    cluster, number = at.world.cluster, at.random.randrange(len(at.world.cluster.nodes))
    if cluster.nodes[number] is None:
        return None
    cluster.lose_node(number)
    return Struck(f"node {number}", (at.random.uniform(2, 6), cluster.start))


def replace_node(at: Target) -> Struck | None:
    """A node is replaced by one whose clock is off by minutes."""
    struck = lose_node(at) if at.world.cluster.clock else None
    if struck is None:
        return None
    number, skew = int(struck.what.split()[1]), at.random.choice([-600, -90, 90, 600])
    at.world.cluster.skews[number] = skew
    return Struck(f"node {number} is {skew:+d} s off", struck.repair)


def skew_driver(at: Target) -> Struck | None:
    """The driver moves to a machine whose clock is off by as much as leases allow: a few seconds."""
    at.next_skew = at.random.choice([-3, 3])
    if not skewed(at.world.cluster.clock, at.next_skew):
        return None
    os.kill(at.driver.pid, signal.SIGKILL)
    return Struck(f"the next driver is {at.next_skew:+d} s off")


def kill_process(at: Target, titles: tuple[str, ...]) -> Struck | None:
    """SIGKILL one process of Ray's that runs what one of `titles` names."""
    found = [process for process in at.world.cluster.workers() if any(title in _title(process) for title in titles)]
    if not found:
        return None
    victim = at.random.choice(sorted(found, key=lambda process: process.pid))
    title = _title(victim)
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()
        return Struck(title)
    return None


def break_requests(at: Target, fault: s3_proxy.Fault, times: int) -> Struck:
    """The next `times` requests to the object store meet `fault`."""
    at.world.proxy.plan = s3_proxy.first(fault, times)
    return Struck(f"{times} x {fault}")


def fill_disk(at: Target) -> Struck | None:
    """The disk of temporary files is full for some seconds."""
    if not at.world.scratch.is_mount():
        return None
    at.world.fill_scratch()
    return Struck("scratch disk", (at.random.uniform(2, 5), at.world.empty_scratch))


def lose_tracking(at: Target) -> Struck | None:
    """The tracking server is gone and comes back."""
    if at.world.tracking is None or at.world.tracking.poll() is not None:
        return None
    at.world.lose_tracking()
    return Struck("MLflow server", (at.random.uniform(4, 10), at.world.start_tracking))


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        return process.cmdline()[0]
    return ""


TASKS, ACTORS = ("ray::Map", "ray::commit"), ("TrainWorker", "TrainController", "MapWorker", "SynchronizationActor")
KINDS: dict[str, tuple[Callable[[Target], Struck | None], int]] = {
    "driver lost": (lose_driver, 3),
    "driver stopped": (stop_driver, 2),
    "head lost": (lose_head, 1),
    "node lost": (lose_node, 4),
    "node with another clock": (replace_node, 2),
    "driver with another clock": (skew_driver, 1),
    "actor killed": (partial(kill_process, titles=ACTORS), 4),
    "task killed": (partial(kill_process, titles=TASKS), 2),
    "S3: 500": (partial(break_requests, fault=s3_proxy.Fault.ERROR, times=6), 2),
    "S3: 503 SlowDown": (partial(break_requests, fault=s3_proxy.Fault.SLOW_DOWN, times=12), 2),
    "S3: reset": (partial(break_requests, fault=s3_proxy.Fault.RESET, times=4), 2),
    "S3: answer lost": (partial(break_requests, fault=s3_proxy.Fault.LOST, times=3), 2),
    "S3: half a body": (partial(break_requests, fault=s3_proxy.Fault.HALF, times=3), 2),
    "S3: no answer": (partial(break_requests, fault=s3_proxy.Fault.TIMEOUT, times=1), 1),
    "disk full": (fill_disk, 1),
    "tracking server gone": (lose_tracking, 1),
}
"""Each kind with how often it stands in 32 faults."""


def draw(count: int, seed: int) -> list[str]:
    """`count` kinds in random order, in the proportions of `KINDS`, every kind among the first 32 at least once."""
    generator = random.Random(seed)
    plan: list[str] = []
    while len(plan) < count:
        deck = [kind for kind, (_, times) in KINDS.items() for _ in range(times)]
        generator.shuffle(deck)
        plan += deck
    return plan[:count]
