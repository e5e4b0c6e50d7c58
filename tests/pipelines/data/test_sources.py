"""Listings, their digests, shards and CSVs; 10,000 shards stay cheap."""

import os
import tracemalloc
from pathlib import Path

import pytest

from kinetok.infra.errors import DataError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.sources import (
    FOLDER_SHARD,
    SourcePlan,
    check_unchanged,
    folder_videos,
    list_source,
    read_csv,
    read_range,
    version_of,
    write_plan,
)


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def _names(source: str) -> list[str]:
    return [file.name for file in list_source(source).files]


def test_ranges_patterns_and_single_tars(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"a-{i:03d}.tar" for i in range(12)), "b.tar", "note.txt", "[x].tar")
    assert _names(f"{tmp_path}/a-{{003..010}}.tar") == [f"a-{i:03d}.tar" for i in range(3, 11)]
    assert _names(f"{tmp_path}/a-*.tar") == [f"a-{i:03d}.tar" for i in range(12)]
    assert _names(f"{tmp_path}/b.tar") == ["b.tar"]
    assert _names(f"{tmp_path}/[x].tar") == ["[x].tar"]
    assert len(_names(str(tmp_path))) == 14


def test_ranges_over_folders_keep_names_apart(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"{day}/{i}.tar" for day in ("d1", "d2") for i in (0, 1)))
    listing = list_source(f"{tmp_path}/d{{1..2}}/{{0..1}}.tar")
    assert listing.root == str(tmp_path)
    assert [file.name for file in listing.files] == ["d1/0.tar", "d1/1.tar", "d2/0.tar", "d2/1.tar"]
    out = Folder(str(tmp_path / "plan"))
    assert write_plan(out, listing) == 4
    shards = SourcePlan(out).shards()
    assert [shard.name for shard in shards] == ["d1/0", "d1/1", "d2/0", "d2/1"]
    assert [read_range(shard.url, 0, 99) for shard in shards] == [b"d1/0.tar", b"d1/1.tar", b"d2/0.tar", b"d2/1.tar"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{root}/a-{{000..002}}.tar", "1 of 3 shards are missing, first .*a-002.tar"),
        ("{root}/nothing/*.tar", "nothing does not exist"),
        ("{root}/*.mp4.tar", "no tar matches"),
        ("{root}/a-{{9..1}}.tar", "range {{9..1}} is empty"),
        ("{root}/empty", "holds no videos, no pictures and no tars"),
        ("{root}/mixed", "holds both videos and tars"),
        ("{root}/absent", "holds no videos"),
    ],
)
def test_errors_name_what_is_missing(tmp_path: Path, source: str, message: str) -> None:
    _touch(tmp_path, "a-000.tar", "a-001.tar", "empty/note.txt", "mixed/a.mp4", "mixed/b.tar")
    with pytest.raises(DataError, match=message.replace("{{", r"\{").replace("}}", r"\}")):
        list_source(source.format(root=tmp_path))


def test_pictures_count_where_there_are_no_videos(tmp_path: Path) -> None:
    _touch(tmp_path, "pictures/a.jpg", "pictures/b/c.PNG", "pictures/d.webp", "pictures/e.jpeg", "pictures/note.txt")
    _touch(tmp_path, "videos/a.mp4", "videos/a.jpg", "tars/a.tar", "tars/a.jpg")
    assert _names(f"{tmp_path}/pictures") == ["a.jpg", "b/c.PNG", "d.webp", "e.jpeg"]
    assert (_names(f"{tmp_path}/videos"), _names(f"{tmp_path}/tars")) == (["a.mp4"], ["a.tar"])
    (tmp_path / "rows.csv").write_text("videoid,page_dir,name\nc,b,a cat\nd,,a dog\n")
    found = folder_videos(list_source(f"{tmp_path}/pictures"), read_csv(f"{tmp_path}/rows.csv"))
    assert [(video.member, video.caption) for video in found] == [("b/c.PNG", "a cat"), ("d.webp", "a dog")]
    assert [video.video for video in folder_videos(list_source(f"{tmp_path}/pictures"), None)] == ["a", "b/c", "d", "e"]


def test_digest_sees_names_sizes_and_times(tmp_path: Path) -> None:
    _touch(tmp_path, "a.mp4", "b.mp4")
    before = list_source(str(tmp_path)).digest
    assert list_source(str(tmp_path)).digest == before
    os.utime(tmp_path / "a.mp4", (1, 1))
    touched = list_source(str(tmp_path)).digest
    (tmp_path / "b.mp4").rename(tmp_path / "c.mp4")
    renamed = list_source(str(tmp_path)).digest
    _touch(tmp_path, "d.mp4")
    assert len({before, touched, renamed, list_source(str(tmp_path)).digest}) == 4


def test_ten_thousand_shards_are_listed_in_little_memory(tmp_path: Path) -> None:
    for i in range(10_000):
        (tmp_path / f"{i:06d}.tar").touch()
    tracemalloc.start()
    listing = list_source(f"{tmp_path}/{{000000..009999}}.tar")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(listing.files) == 10_000 and len(listing.digest) == 16
    assert peak < 100 << 20


def test_folder_alone(tmp_path: Path) -> None:
    _touch(tmp_path, "x/one.mp4", "two.WEBM", "same.mp4", "same.gif", "notes.txt", "-dash '[1].mkv")
    videos = folder_videos(list_source(str(tmp_path)), None)
    assert [(video.member, video.video) for video in videos] == [
        ("-dash '[1].mkv", "-dash '[1]"),
        ("same.gif", "same.gif"),
        ("same.mp4", "same.mp4"),
        ("two.WEBM", "two"),
        ("x/one.mp4", "x/one"),
    ]
    assert len({video.video for video in videos}) == 5


def test_folder_with_webvid_csv(tmp_path: Path) -> None:
    _touch(tmp_path, "clips/7.mp4", "clips/8.webm", "clips/not-in-csv.mp4", "secret.mp4")
    (tmp_path / "m.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name,group\n"
        '7,http://x,PT00H00M05S,clips,"A cat, sleeping",cats\n'
        "8,http://x,PT00H00M05S,clips,A dog,\n"
        "9,http://x,PT00H00M05S,clips,Gone,\n"
        "secret,http://x,PT00H00M05S,clips/..,Outside,\n"
    )
    (tmp_path / "s.csv").write_text("videoid,split\n7,val\n8,train\n")
    rows = read_csv(str(tmp_path / "m.csv"), str(tmp_path / "s.csv"))
    videos = folder_videos(list_source(str(tmp_path)), rows)
    assert [(v.video, v.member, v.bytes, v.caption, v.group, v.split) for v in videos] == [
        ("7", "clips/7.mp4", 11, "A cat, sleeping", "cats", "val"),
        ("8", "clips/8.webm", 12, "A dog", "8", "train"),
        ("9", "clips/9.mp4", None, "Gone", "9", None),
        ("secret", "clips/../secret.mp4", None, "Outside", "secret", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,name\n1,x\n", "no column 'videoid'; it has id, name"),
        ("videoid,name\n1,x\n1,y\n", "more than once, first '1'"),
        ("videoid,split\n1,test\n", "video 1 has the split 'test'; use one of train, val"),
        ("videoid,group,split\n1,g,val\n2,h,val\n3,g,train\n", "group 'g' has videos in train and in val, video 3 among them"),
        ("", "no column 'videoid'; it has nothing"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_csv(str(tmp_path / "m.csv"))


def test_csv_absent_or_in_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_csv(str(tmp_path / "none.csv"))
    (tmp_path / "m.csv").write_bytes("videoid,name\n1,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_csv(str(tmp_path / "m.csv"))


def test_plan_of_a_folder_reads_one_shard_at_a_time(tmp_path: Path) -> None:
    _touch(tmp_path / "v", *(f"{i:04d}.mp4" for i in range(2 * FOLDER_SHARD + 3)))
    out = Folder(str(tmp_path / "plan"))
    assert write_plan(out, list_source(str(tmp_path / "v"))) == 3
    plan = SourcePlan(out)
    assert [shard.shard for shard in plan.shards()] == [0, 1, 2]
    members = [video.member for shard in plan.shards() for video in plan.videos(shard.shard)]
    assert members == [f"{i:04d}.mp4" for i in range(2 * FOLDER_SHARD + 3)]
    assert {video.shard for video in plan.videos(1)} == {1}


def test_a_tar_that_changed_is_refused(tmp_path: Path) -> None:
    _touch(tmp_path, "a.tar")
    out = Folder(str(tmp_path / "plan"))
    write_plan(out, list_source(f"{tmp_path}/a.tar"))
    (shard,) = SourcePlan(out).shards()
    check_unchanged(shard)
    assert version_of(shard.url) == (shard.bytes, shard.version)
    os.utime(tmp_path / "a.tar", (1, 1))
    with pytest.raises(DataError, match="changed since it was listed"):
        check_unchanged(shard)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="gone since it was listed"):
        check_unchanged(shard)


@pytest.mark.parametrize("name", [b"\xff\xfe.mp4", b"a\x1b[31m.mp4", b"line\nbreak.tar"])
def test_a_name_that_no_index_can_hold_is_named(tmp_path: Path, name: bytes) -> None:
    (tmp_path / "notes\x07.txt").touch()
    _touch(tmp_path, "b.mp4")
    assert _names(str(tmp_path)) == ["b.mp4"]
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    with pytest.raises(DataError, match="plain UTF-8") as caught:
        list_source(str(tmp_path))
    assert str(caught.value).isprintable()


def test_a_csv_with_an_open_quotation_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('videoid,name\na,"' + "x" * 200_000)
    with pytest.raises(DataError, match="line"):
        read_csv(str(tmp_path / "a.csv"))
