"""Calls into codecs that hang or crash: what one video does costs that video, not its shard and not the stage.

FFmpeg runs strangers' bytes in native code; no exception ends a call that never returns, and none is raised by one that takes its process
along. `guard` therefore has two ways of calling a function. Normally it calls it here, and ends this very process when the call takes too
long: Ray then runs the task again, as it does after a crash. A task that is run again (`begun_before`) calls every video in a process
apart instead, which costs the start of that process and some milliseconds for each video. There the guilty one is found, tried `TRIES`
times, and becomes a BadVideo: `crashed` or `timed_out`. Innocent tasks that were lost with their node pay the same.
Not covered: what fails with an exception, and memory (`Limits` of `decode.py`; a process apart that the kernel kills counts as crashed).
"""

import contextlib
import faulthandler
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import Protocol, TypeVar

from kinetok.pipelines.data.reasons import BadVideo, Reason

TRIES = 2
"""Processes apart that a video may kill."""
GRACE_SECONDS = 30.0
"""A process apart ends itself this long after its time, should nobody be left to end it."""

T = TypeVar("T")


class Guard(Protocol):
    """Calls `function(*arguments)`; raises what it raises, and BadVideo where it never ends or kills its process."""

    def __call__(self, function: Callable[..., T], *arguments: object) -> T: ...


def unguarded(function: Callable[..., T], *arguments: object) -> T:
    """A `Guard` that only calls, for videos of one's own."""
    return function(*arguments)


@contextlib.contextmanager
def guard(seconds: float, *, apart: bool) -> Iterator[Guard]:
    """A guard that gives each call `seconds`: in a process apart, or else in this one, which a call that takes longer ends.

    What is sent apart is looked up there by name, or comes by value where cloudpickle was told so.
    """
    if not apart:
        yield partial(_here, seconds)
        return
    helper = _Helper(seconds)
    try:
        yield helper.call
    finally:
        helper.end()


def begun_before() -> bool:
    """Whether the present Ray task was begun before, and its process died or its node was lost."""
    from ray._private.worker import global_worker

    return bool(global_worker.core_worker.get_current_task_attempt_number())  # type: ignore[attr-defined]


def _here(seconds: float, function: Callable[..., T], *arguments: object) -> T:
    # A watchdog in C: it needs no interpreter lock, which a hanging call may hold.
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        return function(*arguments)
    finally:
        faulthandler.cancel_dump_traceback_later()


class _Helper:
    """A process apart, started when it is needed and again after it ended."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        from ray import cloudpickle

        request = cloudpickle.dumps((function, arguments))  # type: ignore[no-untyped-call]
        for _ in range(TRIES):
            pipe = self._started()
            try:
                pipe.send_bytes(request)
                if not pipe.poll(self.seconds):
                    self.end()
                    raise BadVideo(Reason.TIMED_OUT, f"takes longer than {self.seconds:g} s")
                result, error = pipe.recv()
            except (EOFError, ConnectionError):
                code = self.end()
                continue
            if error is not None:
                raise error
            return result  # type: ignore[no-any-return]
        raise BadVideo(Reason.CRASHED, f"killed {TRIES} processes that decoded it, the last one with {_told(code)}")

    def _started(self) -> Connection:
        if self._pipe is None:
            mine, theirs = Pipe()
            command = [sys.executable, "-m", "kinetok.pipelines.data.guard", str(theirs.fileno()), str(self.seconds)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
            self._pipe = mine
            theirs.close()
        return self._pipe

    def end(self) -> int:
        """Kill the process; returns its exit code."""
        if self._process is None or self._pipe is None:
            return 0
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._process.kill()
        code = self._process.wait()
        self._process = self._pipe = None
        return code


def _told(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve(pipe: Connection, seconds: float) -> None:
    """The process apart: call what is sent, until the other end closes."""
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
        pipe.send(_outcome(function, arguments))
        faulthandler.cancel_dump_traceback_later()


def _outcome(function: Callable[..., object], arguments: tuple[object, ...]) -> tuple[object, Exception | None]:
    try:
        return function(*arguments), None
    except Exception as error:  # noqa: BLE001 - raised again by the caller, whose function it is
        return None, error


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), float(sys.argv[2]))
