"""The preloaded clock: wall time is off, waits until a wall time are not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.chaos.cluster import build_clock, skewed

WAITS = """
import ctypes, threading, time

class Time(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]

def soon():
    at = time.time() + 0.1
    return ctypes.byref(Time(int(at), int(at % 1 * 1e9)))

lib, (condition, mutex, semaphore) = ctypes.CDLL(None), [(ctypes.c_char * 256)() for _ in range(3)]
lib.pthread_mutex_lock(mutex)
lib.pthread_cond_timedwait(condition, mutex, soon())
lib.sem_init(semaphore, 0, 0)
lib.sem_timedwait(semaphore, soon())
threading.Event().wait(0.1)
print(time.time())
"""


@pytest.mark.parametrize("seconds", [600, -600])
def test_a_wait_until_a_time_of_a_clock_that_is_ahead_ends(tmp_path: Path, seconds: int) -> None:
    clock = build_clock(tmp_path)
    if clock is None:
        pytest.skip("no C compiler")
    environment = os.environ | skewed(clock, seconds)
    said = subprocess.run([sys.executable, "-c", WAITS], env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    right = subprocess.run(["date", "+%s"], capture_output=True, text=True, check=True).stdout
    assert float(said) == pytest.approx(float(right) + seconds, abs=60)
