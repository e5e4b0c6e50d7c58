"""One process for the controllers of all trainings on a Ray of our own.

Ray Train starts a process for the controller of each training, and nothing of the training starts before it is up: seconds, in which it
imports Ray Train and torch once more. On a cluster elsewhere that is what keeps a training alive, and stays. A Ray of our own ends with
the command that started it, so that its controllers can share a process, a thread each. Should that process die, all its trainings end,
each to go on from its last checkpoint when it is run again. Ray Train's own log of a controller goes where that of the latest one does,
and its environment is that of the first. Not covered: what a controller does, which is Ray Train's; asking it from a worker for the
checkpoints that were reported.
"""

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

if TYPE_CHECKING:
    from ray.train import Result

TRAININGS = 32
"""At once at most, a thread each; others wait for theirs. More than a machine runs."""
_STARTING = threading.Lock()
_RUNNING: dict[tuple[str, str], Any] = {}
"""The process, by the cluster's node and job of this driver: kept here, as Ray ends an actor that nobody holds."""


class Controllers:
    """The actor: each call is one training, from its first worker to its last."""

    def run(self, parts: dict[str, Any]) -> "Result":
        """What Ray Train's controller of these constructor arguments comes to; an error of the training is in the result."""
        from ray.train.v2._internal.execution.controller import TrainController

        controller = TrainController(**parts)
        asyncio.run(controller.run())  # type: ignore[no-untyped-call]
        return controller.get_result()


def run_controller(parts: dict[str, Any]) -> "Result":
    """Run a controller in the shared process, which the first training starts and which ends with this driver; waits for its end.

    Raises RayActorError where the process dies; the next training starts another.
    """
    here = ray.get_runtime_context()
    key = here.get_node_id(), here.get_job_id()
    with _STARTING:
        if key not in _RUNNING:
            _RUNNING.clear()
            _RUNNING[key] = ray.remote(Controllers).options(num_cpus=0, max_concurrency=TRAININGS).remote()
        actor = _RUNNING[key]
    try:
        result: Result = ray.get(actor.run.remote(parts))
    except RayActorError:
        with _STARTING:
            if _RUNNING.get(key) is actor:
                del _RUNNING[key]
        raise
    return result
