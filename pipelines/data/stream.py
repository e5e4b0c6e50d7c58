"""The blocks of a Ray Data plan as they come, ended at once by a stop, with nothing of the plan left running behind them.

Ray Data plans are run by a loop in a thread of the driver. Left alone, that loop never hears that a stage was stopped while no block
comes; and where the consumer leaves early, Ray Data releases the model actors without waiting longer than two seconds for the loop,
which on a busy machine then finds its pool too small and starts actors that nobody ends. So the loop asks at each of its steps whether
it is still wanted; where it is not, it kills what it started and ends, and it is waited for.
Not covered: what a plan computes (`encoding.py`, `ray_tasks.py`).
"""

import logging
import threading
from collections.abc import Generator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.stats import Timer

from kinetok.infra.errors import Cancelled

SETTLE_SECONDS = 0.5
"""From a plan's last submitted task to its cancellation: Ray 2.60 aborts the driver where arguments are still being inlined by then."""
END_SECONDS = 60.0
"""The loop has this long to end; it takes longer only where the cluster is gone, and must not keep the driver then."""

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.data import Dataset
    from ray.data._internal.execution.streaming_executor import StreamingExecutor


def blocks(dataset: "Dataset", stop: threading.Event) -> "Generator[ObjectRef[Any]]":
    """References to the blocks of `dataset`; raises Cancelled soon after `stop` is set, whether or not blocks come."""
    # Ray Data reports each data set it starts and ends, and an exception before it raises it: both are the stage's to tell.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [_Watch]
    watch = _Watched(stop)
    token = _watched.set(watch)
    try:
        bundles = dataset.iter_internal_ref_bundles()
    finally:
        _watched.reset(token)
    try:
        for bundle in bundles:
            yield from (entry.ref for entry in bundle.blocks)
    finally:
        watch.end()


class _Watched:
    """A plan in progress."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop, self.left = stop, threading.Event()
        self.executor: StreamingExecutor | None = None

    @property
    def wanted(self) -> bool:
        return not (self.stop.is_set() or self.left.is_set())

    def end(self) -> None:
        """Nobody consumes blocks any more: wait until the loop has ended."""
        self.left.set()
        if self.executor is not None:
            self.executor.join(END_SECONDS)


_watched: ContextVar[_Watched] = ContextVar("_watched")
"""Ray Data makes its callbacks itself, in the thread that begins the plan: this tells them which plan is theirs."""


class _Watch(ExecutionCallback):
    """What Ray Data's loop calls."""

    def __init__(self) -> None:
        self.watched = _watched.get()

    def before_execution_starts(self, executor: "StreamingExecutor") -> None:
        self.watched.executor = executor

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        if self.watched.wanted:
            return
        assert executor._topology is not None
        threading.Event().wait(SETTLE_SECONDS)
        for operator in executor._topology:
            operator.shutdown(Timer(), force=True)  # type: ignore[no-untyped-call]
        raise Cancelled("the stage was asked to stop")
