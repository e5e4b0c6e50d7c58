"""The turn of a training: which call of `fit` may go on, and whether it was asked to stop. One small file in the store, `fit.TURN`.

The driver writes the id of its call there; the first worker reads it once a second. Workers of a killed driver may live on: another id
means that a later call took over, and that nothing may be written any more. The id with `STOPPED` behind it asks the call's own workers to
leave a checkpoint and end. Not covered: notices of preemption, which Ray brings to the workers.
"""

import contextlib
import threading
import uuid
from collections.abc import Iterator
from enum import IntEnum

from kinetok.infra.errors import StoreError
from kinetok.infra.fit import TURN
from kinetok.infra.storage import Folder

STOPPED = "-stopped"
LOOK_SECONDS = 1.0


class Wish(IntEnum):
    """What is wanted of the workers of a turn; the greater one goes before."""

    GO_ON = 0
    STOP = 1
    """Leave a checkpoint and end."""
    GIVE_WAY = 2
    """Another call of `fit` has begun: end, and write nothing."""


def begin(out: Folder) -> str:
    """Make a new turn the present one; its id sorts after those of all earlier ones."""
    earlier = out.read_text(TURN).partition("-")[0] if out.exists(TURN) else "0"
    turn = f"{int(earlier) + 1:04d}-{uuid.uuid4().hex[:8]}"
    out.write_text(TURN, turn)
    return turn


def ask_to_stop(out: Folder, turn: str) -> None:
    """Tell the workers of `turn` to leave a checkpoint and end, unless another turn began."""
    out.write_if(TURN, f"{turn}{STOPPED}".encode(), turn.encode())


def wish(out: Folder, turn: str) -> Wish:
    """What the store says to the workers of `turn`; one that does not answer takes no turn away."""
    try:
        present = out.read_text(TURN)
    except FileNotFoundError:
        return Wish.GIVE_WAY
    except (OSError, StoreError):
        return Wish.GO_ON
    return Wish.GO_ON if present == turn else Wish.STOP if present == turn + STOPPED else Wish.GIVE_WAY


class Watch:
    """Looks at the turn from a thread, so that a step never waits for the store; `wish` is what it last saw."""

    def __init__(self, out: Folder, turn: str) -> None:
        self.out, self.turn = out, turn
        self.wish = Wish.GO_ON

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Look for the length of the block."""
        ended = threading.Event()
        thread = threading.Thread(target=self._look, args=(ended,), name="turn of training", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _look(self, ended: threading.Event) -> None:
        while self.wish is not Wish.GIVE_WAY:
            self.wish = wish(self.out, self.turn)
            if ended.wait(LOOK_SECONDS):
                return
