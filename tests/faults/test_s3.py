"""S3 that misbehaves: every kind of fault against every kind of request either comes right by itself or ends in an error that says why."""

import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tests.faults.s3_proxy import Fault, Request, S3Proxy, calm, first, seeded
from tests.pipelines.data.videos import encode, moving

from kinetok.infra import s3
from kinetok.infra.artifact import LEASE, MANIFEST, Counts, Lease, Record, publish
from kinetok.infra.errors import StoreError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data import token_shards, verify
from kinetok.pipelines.data.clip_parts import cut_shard, finish_index, finished_parts
from kinetok.pipelines.data.recipe import IndexRecipe
from kinetok.pipelines.data.sources import SourcePlan, list_source, write_plan
from kinetok.pipelines.data.tars import TarWriter

DATA = bytes(range(256)) * 5000
PASSING = [Fault.ERROR, Fault.SLOW_DOWN, Fault.RESET, Fault.LOST, Fault.HALF]


@pytest.fixture(scope="module")
def between(object_store: str) -> Iterator[S3Proxy]:
    """A proxy between this process and the store; waits and blocks are short."""
    with pytest.MonkeyPatch.context() as patch, S3Proxy(os.environ["AWS_ENDPOINT_URL"]) as found:
        patch.setenv("AWS_ENDPOINT_URL", found.url)
        patch.setattr(s3, "FIRST_WAIT", 0.001)
        patch.setattr(s3, "ANSWER_SECONDS", 0.3)
        patch.setattr(s3, "BLOCK_BYTES", 500_000)
        patch.setattr(s3, "PART_BYTES", 6 << 20)
        yield found


@pytest.fixture
def proxy(between: S3Proxy) -> Iterator[S3Proxy]:
    """The proxy, calm and with nothing seen, before and after."""
    yield between
    between.begin(calm)


@pytest.fixture
def folder(object_store: str, proxy: S3Proxy, tmp_path: Path) -> Folder:
    """Holds `a` and `sub/b`."""
    found = Folder(f"{object_store}/{tmp_path.name}")
    found.write_bytes("a", DATA)
    found.write_bytes("sub/b", b"b")
    return found


def _stream(folder: Folder) -> bytes:
    with folder.open("a") as file:
        return file.read()


def _copied(folder: Folder) -> dict[str, int]:
    folder.copy(folder / "copy", last="a")
    return (folder / "copy").files()


def _large(folder: Folder) -> int:
    folder.write_bytes("large", bytes(13 << 20))
    return folder.size("large")


def _removed(folder: Folder) -> list[str]:
    folder.remove("sub")
    return sorted(folder.files())


ACTIONS: dict[str, tuple[Callable[[Folder], object], object]] = {
    "read": (lambda folder: folder.read_bytes("a"), DATA),
    "range": (lambda folder: folder.read_range("a", 1000, 700_000), DATA[1000:701_000]),
    "stream": (_stream, DATA),
    "stat": (
        lambda folder: (folder.size("a"), folder.exists("a"), folder.exists("sub"), folder.exists("no")),
        (len(DATA), True, True, False),
    ),
    "list": (lambda folder: folder.files(), {"a": len(DATA), "sub/b": 1}),
    "folders": (lambda folder: folder.folders(), ["sub"]),
    "put": (lambda folder: (folder.write_bytes("a", b"new"), folder.read_bytes("a"))[1], b"new"),
    "put if absent": (lambda folder: (folder.write_if("n", b"1", None), folder.read_bytes("n")), (True, b"1")),
    "put if there": (lambda folder: (folder.write_if("n", b"1", None), folder.write_if("a", b"1", None)), (True, False)),
    "put if same": (lambda folder: (folder.write_if("a", b"new", DATA), folder.read_bytes("a")), (True, b"new")),
    "remove if same": (lambda folder: (folder.remove_if("a", DATA), folder.exists("a")), (True, False)),
    "remove": (_removed, ["a"]),
    "copy": (_copied, {"a": len(DATA), "sub/b": 1}),
}


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("action", ACTIONS)
def test_what_passes_is_outlasted(folder: Folder, proxy: S3Proxy, action: str, fault: Fault) -> None:
    act, expected = ACTIONS[action]
    proxy.begin(lambda request: fault if request.turn < 2 else None)
    assert act(folder) == expected
    assert proxy.count(fault) >= 2


@pytest.mark.parametrize("action", ["read", "list", "put", "put if absent", "remove if same"])
def test_a_store_that_falls_silent_is_asked_again(folder: Folder, proxy: S3Proxy, action: str) -> None:
    act, expected = ACTIONS[action]
    proxy.begin(first(Fault.TIMEOUT, 1))
    assert act(folder) == expected
    assert proxy.count(Fault.TIMEOUT) == 1


@pytest.mark.parametrize("action", ACTIONS)
def test_what_does_not_pass_ends_with_a_limit_and_a_reason(folder: Folder, proxy: S3Proxy, action: str) -> None:
    proxy.begin(lambda request: Fault.SLOW_DOWN)
    with pytest.raises(StoreError, match=rf"cannot \w+ {folder}.*503 .*; asked {s3.ATTEMPTS} times in \d+ s. Check the network"):
        ACTIONS[action][0](folder)
    assert max(seen.request.turn for seen in proxy.seen if seen.fault) + 1 == s3.ATTEMPTS


@pytest.mark.parametrize("action", ACTIONS)
def test_expired_credentials_are_named_and_not_tried_again(folder: Folder, proxy: S3Proxy, action: str) -> None:
    proxy.begin(lambda request: Fault.EXPIRED)
    with pytest.raises(StoreError, match=rf"cannot \w+ {folder}.*expired.*renew"):
        ACTIONS[action][0](folder)
    assert {seen.request.operation for seen in proxy.seen if seen.request.turn and seen.fault} <= {"head"}


def test_a_file_in_parts_is_whole_once_it_is_there(folder: Folder, proxy: S3Proxy) -> None:
    """Every part and the completion fail in several ways; an upload that is given up leaves nothing."""
    data = os.urandom(13 << 20)
    proxy.begin(seeded(4, {Fault.LOST: 0.3, Fault.HALF: 0.2, Fault.ERROR: 0.2}))
    folder.write_bytes("large", data)
    assert proxy.count(Fault.LOST, "multipart") > 0
    assert folder.read_bytes("large") == data
    proxy.begin(lambda request: Fault.ERROR if "partNumber=3" in request.target else None)
    with pytest.raises(StoreError, match=r"cannot write .*/given-up"):
        folder.write_bytes("given-up", data)
    assert not folder.exists("given-up")


@pytest.mark.parametrize("expected", [None, DATA])
def test_a_put_whose_answer_was_lost_is_ours(folder: Folder, proxy: S3Proxy, expected: bytes | None) -> None:
    name = "new" if expected is None else "a"
    proxy.begin(first(Fault.LOST, 2, ["put_if"]))
    assert folder.write_if(name, b"ours", expected)
    assert proxy.count(Fault.LOST) == 2
    assert folder.read_bytes(name) == b"ours"


@pytest.mark.parametrize("expected", [None, DATA])
def test_a_put_that_somebody_came_before_is_not_ours(folder: Folder, proxy: S3Proxy, expected: bytes | None) -> None:
    """Between two attempts another puts the very same bytes: they are theirs all the same."""
    name = "new" if expected is None else "a"

    def overtaken(request: Request) -> Fault | None:
        if request.operation != "put_if":
            return None
        proxy.plan = calm
        assert folder.write_if(name, b"same", expected)
        return Fault.RESET

    proxy.begin(overtaken)
    assert not folder.write_if(name, b"same", expected)


def test_a_removal_whose_answer_was_lost_is_ours(folder: Folder, proxy: S3Proxy) -> None:
    proxy.begin(first(Fault.LOST, 1, ["delete_if"]))
    assert folder.remove_if("a", DATA)
    proxy.begin(calm)
    assert not folder.remove_if("a", DATA)


def test_of_many_takers_one_holds_it_whatever_happens_to_their_requests(folder: Folder, proxy: S3Proxy) -> None:
    holding: list[bytes] = []
    most: list[int] = []
    proxy.begin(seeded(7, {Fault.LOST: 0.15, Fault.RESET: 0.1, Fault.SLOW_DOWN: 0.1, Fault.HALF: 0.1}))

    def take(name: bytes) -> None:
        for _ in range(6):
            while not folder.write_if("held", name, None):
                pass
            holding.append(name)
            most.append(len(holding))
            holding.remove(name)
            folder.remove_if("held", name)  # False too where its answer was lost and another has taken it since

    workers = [threading.Thread(target=take, args=(name,)) for name in (b"1", b"2", b"3")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert set(most) == {1} and len(most) == 18
    assert proxy.count(Fault.LOST, "put_if") > 0 and proxy.count(Fault.LOST, "delete_if") > 0


def test_a_lease_outlasts_faults_and_ends_with_its_term(folder: Folder, proxy: S3Proxy) -> None:
    """Of a store that stays silent, the holder learns before another may begin: a renewal is given up after a third of the term."""
    proxy.begin(first(Fault.LOST, 1, ["put_if"], key=LEASE))
    lease = Lease(folder, seconds=30.0)
    assert lease.acquire() and not Lease(folder).acquire()
    proxy.begin(first(Fault.LOST, 1, ["put_if"], key=LEASE))
    assert lease.renew()
    lease.release()
    hurried = Folder(folder.url).hurried(0.0)
    proxy.begin(lambda request: Fault.SLOW_DOWN)
    with pytest.raises(StoreError, match="asked 1 times"):
        hurried.write_if(LEASE, b"", None)


EVERYTHING = dict.fromkeys(PASSING, 0.09)
"""Nearly every second request meets something."""


def _make_clips(source: str, out: Folder) -> None:
    """`ingest` and `clips` of the tars at `source`, without Ray."""
    recipe = IndexRecipe(fps=8, frames=5, height=16, width=16, max_bad_fraction=0.5)
    plan = SourcePlan(out / "plan")
    write_plan(plan.folder, list_source(f"{source}/*.tar"))
    for shard in plan.shards():
        cut_shard(shard, plan, recipe, out / "clips")
    counts = finish_index(out / "clips", finished_parts(out / "clips").values(), recipe)
    _publish(out / "clips", "clips", counts)


def _make_shards(out: Folder) -> None:
    """Two token shards, as `encode` commits them, with a start after each."""
    lines = {}
    for shard in range(2):
        token_shards.resume(out)
        samples = [_sample(shard, place) for place in range(3)]
        lines[shard] = token_shards.write_shard(out, shard, samples, [])
    assert token_shards.resume(out).keys() == lines.keys()
    out.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for shard in sorted(lines) for line in lines[shard]))
    _publish(out, "encode", Counts(input=6, written=6))


def _sample(shard: int, place: int) -> token_shards.Sample:
    tokens = torch.arange(4 * 2 * 8 * 8, dtype=torch.float32).view(4, 2, 8, 8) * (place + 1)
    return token_shards.Sample(place, save({"tokens": tokens}), {"id": f"{shard}/{place}", "split": "train"})


def _publish(out: Folder, kind: str, counts: Counts) -> None:
    out.write_text("_work/scratch", "gone when it is published")
    record = Record(kind=kind, name=kind, key="0" * 16, version=1, config={}, digest="", started="", seconds=0.0, counts=counts)
    assert not list(verify.problems(publish(out, record)))


def _videos(out: Folder) -> None:
    for tar in range(2):
        file = io.BytesIO()
        writer = TarWriter(file)
        for number in range(3):
            writer.add(f"{tar}-{number}.mp4", encode(moving(12, seed=number), rate=8) if number else b"no video")
        writer.close()
        out.write_bytes(f"{tar}.tar", file.getvalue())


@pytest.mark.parametrize("seed", [1, 2])
def test_data_stages_on_a_store_full_of_faults_write_the_bytes_of_a_calm_one(
    object_store: str, proxy: S3Proxy, tmp_path: Path, seed: int
) -> None:
    """Listing, cutting, committing, resuming, publishing and verifying; quarantined samples stay the same too."""
    base = Folder(f"{object_store}/{tmp_path.name}")
    _videos(base / "source")
    contents = {}
    for name, plan in (("calm", calm), ("stormy", seeded(seed, EVERYTHING))):
        proxy.begin(plan)
        _make_clips(f"{base}/source", base / name)
        _make_shards(base / name / "encode")
        struck = proxy.count()
        proxy.begin(calm)
        contents[name] = {path: (base / name).read_bytes(path) for path in (base / name).files()}
    assert struck > 20
    assert contents["stormy"] == contents["calm"]


def test_what_a_stale_listing_hides_is_still_there(folder: Folder, proxy: S3Proxy) -> None:
    """A start that sees an old listing deletes no shard that was committed after it."""
    out = folder / "encode"
    token_shards.resume(out)
    lines = token_shards.write_shard(out, 0, [_sample(0, 0)], [])
    proxy.plan = first(Fault.STALE, 1, ["list"], key="")
    token_shards.resume(out)
    proxy.plan = calm
    assert token_shards.resume(out) == {0: lines}
