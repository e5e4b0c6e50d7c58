"""The strict reader against tarfile as oracle, and against every kind of damage; the writer's bytes."""

import io
import tarfile
from pathlib import Path

import pytest

from kinetok.pipelines.data.reasons import Reason
from kinetok.pipelines.data.tars import BLOCK, DamagedShard, Member, TarLimits, TarWriter, read_members, read_samples


def _tar(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    writer = TarWriter(file)
    for name, data in contents.items():
        writer.add(name, data)
    writer.close()
    return file.getvalue()


def _members(data: bytes, **limits: int) -> list[Member]:
    return list(read_members(io.BytesIO(data), "s.tar", TarLimits(**limits)))


def _until_damage(data: bytes) -> tuple[list[str], DamagedShard]:
    names = []
    with pytest.raises(DamagedShard) as caught:
        for member in read_members(io.BytesIO(data), "s.tar"):
            names.append(member.name)
    return names, caught.value


SIXTEEN = {f"{i:02d}.mp4": bytes([i]) * (700 + i) for i in range(16)}


def test_writer_is_read_by_tarfile_and_by_us() -> None:
    contents = {**SIXTEEN, "long/" + "n" * 180 + ".txt": b"caption", "empty.txt": b"", "größe.json": b"{}"}
    data = _tar(contents)
    assert len(data) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {info.name: tar.extractfile(info).read() for info in tar} == contents  # type: ignore[union-attr]
    ours = _members(data)
    assert {member.name: member.data for member in ours} == contents
    assert all(data[m.offset : m.offset + m.size] == m.data for m in ours)


def test_writer_is_deterministic_and_returns_offsets() -> None:
    file = io.BytesIO()
    offset = TarWriter(file).add("a" * 150, b"xyz")
    assert file.getvalue()[offset : offset + 3] == b"xyz"
    assert _tar(SIXTEEN) == _tar(SIXTEEN)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(form: int) -> None:
    name = "folder/" + ("n" * 60 if form == tarfile.USTAR_FORMAT else "ü" * 120) + ".tar.mp4"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("folder"), None)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo(name)
        info.size, info.mtime = 1000, 1.5
        tar.addfile(info, io.BytesIO(b"v" * 1000))
    members = _members(file.getvalue())
    assert [(m.name, m.data) for m in members] == [("folder", b""), (name, b"v" * 1000)]


def test_pax_size_overrides_the_header() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.mp4")
        info.size, info.pax_headers = 600, {"size": "600"}
        tar.addfile(info, io.BytesIO(b"v" * 600))
    assert [m.data for m in _members(file.getvalue())] == [b"v" * 600]


def test_damage_garbage_header() -> None:
    data = bytearray(_tar(SIXTEEN))
    data[5 * 3 * BLOCK : 5 * 3 * BLOCK + BLOCK] = b"\xa5" * BLOCK
    names, error = _until_damage(bytes(data))
    assert names == list(SIXTEEN)[:5]
    assert (error.shard, error.offset) == ("s.tar", 5 * 3 * BLOCK)
    assert "s.tar" in str(error) and str(5 * 3 * BLOCK) in str(error)


def test_damage_zeroed_header_with_data_behind_it() -> None:
    data = bytearray(_tar(SIXTEEN))
    data[5 * 3 * BLOCK : 5 * 3 * BLOCK + BLOCK] = bytes(BLOCK)
    names, error = _until_damage(bytes(data))
    assert (names, error.offset) == (list(SIXTEEN)[:5], 5 * 3 * BLOCK)


def test_damage_zeroed_tail() -> None:
    names, error = _until_damage(_tar(SIXTEEN)[: 5 * 3 * BLOCK] + bytes(200_000))
    assert (names, error.offset) == (list(SIXTEEN)[:5], 5 * 3 * BLOCK)


@pytest.mark.parametrize("cut", [0, 100])
def test_damage_missing_end(cut: int) -> None:
    names, error = _until_damage(_tar(SIXTEEN)[: 5 * 3 * BLOCK + cut])
    assert (names, error.offset) == (list(SIXTEEN)[:5], 5 * 3 * BLOCK)


def test_damage_one_block_of_the_end_is_missing() -> None:
    names, _ = _until_damage(_tar(SIXTEEN)[: 16 * 3 * BLOCK + BLOCK])
    assert names == list(SIXTEEN)


@pytest.mark.parametrize("cut", [10, 710, 1024])
def test_damage_cut_inside_a_member(cut: int) -> None:
    names, error = _until_damage(_tar(SIXTEEN)[: 5 * 3 * BLOCK + BLOCK + cut - 1])
    assert names == list(SIXTEEN)[:5]
    assert error.offset == 5 * 3 * BLOCK + BLOCK + cut - 1


def test_every_cut_is_noticed_and_keeps_what_was_whole() -> None:
    data = _tar({f"{i}.txt": b"x" * 100 for i in range(3)})
    for length in range(0, 3 * 2 * BLOCK + 2 * BLOCK, 128):
        names, _ = _until_damage(data[:length])
        assert names == [f"{i}.txt" for i in range(min(3, length // (2 * BLOCK)))]


def test_empty_file_is_damaged() -> None:
    names, error = _until_damage(b"")
    assert (names, error.offset) == ([], 0)


def test_unsafe_members_are_labelled_not_followed(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("a.mp4", tarfile.SYMTYPE), ("b.mp4", tarfile.LNKTYPE), ("c.mp4", tarfile.CHRTYPE), ("d.mp4", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../../x.mp4", "/abs.mp4", "ok/../../y.mp4", "./fine.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"data"))
    members = _members(file.getvalue())
    assert [m.name for m in members if m.problem is None] == ["./fine.mp4"]
    unsafe = [m for m in members if m.problem is not None]
    assert len(unsafe) == 7
    assert {m.problem[0] for m in unsafe if m.problem} == {Reason.UNSAFE_MEMBER}
    assert all(m.data == b"" for m in unsafe)
    assert list(tmp_path.iterdir()) == []


def test_limits_skip_large_members_and_stop_at_too_many() -> None:
    big, small = _members(_tar({"big.mp4": b"x" * 5000, "small.mp4": b"y"}), member_bytes=4999)
    assert big.problem is not None and big.problem[0] == Reason.TOO_LARGE and big.data == b"" and big.size == 5000
    assert small.data == b"y"
    with pytest.raises(DamagedShard, match="more than 3 members"):
        _members(_tar(SIXTEEN), members=3)


def test_a_member_that_claims_terabytes_takes_no_memory() -> None:
    info = tarfile.TarInfo("a.mp4")
    info.size = 1 << 40
    header = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(DamagedShard, match="ends inside a member of 1099511627776 bytes"):
        _members(header + b"x" * 2000)


def test_hostile_extended_headers_are_damage() -> None:
    huge = tarfile.TarInfo("x")
    huge.type, huge.size = tarfile.XHDTYPE, 1 << 33
    with pytest.raises(DamagedShard, match="extended header"):
        _members(huge.tobuf(tarfile.GNU_FORMAT))
    for body in (b"999999 path=x\n", b"-5 path=x\n", b"path", b"3 p", b"12 size=-99\n"):
        pax = tarfile.TarInfo("x")
        pax.type, pax.size = tarfile.XHDTYPE, len(body)
        member = tarfile.TarInfo("a.mp4").tobuf(tarfile.GNU_FORMAT)
        with pytest.raises(DamagedShard, match="pax header"):
            _members(pax.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % BLOCK) + member)


def test_samples_group_consecutive_members_of_a_key() -> None:
    data = _tar({"a/1.mp4": b"v", "a/1.txt": b"t", "a/1.seg.json": b"{}", "2.mp4": b"w", "b/1.mp4": b"u"})
    samples = list(read_samples(io.BytesIO(data), "s.tar"))
    assert [(s.key, [m.extension for m in s.members]) for s in samples] == [
        ("a/1", ["mp4", "txt", "seg.json"]),
        ("2", ["mp4"]),
        ("b/1", ["mp4"]),
    ]


def test_a_whole_sample_before_the_damage_is_yielded() -> None:
    found = []
    with pytest.raises(DamagedShard):
        for sample in read_samples(io.BytesIO(_tar({"a.mp4": b"v", "a.txt": b"t"})[: 4 * BLOCK]), "s.tar"):
            found.append([m.name for m in sample.members])
    assert found == [["a.mp4", "a.txt"]]


def test_a_sample_is_bounded_in_bytes_and_in_members() -> None:
    members = {f"a.{number}.txt": bytes(600) for number in range(10)}
    limits = TarLimits(sample_bytes=2000, sample_members=6)
    (sample,) = read_samples(io.BytesIO(_tar(members)), "s", limits)
    assert sample.size == sum(len(member.data) for member in sample.members) == 1800
    assert [member.problem is None for member in sample.members] == [True] * 3 + [False] * 4
    assert {member.problem[0] for member in sample.members if member.problem} == {Reason.TOO_LARGE}


def test_names_of_members_hold_no_controls() -> None:
    (member,) = read_members(io.BytesIO(_tar({"\x1b[31m\n.mp4": b"x"})), "s")
    assert member.name == "\\x1b[31m\\n.mp4"
