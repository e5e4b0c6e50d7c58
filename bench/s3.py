"""What an object store costs against a local disk: MB/s of a tar streamed and of range reads, clips/s of read_clip.

The server is moto's, in a process of its own on this machine, or the one that KINETOK_TEST_S3 and AWS_* name. It shares the cores with the
client and has no distance, so that what is measured is the client's work and the server's, not a network.
"""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import boto3
import pyarrow as pa
from clips import steady_rate
from line import Line

from kinetok.infra.s3 import BLOCK_BYTES
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import ClipIndex

MB = 1 << 20
SIZE = 256 * MB
AT_ONCE = 4
TIMES = 3
CLIPS = 128


@contextmanager
def server() -> Iterator[str]:
    """The address of an S3 server with an empty bucket, where AWS_* lead for the length of the block."""
    own = os.environ.get("KINETOK_TEST_S3")
    process, address = (None, own) if own else _moto()
    before = dict(os.environ)
    os.environ["AWS_ENDPOINT_URL"] = address
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        os.environ.setdefault(name, value)
    bucket = f"bench-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    try:
        yield f"s3://{bucket}"
        Folder(f"s3://{bucket}").remove("bench")
    finally:
        os.environ.clear()
        os.environ.update(before)
        if process is not None:
            process.kill()
            process.wait()


def _moto() -> tuple["subprocess.Popen[bytes]", str]:
    script = (
        "from moto.server import ThreadedMotoServer as S; import time; s = S('127.0.0.1', 0, False); s.start(); "
        "print(*s.get_host_and_port(), sep=':', flush=True); time.sleep(3600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    return process, f"http://{process.stdout.readline().decode().strip()}"


def rate(act: Callable[[], int]) -> float:
    """MB/s of what `act` reads, the best of a few times."""
    found = []
    for _ in range(TIMES):
        began = time.perf_counter()
        found.append(act() / MB / (time.perf_counter() - began))
    return max(found)


def stream(folder: Folder) -> int:
    done = 0
    with folder.open("big") as file:
        while part := file.read(MB):
            done += len(part)
    return done


def ranges(folder: Folder, at_once: int) -> int:
    with ThreadPoolExecutor(at_once) as threads:
        return sum(
            len(part) for part in threads.map(lambda start: folder.read_range("big", start, BLOCK_BYTES), range(0, SIZE, BLOCK_BYTES))
        )


def bare(url: str) -> int:
    """One GET, by the standard library alone."""
    done = 0
    with urlopen(url) as answer:
        while part := answer.read(MB):
            done += len(part)
    return done


def moved(index: ClipIndex, store: Folder) -> ClipIndex:
    """The same clips, their tars copied to `store`."""
    urls = index.rows["url"].to_pylist()
    places = {url: store.path(f"{number}.tar") for number, url in enumerate(dict.fromkeys(urls))}
    for url, place in places.items():
        store.write_bytes(place.rpartition("/")[2], Path(url).read_bytes())
    rows = index.rows.set_column(index.rows.schema.get_field_index("url"), "url", pa.array([places[url] for url in urls]))
    return ClipIndex(rows, index.fps, index.frames, index.height, index.width, index.shard_clips)


def clips(index: ClipIndex) -> float:
    """Clips read and decoded per second, one after another."""
    rows = range(min(CLIPS, len(index)))
    return steady_rate((len(index.read_clip(row)) > 0 for row in rows), warm=len(rows) // 8)


def lines(index: ClipIndex, work: Path) -> list[Line]:
    """The disk is measured in the same run; what it gives of a file just written comes from the page cache."""
    disk = Folder(str(work / "s3"))
    data = os.urandom(MB) * (SIZE // MB)
    disk.write_bytes("big", data)
    with server() as bucket:
        store = Folder(bucket) / "bench"
        store.write_bytes("big", data)
        url = boto3.client("s3").generate_presigned_url("get_object", Params={"Bucket": bucket.removeprefix("s3://"), "Key": "bench/big"})
        far = rate(lambda: stream(store))
        one, several = rate(lambda: ranges(store, 1)), rate(lambda: ranges(store, AT_ONCE))
        there = moved(index, store)
        before, distant = clips(index), clips(there)
        return [
            Line("a tar streamed from S3 (floor: local disk)", far, "MB/s", rate(lambda: stream(disk)), ">= 0.05"),
            Line("a tar streamed from S3 (floor: one bare GET)", far, "MB/s", rate(lambda: bare(url)), ">= 0.70"),
            Line(f"S3 range reads, {AT_ONCE} at a time (floor: one after another)", several, "MB/s", one, ">= 1.00"),
            Line("clips read and decoded from S3 (floor: local disk)", distant, "clips/s", (before + clips(index)) / 2, ">= 0.70"),
        ]
