"""`pack`: a folder of videos, with a CSV or alone, into WebDataset tars: `<key>.mp4` beside `<key>.json` (caption, group, split).

A key is the video's name with everything but letters, digits, `_`, `-` and `/` replaced. The same folder gives the same bytes. Each
tar is written aside and moved into place whole. Nothing is decoded: bad videos become quarantine rows of `clips`, not gaps here.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kinetok.infra.errors import DataError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.sources import SourceVideo, folder_videos, list_source, read_csv, read_range
from kinetok.pipelines.data.tars import TarWriter

SHARD_BYTES = 256 << 20
SHARD_VIDEOS = 1000


@dataclass(frozen=True)
class PackVideo:
    """One video on its way into a tar; `name` is its key with the file format."""

    key: str
    extension: str
    data: bytes
    caption: str
    group: str
    split: str | None = None

    def members(self) -> Iterator[tuple[str, bytes]]:
        facts = {"caption": self.caption, "group": self.group} | ({"split": self.split} if self.split else {})
        yield f"{self.key}.{self.extension}", self.data
        yield f"{self.key}.json", json.dumps(facts, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Packed:
    """What was written; `missing` are files that the CSV names and the folder lacks."""

    shards: int
    videos: int
    bytes: int
    missing: tuple[str, ...] = ()


def pack(
    folder: str,
    out: str,
    *,
    csv: str | None = None,
    split_csv: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    shard_videos: int = SHARD_VIDEOS,
    prefix: str = "videos",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """Write the videos of `folder` as `{out}/{prefix}-000000.tar` and on; a tar is full at `shard_bytes` or `shard_videos`.

    `progress` is called with (videos done, total). Raises DataError where `folder` holds no videos.
    """
    listing = list_source(folder)
    if listing.kind == "tar":
        raise DataError(f"{folder} holds tars; pack takes a folder of videos")
    videos = folder_videos(listing, read_csv(csv, split_csv) if csv else None)
    present = [video for video in videos if video.bytes is not None]
    missing = tuple(video.member for video in videos if video.bytes is None)
    loaded = _loaded(present, listing.root, progress)
    packed = write_tars(loaded, Folder(out), prefix=prefix, shard_bytes=shard_bytes, shard_videos=shard_videos)
    return Packed(packed.shards, packed.videos, packed.bytes, missing)


def write_tars(videos: Iterable[PackVideo], out: Folder, *, prefix: str, shard_bytes: int = SHARD_BYTES, shard_videos: int) -> Packed:
    """Stream `videos` into tars, one video in memory at a time."""
    shards = count = total = 0
    rest = iter(videos)
    following = next(rest, None)
    with tempfile.TemporaryDirectory(prefix="kinetok-pack-") as scratch:
        while following is not None:
            aside = Path(scratch) / "shard.tar"
            with open(aside, "wb") as file:
                writer, inside = TarWriter(file), 0
                while following is not None and (inside == 0 or (inside < shard_videos and writer.size < shard_bytes)):
                    for name, data in following.members():
                        writer.add(name, data)
                    inside += 1
                    following = next(rest, None)
                writer.close()
            out.put_file(aside, f"{prefix}-{shards:06d}.tar")
            shards, count, total = shards + 1, count + inside, total + writer.size
    return Packed(shards, count, total)


def _loaded(videos: list[SourceVideo], root: str, progress: Callable[[int, int], None]) -> Iterator[PackVideo]:
    taken: set[str] = set()
    for done, video in enumerate(videos, start=1):
        key = _key(video.video, taken)
        data = read_range(f"{root}/{video.member}", 0, video.bytes or 0)
        yield PackVideo(key, video.member.rpartition(".")[2].lower(), data, video.caption, video.group, video.split)
        progress(done, len(videos))


def _key(name: str, taken: set[str]) -> str:
    """`name` as a key that no other video has: a dot would end the key, and `..` would make the member unsafe."""
    plain = re.sub(r"[^\w/-]", "_", name).strip("/") or "video"
    key, number = plain, 1
    while key in taken:
        key, number = f"{plain}-{number}", number + 1
    taken.add(key)
    return key
