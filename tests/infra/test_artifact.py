"""Publishing, finding and checking artifacts; leases under contention, takeover and a store that hiccups."""

import hashlib
import json
import os
import subprocess
import threading
import time

import pytest

from kinetok.infra.artifact import LEASE, MANIFEST, RECORD, Artifact, Counts, Lease, Record, Store, publish
from kinetok.infra.errors import StoreError
from kinetok.infra.storage import Folder


def record(name: str = "a", key: str = "0123456789abcdef", **changes: object) -> Record:
    fields = {
        "kind": "toy",
        "name": name,
        "key": key,
        "version": 1,
        "config": {"x": 1},
        "digest": "",
        "started": "2026-01-01",
        "seconds": 1.0,
    }
    return Record.model_validate({**fields, **changes})


def made(store: Store, name: str = "a", key: str = "0123456789abcdef", **changes: object) -> Artifact:
    """An artifact of one plain file and one piece in a manifest."""
    out = store.folder("toy", name, key)
    out.write_text("plain.txt", "plain")
    out.write_text("parts/0.bin", "piece")
    line = {"path": "parts/0.bin", "bytes": 5, "sha256": hashlib.sha256(b"piece").hexdigest()}
    out.write_text(MANIFEST, json.dumps(line))
    out.write_text("_work/scratch", "scratch")
    return publish(out, record(name, key, **changes))


def test_publish_hashes_what_the_manifest_does_not_list(folder: Folder) -> None:
    store = Store(folder)
    artifact = made(store)
    assert set(artifact.record.files) == {"plain.txt", MANIFEST}
    assert artifact.record.files["plain.txt"].sha256 == hashlib.sha256(b"plain").hexdigest()
    assert artifact.record.bytes == 10 + artifact.record.files[MANIFEST].bytes
    assert set(artifact.folder.files()) == {"plain.txt", "parts/0.bin", MANIFEST, RECORD}
    assert store.get("toy", "a", artifact.key) == artifact
    assert list(artifact.problems()) == []
    assert [line["path"] for line in artifact.manifest()] == ["parts/0.bin"]


def test_the_digest_follows_the_content_alone(folder: Folder) -> None:
    store = Store(folder)
    one, two = made(store), made(store, "b", "f" * 16, started="2027-01-01", config={"x": 2})
    assert one.digest == two.digest
    two.folder.write_text("plain.txt", "other")
    assert publish(two.folder, two.record).digest != one.digest


def test_publish_refuses_lost_samples_and_missing_pieces(folder: Folder) -> None:
    with pytest.raises(StoreError, match="lost or doubled samples"):
        publish(folder, record(counts={"input": 3, "written": 1, "filtered": 1}))
    folder.write_text(MANIFEST, json.dumps({"path": "gone", "bytes": 1, "sha256": "0"}))
    with pytest.raises(StoreError, match="gone: the manifest says 1 bytes, there are none"):
        publish(folder, record())
    assert not folder.exists(RECORD)


def test_problems_name_every_damage(folder: Folder) -> None:
    artifact = made(Store(folder))
    out = artifact.folder
    out.write_text("plain.txt", "PLAIN")
    out.write_text("parts/0.bin", "pie")
    out.write_text("extra", "")
    unbalanced = artifact.record.model_copy(update={"counts": Counts(input=1), "digest": "0"})
    found = list(Artifact(out, unbalanced).problems())
    assert set(found[:3]) == {
        "plain.txt: content changed since it was recorded",
        "parts/0.bin: 3 bytes, the record says 5",
        "extra: not in the record",
    }
    assert found[3].startswith("record.json: its digest") and found[4].startswith("counts do not balance")
    out.remove(MANIFEST)
    out.remove("plain.txt")
    assert "plain.txt: missing" in list(artifact.problems())


def test_an_artifact_is_found_under_any_name_it_may_be_given(folder: Folder) -> None:
    store = Store(folder)
    old, new = made(store, key="1" * 16), made(store, key="2" * 16, started="2026-02-01")
    other = made(store, "b", "3" * 16)
    assert store.find("a") == new
    assert store.find("1111") == store.find(f"a-{old.key}") == store.find(str(old.folder)) == old
    assert store.get("toy", "renamed", other.key) == other
    assert sorted(a.key for a in store.all()) == [old.key, new.key, other.key]
    with pytest.raises(StoreError, match=r"no artifact 'c' .* it holds a, b"):
        store.find("c")
    with pytest.raises(StoreError, match="holds no finished artifact"):
        store.find(f"{folder}/toy/c")


def test_a_torn_record_is_an_error_not_a_miss(folder: Folder) -> None:
    store = Store(folder)
    artifact = made(store)
    artifact.folder.write_text(RECORD, "{")
    with pytest.raises(StoreError, match="delete the folder to build it again"):
        store.get("toy", "a", artifact.key)


def test_one_lease_at_a_time(folder: Folder) -> None:
    one, two = Lease(folder), Lease(folder)
    assert one.acquire()
    assert not two.acquire()
    assert two.who() == one.holder
    one.release()
    assert two.acquire()
    two.release()
    assert folder.files() == {}
    assert two.who() == "nobody"


def test_of_many_that_want_a_lease_one_gets_it(folder: Folder) -> None:
    leases = [Lease(folder) for _ in range(6)]
    taken: list[Lease] = []
    threads = [threading.Thread(target=lambda lease=lease: taken.append(lease) if lease.acquire() else None) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    taken[0].release()


def stale(folder: Folder, **changes: object) -> None:
    state = {"holder": "elsewhere:1:abc", "generation": 4, "expires": time.time() - 1, "at": "2026-01-01", **changes}
    folder.write_text(LEASE, json.dumps(state))


def test_an_expired_lease_and_one_of_a_dead_process_are_taken_over(folder: Folder) -> None:
    stale(folder)
    lease = Lease(folder)
    assert lease.acquire()
    assert json.loads(folder.read_text(LEASE))["generation"] == 5
    ended = subprocess.Popen(["true"])
    ended.wait()
    place, _, rest = lease.holder.rsplit(":", 2)
    lease.release()
    stale(folder, holder=f"{place}:{ended.pid}:{rest}", expires=time.time() + 1000)
    assert Lease(folder).acquire()
    stale(folder, expires=time.time() + 1000)
    assert not Lease(folder).acquire(), "a live lease of another machine"


def test_the_heartbeat_renews_and_notices_a_takeover(folder: Folder) -> None:
    lost = threading.Event()
    lease = Lease(folder, seconds=0.3, on_lost=lost.set)
    assert lease.acquire()
    first = folder.read_bytes(LEASE)
    assert _eventually(lambda: folder.read_bytes(LEASE) != first)
    assert not lost.is_set()
    stale(folder, expires=time.time() + 1000)
    assert lost.wait(20)
    assert lease.lost and not lease.renew()
    lease.release()
    assert json.loads(folder.read_text(LEASE))["holder"] == "elsewhere:1:abc", "the new holder's file stays"


def test_a_hiccup_of_the_store_is_no_loss_before_the_term_ends(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    down = threading.Event()
    asked = threading.Semaphore(0)
    write_if = Folder.write_if

    def flaky(self: Folder, name: str, data: bytes, expected: bytes | None) -> bool:
        if down.is_set():
            asked.release()
            raise StoreError("no answer")
        return write_if(self, name, data, expected)

    monkeypatch.setattr(Folder, "write_if", flaky)
    lost = threading.Event()
    lease = Lease(folder, seconds=0.3, on_lost=lost.set)
    assert lease.acquire()
    lease.seconds = 60
    assert lease.renew()
    lease.seconds = 0.03
    down.set()
    assert all(asked.acquire(timeout=20) for _ in range(3)), "the heartbeat asks again"
    assert not lost.is_set()
    down.clear()
    assert lease.renew()
    down.set()
    assert lost.wait(20), "after the term, the lease counts as lost"
    lease.release()


def test_a_write_whose_answer_was_lost_is_still_ours(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store took the heartbeat but the answer did not arrive; the repeated request is refused because of our own write."""
    lease = Lease(folder)
    assert lease.acquire()
    write_if = Folder.write_if

    def twice(self: Folder, name: str, data: bytes, expected: bytes | None) -> bool:
        write_if(self, name, data, expected)
        return write_if(self, name, data, expected)

    monkeypatch.setattr(Folder, "write_if", twice)
    assert lease.renew()
    monkeypatch.undo()
    lease.release()
    assert not folder.exists(LEASE)


def test_a_process_is_known_to_be_dead_only_in_its_own_place() -> None:
    from kinetok.infra.artifact import _is_dead

    mine = Lease(Folder("nowhere")).holder
    assert not _is_dead(mine)
    assert not _is_dead(f"elsewhere:{os.getpid()}:abc")


def _eventually(holds: object) -> bool:
    assert callable(holds)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if holds():
            return True
    return False
