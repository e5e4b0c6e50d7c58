"""`each_on_ray`: one Ray Data task per item, rows back as they finish. The settings of Ray Data that kinetok's stages want.

One block per item costs about 25 ms and keeps resume simple: an item is a unit of commit. A task whose process dies is run again
by Ray; an exception of the function ends the iteration. Not covered: pipelines of several operators (`encoding.py`).
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from kinetok.infra.errors import KinetokError
from kinetok.infra.launch import start_ray

Item = dict[str, Any]


def each_on_ray(function: Callable[[Item], Item], items: list[Item], *, at_once: int | None) -> Iterator[Item]:
    """`function` of every item, in any order, at most `at_once` at a time (None: what the cluster's CPUs allow).

    A KinetokError raised by `function` is raised here as itself, not as Ray's wrapping of it.
    """
    if not items:
        return
    start_ray()
    import ray.data
    from ray.exceptions import RayTaskError

    # Ray Data reports each data set it starts and ends; progress is the stage's to tell.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    # On two CPUs the reservation would keep one of them idle.
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    data = ray.data.from_items(items, override_num_blocks=len(items))
    done = data.map(function, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=at_once))
    try:
        yield from done.iter_rows()
    except RayTaskError as error:
        cause = named_cause(error)
        if cause is None:
            raise
        raise cause from error


def named_cause(error: BaseException | None) -> KinetokError | None:
    """The KinetokError inside Ray's chain of wrappers."""
    while error is not None:
        if isinstance(error, KinetokError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
