"""`each_on_ray`: one Ray Data task per item, rows back as they finish. The settings of Ray Data that kinetok's stages want.

One block per item costs about 25 ms and keeps resume simple: an item is a unit of commit. A task whose process dies is run again
by Ray; an error of the function ends the iteration. Not covered: pipelines of several operators (`encoding.py`).
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from kinetok.infra.errors import DataError, KinetokError, StoreError
from kinetok.infra.launch import start_ray

Item = dict[str, Any]


def each_on_ray(function: Callable[[Item], Item], items: list[Item], *, at_once: int | None) -> Iterator[Item]:
    """`function` of every item, in any order, at most `at_once` at a time (None: what the cluster's CPUs allow).

    Raises DataError where `function` raised a KinetokError, StoreError where it raised an OSError (a full disk, a lost store),
    with the same message; anything else comes as Ray wraps it.
    """
    if not items:
        return
    start_ray()
    import ray.data

    # Ray Data reports each data set it starts and ends; progress is the stage's to tell.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    # On two CPUs the reservation would keep one of them idle.
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def guarded(item: Item) -> Item:
        # Ray would lose the type of an exception, and print the traceback of a user's mistake.
        try:
            return {"row": function(item), "wrong_data": None, "lost_store": None}
        except KinetokError as error:
            return {"row": None, "wrong_data": str(error), "lost_store": None}
        except OSError as error:
            return {"row": None, "wrong_data": None, "lost_store": str(error)}

    data = ray.data.from_items(items, override_num_blocks=len(items))
    for done in data.map(guarded, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=at_once)).iter_rows():
        if done["wrong_data"] is not None:
            raise DataError(done["wrong_data"])
        if done["lost_store"] is not None:
            raise StoreError(f"a task could not read or write: {done['lost_store']}; free space or restore access, then run again")
        yield done["row"]
