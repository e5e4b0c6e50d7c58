"""One Ray Data task per item (`each_on_ray`), or one call of a model actor (`each_on_actors`), rows back as they finish.

One block per item costs about 25 ms and keeps resume simple: an item is a unit of commit. A task or an actor whose process dies is
run again by Ray; an error of the function ends the iteration. Not covered: pipelines of several operators (`encoding.py`).
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from kinetok.infra.errors import DataError, KinetokError, StoreError
from kinetok.infra.launch import start_ray
from kinetok.infra.stage import Resources

if TYPE_CHECKING:
    from ray.data import Dataset

Item = dict[str, Any]


def each_on_ray(function: Callable[[Item], Item], items: list[Item], *, resources: Resources) -> Iterator[Item]:
    """`function` of every item, in any order, at most `resources.decoders` at a time (None: what the cluster's CPUs allow).

    Raises DataError where `function` raised a KinetokError, StoreError where it raised an OSError (a full disk, a lost store),
    with the same message; anything else comes as Ray wraps it.
    """
    from ray.data import TaskPoolStrategy

    if items:
        pool = TaskPoolStrategy(size=resources.decoders)
        custom = resources.decoder_custom or None
        yield from _rows(_source(items).map(partial(_guarded, function), num_cpus=1, resources=custom, compute=pool))


def each_on_actors(open_function: Callable[[], Callable[[Item], Item]], items: list[Item], *, resources: Resources) -> Iterator[Item]:
    """The function that `open_function` returns, opened once in each of `resources.workers` actors, of every item, in any order.

    Raises as `each_on_ray` does.
    """
    from ray.data import ActorPoolStrategy

    if items:
        least, most = pool_sizes(resources, len(items))
        pool = ActorPoolStrategy(min_size=least, max_size=most)
        # That a class may stand for the function, `Dataset.map` does not say in its annotation.
        data = _source(items).map(
            _Actor,  # type: ignore[arg-type]
            fn_constructor_args=(open_function,),
            compute=pool,
            **worker_options(resources),
        )
        yield from _rows(data)


def pool_sizes(resources: Resources, items: int) -> tuple[int, int]:
    """The least and the most actors of a pool, never more than there are items for."""
    return min(resources.workers, items), min(resources.max_workers or resources.workers, items)


def worker_options(resources: Resources) -> dict[str, Any]:
    """What one actor asks of its node, by Ray's names."""
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "memory": resources.memory or None,
        "resources": resources.custom or None,
        "accelerator_type": resources.accelerator,
    }


class _Actor:
    """Holds what is expensive to open."""

    def __init__(self, open_function: Callable[[], Callable[[Item], Item]]) -> None:
        self.function = open_function()

    def __call__(self, item: Item) -> Item:
        return _guarded(self.function, item)


def _guarded(function: Callable[[Item], Item], item: Item) -> Item:
    # Ray would lose the type of an exception, and print the traceback of a user's mistake.
    try:
        return {"row": function(item), "wrong_data": None, "lost_store": None}
    except KinetokError as error:
        return {"row": None, "wrong_data": str(error), "lost_store": None}
    except OSError as error:
        return {"row": None, "wrong_data": None, "lost_store": str(error)}


def _source(items: list[Item]) -> "Dataset":
    """One block per item, with the settings of Ray Data that kinetok's stages want."""
    start_ray()
    import ray.data

    # Ray Data reports each data set it starts and ends; progress is the stage's to tell.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    # On two CPUs the reservation would keep one of them idle.
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray.data.from_items(items, override_num_blocks=len(items))


def _rows(data: "Dataset") -> Iterator[Item]:
    for done in data.iter_rows():
        if done["wrong_data"] is not None:
            raise DataError(done["wrong_data"])
        if done["lost_store"] is not None:
            raise StoreError(f"a task could not read or write: {done['lost_store']}; free space or restore access, then run again")
        yield done["row"]
