"""Where videos come from: tars (one path, `{000000..000099}` ranges, `*` patterns) or a folder, on a disk or an object store.

`list_source` costs one listing per folder and reads nothing, so that a plan over 10,000 shards takes seconds; its digest (names,
sizes, ETag or modification time) is part of the key of `ingest`, so changed data is seen. `write_plan` turns a listing into the
files of an `ingest` artifact and `SourcePlan` reads them: a source shard is a tar, or `FOLDER_SHARD` files of a folder.
A CSV in WebVid's columns (videoid, contentUrl, duration, page_dir, name; also group and split) says which files of a folder count,
at `page_dir/videoid.mp4`. Not covered: captions for tars from a CSV (`kinetok pack` puts them into the tar), downloading.
"""

import contextlib
import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from os.path import commonpath
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet

from kinetok.infra.errors import DataError
from kinetok.infra.fingerprint import canonical
from kinetok.infra.s3 import Found
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.strangers import label

VIDEO_EXTENSIONS = frozenset(
    {
        *(
            "mp4",
            "m4v",
            "mov",
            "webm",
            "mkv",
            "avi",
            "gif",
            "mpg",
            "mpeg",
            "ts",
            "flv",
            "wmv",
            "asf",
            "ogv",
            "3gp",
            "3g2",
            "mxf",
            "y4m",
            "ivf",
        ),
        *("obu", "264", "h264", "265", "h265", "hevc"),
    }
)
PICTURE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp"))
"""Videos of one frame. They count where there is no video: beside one, a picture is its preview."""
FOLDER_SHARD = 64
"""Files of a folder that are cut, committed and resumed together."""
SPLITS = ("train", "val")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000


@dataclass(frozen=True)
class Listing:
    """What a source holds now."""

    kind: Literal["tar", "folder"]
    root: str
    files: tuple[Found, ...]
    """Tars or videos; names are paths below `root`."""

    @property
    def digest(self) -> str:
        """16 hex digits over names, sizes and versions."""
        state = hashlib.sha256(self.kind.encode())
        for file in self.files:
            state.update(canonical([file.name, file.bytes, file.version]))
        return state.hexdigest()[:16]


@dataclass(frozen=True)
class Shard:
    """One unit of reading and of resume. `name` is the tar's path without folders all share and without `.tar`: it prefixes ids."""

    shard: int
    name: str
    url: str
    kind: str
    bytes: int
    version: str


@dataclass(frozen=True)
class SourceVideo:
    """One file of a folder; `bytes` is None where the CSV names a file that is not there."""

    shard: int
    member: str
    bytes: int | None
    video: str
    caption: str
    group: str
    split: str | None


def list_source(source: str) -> Listing:
    """The tars or videos that `source` names. Raises DataError where there are none, or where a tar of a range is missing."""
    if _RANGE.search(source):
        return _listing_of_names(_expand(source))
    folder, name = _split(source)
    if source.endswith(".tar") or any(sign in name for sign in "*?["):
        found = _files_in(folder)
        exact = [file for file in found if file.name == name]
        matching = exact or [file for file in found if file.name.endswith(".tar") and fnmatchcase(file.name, name)]
        if not matching:
            raise DataError(f"no tar matches {source}; check the path (only the last part may hold * or ?)")
        return Listing("tar", folder, tuple(matching))
    return _listing_of_folder(Folder(source))


def version_of(url: str) -> tuple[int, str]:
    """(bytes, version) of one file now; raises FileNotFoundError."""
    folder, name = _split(url)
    found = Folder(folder).stat(name)
    return found.bytes, found.version


def check_unchanged(shard: Shard) -> None:
    """Raise DataError where a tar is not the one that was listed: offsets would point anywhere."""
    if shard.kind == "folder":
        return
    try:
        now = version_of(shard.url)
    except FileNotFoundError as error:
        raise DataError(f"{shard.url} is gone since it was listed; put it back, or run again: the source will be listed anew") from error
    if now != (shard.bytes, shard.version):
        raise DataError(f"{shard.url} changed since it was listed ({shard.bytes} bytes then, {now[0]} now); run again to list it anew")


@contextlib.contextmanager
def open_url(url: str) -> Iterator[IO[bytes]]:
    """Streamed reading of one file with a large buffer."""
    folder, name = _split(url)
    with Folder(folder).open(name) as file:
        yield file


def read_range(url: str, offset: int, length: int) -> bytes:
    """`length` bytes of a file from `offset` on."""
    folder, name = _split(url)
    return Folder(folder).read_range(name, offset, length)


@dataclass(frozen=True)
class CsvRow:
    """What a CSV says of one video."""

    video: str
    path: str
    """`page_dir/videoid`, without extension."""
    caption: str
    group: str
    split: str | None


def read_csv(url: str, split_csv: str | None = None) -> list[CsvRow]:
    """Rows in WebVid's columns. Only `videoid` is required.

    Raises DataError on a missing column, a repeated id, an unknown split, or two splits in one group.
    """
    splits = {row["videoid"]: row["split"] for row in _rows(split_csv, ("videoid", "split"))} if split_csv else {}
    rows = []
    for row in _rows(url, ("videoid",)):
        video = row["videoid"]
        folder = (row.get("page_dir") or "").strip("/")
        split = splits.get(video) or row.get("split") or None
        if split is not None and split not in SPLITS:
            raise DataError(f"{split_csv or url}: video {video} has the split {split!r}; use one of {', '.join(SPLITS)}, or leave it empty")
        rows.append(CsvRow(video, f"{folder}/{video}" if folder else video, row.get("name") or "", row.get("group") or video, split))
    repeated = [video for video, times in Counter(row.video for row in rows).items() if times > 1]
    if repeated:
        raise DataError(f"{url}: {len(repeated)} videoids stand there more than once, first {repeated[0]!r}; ids must be unique")
    given: dict[str, str] = {}
    for found in rows:
        if found.split is not None and given.setdefault(found.group, found.split) != found.split:
            raise DataError(
                f"{split_csv or url}: group {found.group!r} has videos in {' and in '.join(SPLITS)}, video {found.video} among them; "
                "give a whole group one split"
            )
    return rows


def folder_videos(listing: Listing, rows: list[CsvRow] | None) -> list[SourceVideo]:
    """The videos of a folder in order: of the CSV where given (absent files with bytes None), else every file."""
    if rows is None:
        stems = Counter(stem(file.name) for file in listing.files)
        named = [(file, stem(file.name) if stems[stem(file.name)] == 1 else file.name) for file in listing.files]
        return [SourceVideo(i // FOLDER_SHARD, file.name, file.bytes, video, "", video, None) for i, (file, video) in enumerate(named)]
    by_stem = {stem(file.name): file for file in reversed(listing.files)}
    videos = []
    for i, row in enumerate(rows):
        file = by_stem.get(row.path)
        member, size = (file.name, file.bytes) if file else (f"{row.path}.mp4", None)
        videos.append(SourceVideo(i // FOLDER_SHARD, member, size, row.video, row.caption, row.group, row.split))
    return videos


def write_plan(out: Folder, listing: Listing, rows: list[CsvRow] | None = None) -> int:
    """Write `shards.parquet` and, for a folder, `videos.parquet` (one row group per shard); returns the number of shards."""
    if listing.kind == "tar":
        shards = _tar_shards(listing)
    else:
        videos = folder_videos(listing, rows)
        out.write_bytes("videos.parquet", _parquet([asdict(video) for video in videos], _VIDEOS, FOLDER_SHARD))
        sizes = Counter({video.shard: 0 for video in videos})
        for video in videos:
            sizes[video.shard] += video.bytes or 0
        shards = [Shard(shard, f"{shard:06d}", listing.root, "folder", size, "") for shard, size in sorted(sizes.items())]
    out.write_bytes("shards.parquet", _parquet([asdict(shard) for shard in shards], _SHARDS, 1 << 20))
    return len(shards)


@dataclass(frozen=True)
class SourcePlan:
    """An `ingest` artifact's folder, read."""

    folder: Folder

    def shards(self) -> list[Shard]:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(io.BytesIO(self.folder.read_bytes("shards.parquet"))).to_pylist()
        return [Shard(**row) for row in rows]

    def videos(self, shard: int) -> list[SourceVideo]:
        """The videos of one shard of a folder source; reads only their row group."""
        with self.folder.open("videos.parquet") as file:
            rows: list[dict[str, Any]] = pyarrow.parquet.ParquetFile(file).read_row_group(shard).to_pylist()
        return [SourceVideo(**row) for row in rows]


_TEXT, _NUMBER = pa.string(), pa.int64()
_SHARDS = pa.schema({"shard": pa.int32(), "name": _TEXT, "url": _TEXT, "kind": _TEXT, "bytes": _NUMBER, "version": _TEXT})
_VIDEOS = pa.schema(
    {"shard": pa.int32(), "member": _TEXT, "bytes": _NUMBER, "video": _TEXT, "caption": _TEXT, "group": _TEXT, "split": _TEXT}
)


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema, group: int) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), buffer, row_group_size=group, compression="zstd")
    return buffer.getvalue()


def _split(url: str) -> tuple[str, str]:
    """(folder, name) of a file's URL."""
    text = url if "://" in url else Folder(url).url
    folder, _, name = text.rpartition("/")
    return folder or "/", name


def stem(name: str) -> str:
    """The name of a file of a video or picture without its ending; other names as they are."""
    head, dot, extension = name.rpartition(".")
    return head if dot and extension.lower() in VIDEO_EXTENSIONS | PICTURE_EXTENSIONS else name


def _files_in(url: str) -> list[Found]:
    """Files directly inside a folder, by name."""
    files, folders = Folder(url).entries()
    if not files and not folders:
        raise DataError(f"{url} does not exist, or is empty; check the source's path")
    return files


def _listing_of_folder(folder: Folder) -> Listing:
    """All videos below a folder, or the tars in it, or its pictures; raises DataError where it holds none, or videos and tars."""
    found = folder.found()
    videos, pictures = (
        [file for file in found if file.name.rpartition(".")[2].lower() in known] for known in (VIDEO_EXTENSIONS, PICTURE_EXTENSIONS)
    )
    tars = [file for file in found if file.name.endswith(".tar")]
    if not videos and not tars:
        videos = pictures
    odd = [label(file.name) for file in (*videos, *tars) if label(file.name) != file.name]
    if odd:
        raise DataError(f"{folder} holds a file whose name no index can hold: {odd[0]}; give it a name of plain UTF-8 text")
    if not videos and not tars:
        known = " ".join((*sorted(VIDEO_EXTENSIONS), *sorted(PICTURE_EXTENSIONS)))
        raise DataError(f"{folder} holds no videos, no pictures and no tars (known are {known})")
    if videos and tars:
        raise DataError(f"{folder} holds both videos and tars; name the tars by a pattern ({folder}/*.tar) or move the videos apart")
    return Listing("tar", folder.url, tuple(tars)) if tars else Listing("folder", folder.url, tuple(videos))


def _expand(pattern: str) -> list[str]:
    """`{000..999}` ranges (several multiply), keeping leading zeros."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found[1], found[2]
    if int(last) < int(first) or int(last) - int(first) >= _MAX_SHARDS:
        raise DataError(f"{pattern}: the range {found[0]} is empty or has more than {_MAX_SHARDS} shards")
    tails = _expand(pattern[found.end() :])
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [f"{pattern[: found.start()]}{number}{tail}" for number in numbers for tail in tails]


def _listing_of_names(urls: list[str]) -> Listing:
    """The tars at `urls`, all of which must exist."""
    places = [_split(url) for url in urls]
    present = {folder: {file.name: file for file in _files_in(folder)} for folder in dict.fromkeys(folder for folder, _ in places)}
    missing = [f"{folder}/{name}" for folder, name in places if name not in present[folder]]
    if missing:
        raise DataError(f"{len(missing)} of {len(urls)} shards are missing, first {missing[0]}; correct the range or copy them")
    folders = list(present)
    root = folders[0] if len(folders) == 1 else _common(folders)
    files = (present[folder][name] for folder, name in places)
    named = ((f"{folder}/{name}".removeprefix(root).lstrip("/"), file) for (folder, name), file in zip(places, files, strict=True))
    return Listing("tar", root, tuple(file._replace(name=name) for name, file in named))


def _common(folders: list[str]) -> str:
    scheme, sign, _ = folders[0].rpartition("://")
    return f"{scheme}{sign}{commonpath([folder.removeprefix(scheme + sign) for folder in folders])}"


def _tar_shards(listing: Listing) -> list[Shard]:
    return [
        Shard(number, file.name.removesuffix(".tar"), f"{listing.root}/{file.name}", "tar", file.bytes, file.version)
        for number, file in enumerate(listing.files)
    ]


def _rows(url: str, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    folder, name = _split(url)
    try:
        text = Folder(folder).read_bytes(name).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist; check the path of the CSV") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{url} is not UTF-8 text ({error}); save it as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text))
    absent = [column for column in needed if column not in (reader.fieldnames or ())]
    if absent:
        raise DataError(f"{url} has no column {absent[0]!r}; it has {', '.join(reader.fieldnames or ()) or 'nothing'}")
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{url}, line {reader.line_num}: {error}; a quotation mark may be open") from error
