"""Tars on S3 go through `ingest`, `clips` and decoding in bounded memory, without touching the disk, each byte read once; one of a gigabyte
is marked long."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.faults.generated_tar import GeneratedTar

from kinetok.infra.read_ahead import ReadAhead

MB = 1 << 20
MEMBER_BYTES = 8 * MB
PEAK_MB = 160
"""Whatever the size of the tar: four blocks of 8 MB, twice while they are received, and a member with the copies that joining makes."""
READER = """
import json, re, sys
from pathlib import Path
from kinetok.infra.storage import Folder
from kinetok.pipelines.data import clip_index, decode
from kinetok.pipelines.data.clip_parts import cut_shard
from kinetok.pipelines.data.recipe import CutRecipe
from kinetok.pipelines.data.sources import SourcePlan, list_source, read_range, write_plan

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def written():
    return int(re.search(r"wchar: (\\d+)", Path("/proc/self/io").read_text())[1]) / 2**20

out = Folder(sys.argv[1])
plan = SourcePlan(out / "plan")
list_source("s3://generated/*.tar")
before, wrote = memory("VmRSS"), written()
write_plan(plan.folder, list_source("s3://generated/*.tar"))
(shard,) = plan.shards()
part = cut_shard(shard, plan, CutRecipe(fps=8, frames=5, height=16, width=16), out)
rows = clip_index.read_parts(out).to_pylist()
one = read_range(rows[-1]["url"], rows[-1]["offset"], rows[-1]["bytes"])
print(json.dumps({"bad": part["quarantined"], "one": len(one), "peak": memory("VmHWM") - before, "written": written() - wrote}))
"""


@pytest.mark.parametrize("members", [32, pytest.param(130, marks=pytest.mark.long)])
def test_a_tar_of_any_size_streams(tmp_path: Path, members: int) -> None:
    with GeneratedTar(members, MEMBER_BYTES) as tar:
        environment = {**os.environ, "AWS_ENDPOINT_URL": tar.url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        done = subprocess.run(
            [sys.executable, "-c", READER, str(tmp_path)], check=False, capture_output=True, text=True, timeout=200, env=environment
        )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["bad"] == members and found["one"] == MEMBER_BYTES
    assert found["peak"] < PEAK_MB, found
    assert found["written"] < 1, found
    assert tar.served == tar.bytes + MEMBER_BYTES, "the tar once, then one video by its range"


def _numbers(size: int, *, block: int, ahead: int) -> tuple[ReadAhead, bytes, list[int]]:
    data, asked = os.urandom(size), []

    def fetch(start: int, length: int) -> bytes:
        asked.append(start)
        return data[start : start + length]

    return ReadAhead(fetch, size, block=block, ahead=ahead), data, asked


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000, 1234])
def test_a_stream_gives_every_byte_once(size: int) -> None:
    raw, data, asked = _numbers(size, block=100, ahead=3)
    with io.BufferedReader(raw, 64) as stream:
        assert stream.read() == data
    assert sorted(asked) == list(range(0, size, 100))


def test_a_stream_can_be_read_from_here_and_there() -> None:
    raw, data, asked = _numbers(1000, block=100, ahead=3)
    with raw:
        for place in (950, 120, 730):
            assert raw.seek(place) == place
            assert raw.read(10) == data[place : place + 10]
        assert sorted(asked) == [100, 700, 900], "what is not read on is not read ahead"
        assert raw.seek(-5, io.SEEK_END) == 995 and raw.read(100) == data[995:] and raw.read(1) == b""


def test_a_failed_block_is_raised_where_it_is_read() -> None:
    def fetch(start: int, length: int) -> bytes:
        if start >= 200:
            raise OSError("lost")
        return bytes(length)

    with ReadAhead(fetch, 1000, block=100, ahead=5) as raw, pytest.raises(OSError, match="lost"):
        assert raw.read(100) == bytes(100)
        assert raw.read(100) == bytes(100)
        raw.read(1)
