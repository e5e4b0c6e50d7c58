"""A plan's blocks: all of them in order, or none any more soon after a stop, and no actor left in either case."""

import threading
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from kinetok.infra.errors import Cancelled
from kinetok.pipelines.data.stream import blocks

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


class Waits:
    """An actor that says that it works, then waits for a file, where one is named."""

    def __init__(self, begun: Path, until: Path | None) -> None:
        self.begun, self.until = begun, until

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self.begun.touch()
        while self.until is not None and not self.until.exists():
            threading.Event().wait(0.05)
        return row


def dataset(tmp_path: Path, *, waits: bool, count: int = 6) -> Dataset:
    source = ray.data.from_items([{"n": n} for n in range(count)], override_num_blocks=count)
    source.context.execution_options.preserve_order = True
    until = tmp_path / "never" if waits else None
    pool = ActorPoolStrategy(min_size=1, max_size=1)
    return source.map(Waits, fn_constructor_args=(tmp_path / "begun", until), compute=pool, num_cpus=1)  # type: ignore[arg-type]


@pytest.mark.usefixtures("nothing_left")
def test_all_blocks_in_order(tmp_path: Path) -> None:
    found = [ray.get(block) for block in blocks(dataset(tmp_path, waits=False), threading.Event())]
    assert [row for block in found for row in block["n"].to_pylist()] == list(range(6))


@pytest.mark.usefixtures("nothing_left")
def test_a_stop_while_no_block_comes(tmp_path: Path) -> None:
    stop = threading.Event()

    def stop_once_begun() -> None:
        while not (tmp_path / "begun").exists():
            threading.Event().wait(0.05)
        stop.set()

    watcher = threading.Thread(target=stop_once_begun)
    watcher.start()
    with pytest.raises(Cancelled):
        next(blocks(dataset(tmp_path, waits=True), stop))
    watcher.join()


@pytest.mark.usefixtures("nothing_left")
def test_leaving_before_the_end_though_the_loop_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray Data waits a bounded time for its loop, then releases the actors; on a busy machine that time has passed by then.
    monkeypatch.setattr(StreamingExecutor, "join", lambda self, timeout=None: threading.Thread.join(self, 0 if timeout == 2 else timeout))
    found = blocks(dataset(tmp_path, waits=False, count=40), threading.Event())
    next(found)
    found.close()
