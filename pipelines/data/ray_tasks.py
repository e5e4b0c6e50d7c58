"""One Ray Data task per item (`each_on_ray`), or one call of a model actor (`each_on_actors`), rows back as they finish.

One block per item costs about 25 ms and keeps resume simple: an item is a unit of commit. A task or an actor whose process dies is
run again by Ray; an error of the function ends the iteration. Ray's dashboard calls tasks and actors by their stage (`named`). Not
covered: pipelines of several operators (`encoding.py`).
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

from kinetok.infra.errors import DataError, KinetokError, StoreError
from kinetok.infra.launch import model_environment, start_ray
from kinetok.infra.stage import Resources

if TYPE_CHECKING:
    from ray.data import Dataset

Item = dict[str, Any]


def each_on_ray(
    stage: str, function: Callable[[Item], Item], items: list[Item], *, resources: Resources, stop: threading.Event
) -> Iterator[Item]:
    """`function` of every item, in any order, at most `resources.decoders` at a time (None: what the cluster's CPUs allow).

    Raises Cancelled soon after `stop` is set, DataError where `function` raised a KinetokError, StoreError where it raised an OSError (a
    full disk, a lost store), with the same message; anything else comes as Ray wraps it.
    """
    from ray.data import TaskPoolStrategy

    if items:
        pool = TaskPoolStrategy(size=resources.decoders)
        custom = resources.decoder_custom or None
        yield from _rows(_source(stage, items).map(named(stage, _guarded(function)), num_cpus=1, resources=custom, compute=pool), stop)


def each_on_actors(
    stage: str, open_function: Callable[[], Callable[[Item], Item]], items: list[Item], *, resources: Resources, stop: threading.Event
) -> Iterator[Item]:
    """The function that `open_function` returns, opened once in each of `resources.workers` actors, of every item, in any order.

    Raises as `each_on_ray` does.
    """
    from ray.data import ActorPoolStrategy

    if items:
        least, most = pool_sizes(resources, len(items))
        pool = ActorPoolStrategy(min_size=least, max_size=most)
        data = _source(stage, items).map(
            named(stage, Worker),
            fn_constructor_args=(open_function,),
            compute=pool,
            **worker_options(resources),
        )
        yield from _rows(data, stop)


def pool_sizes(resources: Resources, items: int) -> tuple[int, int]:
    """The least and the most actors of a pool, never more than there are items for."""
    return min(resources.workers, items), min(resources.max_workers or resources.workers, items)


def worker_options(resources: Resources) -> dict[str, Any]:
    """What one actor that runs a model asks of its node, by Ray's names."""
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "memory": resources.memory or None,
        "resources": resources.custom or None,
        "accelerator_type": resources.accelerator,
        "runtime_env": model_environment(resources),
    }


def named(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, a function or a class, under the name `stage: work`, which Ray shows of the tasks or actors that run it."""
    name = f"{stage}: {work.__name__}"
    if isinstance(work, type):
        return type(name, (work,), {})

    @wraps(work)
    def call(*arguments: Any, **named_arguments: Any) -> Any:
        return work(*arguments, **named_arguments)

    call.__name__ = name
    return call


class Worker:
    """An actor that holds what is expensive to open."""

    def __init__(self, open_function: Callable[[], Callable[[Item], Item]]) -> None:
        self.function = _guarded(open_function())

    def __call__(self, item: Item) -> Item:
        return self.function(item)


def _guarded(function: Callable[[Item], Item]) -> Callable[[Item], Item]:
    """`function`, with its errors as rows: Ray would lose their type, and print the traceback of a user's mistake."""

    @wraps(function, updated=())
    def call(item: Item) -> Item:
        try:
            return {"row": function(item), "wrong_data": None, "lost_store": None}
        except KinetokError as error:
            return {"row": None, "wrong_data": str(error), "lost_store": None}
        except OSError as error:
            return {"row": None, "wrong_data": None, "lost_store": str(error)}

    return call


def _source(stage: str, items: list[Item]) -> "Dataset":
    """One block per item, with the settings of Ray Data that kinetok's stages want."""
    start_ray()
    import ray.data

    source = ray.data.from_items(items, override_num_blocks=len(items))
    # On two CPUs the reservation would keep one of them idle.
    source.context.op_resource_reservation_enabled = False
    source.set_name(stage)
    return source


def _rows(data: "Dataset", stop: threading.Event) -> Iterator[Item]:
    import ray
    from ray.data.block import BlockAccessor

    from kinetok.pipelines.data.stream import blocks

    found = blocks(data, stop)
    try:
        for block in found:
            yield from map(_row, BlockAccessor.for_block(ray.get(block)).iter_rows(public_row_format=True))
    finally:
        found.close()


def _row(done: Mapping[str, Any]) -> Item:
    if done["wrong_data"] is not None:
        raise DataError(done["wrong_data"])
    if done["lost_store"] is not None:
        raise StoreError(f"a task could not read or write: {done['lost_store']}; free space or restore access, then run again")
    row: Item = done["row"]
    return row
