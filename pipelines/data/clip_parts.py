"""One source shard to one part of the clip index: read every video, cut it, commit the part. The unit of resume and of retry.

A tar is streamed once, one sample in memory at a time; files of a folder are read one by one. Whatever is wrong with a sample or
the tar becomes a quarantine row; only a source that changed since it was listed, or cannot be reached, is an error.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import pyarrow.parquet

from kinetok.infra.artifact import MANIFEST, Counts
from kinetok.infra.errors import QuarantineLimit
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import Row, part_bytes, part_name, read_parts
from kinetok.pipelines.data.cut import cut_video
from kinetok.pipelines.data.decode import LIMITS
from kinetok.pipelines.data.guard import Guard, unguarded
from kinetok.pipelines.data.nothing_kept import nothing_kept
from kinetok.pipelines.data.quarantine import summary
from kinetok.pipelines.data.reasons import BadVideo, Reason
from kinetok.pipelines.data.recipe import CutRecipe, IndexRecipe
from kinetok.pipelines.data.sources import (
    PICTURE_EXTENSIONS,
    SPLITS,
    VIDEO_EXTENSIONS,
    Shard,
    SourcePlan,
    check_unchanged,
    open_url,
    read_range,
    version_of,
)
from kinetok.pipelines.data.strangers import caption, label
from kinetok.pipelines.data.tars import DamagedShard, Member, Sample, read_samples

MAX_CAPTION = 10_000
"""Characters kept of a caption."""
MAX_JSON_BYTES = 1 << 20
"""A larger json gives no facts: parsed, it could take thirty times its size."""

_DECISIONS: tuple[Literal["kept"], Literal["filtered"], Literal["quarantined"]] = ("kept", "filtered", "quarantined")


class PartInfo(TypedDict):
    """What a finished part amounts to: a line of the manifest, and its counts."""

    shard: int
    path: str
    bytes: int
    sha256: str
    count: int
    kept: int
    filtered: int
    quarantined: int


@dataclass(frozen=True)
class Candidate:
    """One video of a source, with its bytes or with what is wrong with it."""

    video: str
    url: str
    member: str
    offset: int
    size: int
    caption: str
    group: str
    split: str | None
    data: bytes
    problem: tuple[Reason, str] | None = None


def cut_shard(shard: Shard, plan: SourcePlan, recipe: CutRecipe, out: Folder, guarded: Guard = unguarded) -> PartInfo:
    """Cut one source shard and commit its part to `out` in one step."""
    return write_part(shard.shard, list(shard_rows(shard, plan, recipe, guarded)), out)


def write_part(shard: int, rows: list[Row], out: Folder) -> PartInfo:
    """Commit `rows` as the part of `shard`."""
    data = part_bytes(rows)
    out.write_bytes(part_name(shard), data)
    return part_info(shard, data, Counter(str(row["decision"]) for row in rows))


def part_info(shard: int, data: bytes, decisions: Mapping[str, int]) -> PartInfo:
    """The manifest line and counts of a part."""
    kept, filtered, quarantined = (decisions.get(name, 0) for name in _DECISIONS)
    digest = hashlib.sha256(data).hexdigest()
    return PartInfo(
        shard=shard,
        path=part_name(shard),
        bytes=len(data),
        sha256=digest,
        count=kept + filtered + quarantined,
        kept=kept,
        filtered=filtered,
        quarantined=quarantined,
    )


def finished_parts(out: Folder) -> dict[int, PartInfo]:
    """Parts that an earlier attempt committed, by shard."""
    parts = {}
    for name in out.files("index") if out.exists("index") else ():
        shard = int(name.removeprefix("index/").removesuffix(".parquet"))
        data = out.read_bytes(name)
        decisions = pyarrow.parquet.read_table(io.BytesIO(data), columns=["decision"])["decision"].to_pylist()
        parts[shard] = part_info(shard, data, Counter(decisions))
    return parts


def unite_groups(out: Folder, parts: Iterable[PartInfo], val_fraction: float) -> list[PartInfo]:
    """The parts with every group in one split: one that the source gave to any sample, against the hash, goes for its whole group.

    A part is cut without a look at the others, so only the finished index can tell; parts that already agree are left alone.
    """
    table = read_parts(out, columns=["shard", "group", "split"])
    rows = table.group_by(["shard", "group", "split"]).aggregate([]).to_pylist()
    found = [row for row in rows if row["split"] is not None]  # a bad sample has neither group nor split
    given = {row["group"]: row["split"] for row in found if row["split"] != split_of(row["group"], val_fraction)}
    parted = {row["shard"] for row in found if given.get(row["group"], row["split"]) != row["split"]}
    return [_with_splits(out, part, given) if part["shard"] in parted else part for part in parts]


def _with_splits(out: Folder, part: PartInfo, given: Mapping[str, str]) -> PartInfo:
    rows: list[Row] = pyarrow.parquet.read_table(io.BytesIO(out.read_bytes(part["path"]))).to_pylist()
    return write_part(part["shard"], [{**row, "split": given.get(str(row["group"]), row["split"])} for row in rows], out)


def finish_index(out: Folder, parts: Iterable[PartInfo], recipe: IndexRecipe) -> Counts:
    """Settle the splits, write the manifest and `clips.json`. QuarantineLimit where too much is bad, DataError where nothing is kept."""
    parts = sorted(unite_groups(out, parts, recipe.val_fraction), key=lambda part: part["shard"])
    kept, filtered, bad = (sum(part[name] for part in parts) for name in _DECISIONS)
    counts = Counts(input=kept + filtered + bad, written=kept, filtered=filtered, quarantined=bad)
    if bad > recipe.max_bad_fraction * counts.input:
        raise QuarantineLimit(
            f"{bad} of {counts.input} samples are bad, more than max_bad_fraction {recipe.max_bad_fraction:g} allows:\n"
            f"{summary(out)}\nRepair the source, or raise max_bad_fraction"
        )
    if not kept:
        raise nothing_kept(out)
    lines = [json.dumps({"path": part["path"], "bytes": part["bytes"], "sha256": part["sha256"], "count": part["count"]}) for part in parts]
    out.write_text(MANIFEST, "".join(f"{line}\n" for line in lines))
    geometry = recipe.model_dump(include={"fps", "frames", "height", "width", "shard_clips"})
    out.write_text("clips.json", json.dumps(geometry, indent=1))
    return counts


def count_videos(out: Folder) -> int:
    """Videos that the parts speak of, bad ones among them."""
    return int(read_parts(out, columns=["shard", "video"]).group_by(["shard", "video"]).aggregate([]).num_rows)


def shard_rows(shard: Shard, plan: SourcePlan, recipe: CutRecipe, guarded: Guard = unguarded) -> Iterator[Row]:
    """Index rows of everything in one source shard. Raises DataError where the tar is not the one that was listed."""
    if shard.kind == "folder":
        for candidate in _folder_candidates(shard, plan):
            yield from candidate_rows(candidate, shard.shard, recipe, guarded)
        return
    check_unchanged(shard)
    seen: set[str] = set()
    try:
        with open_url(shard.url) as file:
            for sample in read_samples(file, shard.url):
                for candidate in _candidates(sample, shard, pictures=recipe.frames == 1):
                    yield from candidate_rows(_once(candidate, seen), shard.shard, recipe, guarded)
    except DamagedShard as error:
        label = f"{shard.name}@{error.offset}"
        verdict = _quarantined(Reason.DAMAGED_SHARD, str(error), float(error.offset))
        yield {"id": label, "video": label, "shard": shard.shard, "url": shard.url, "offset": error.offset, **verdict}


def candidate_rows(candidate: Candidate, shard: int, recipe: CutRecipe, guarded: Guard = unguarded) -> Iterator[Row]:
    """Index rows of one video: its windows, or the one row that says why there are none. It is decoded under `guarded`."""
    base: Row = {
        "id": candidate.video,
        "video": candidate.video,
        "shard": shard,
        "url": candidate.url,
        "member": candidate.member,
        "offset": candidate.offset,
        "bytes": candidate.size,
        "caption": candidate.caption,
        "group": candidate.group,
        "split": candidate.split or split_of(candidate.group, recipe.val_fraction),
    }
    if candidate.problem is not None:
        reason, message = candidate.problem
        verdict = _quarantined(reason, message, None)
        yield {**base, **verdict, **({"decision": "filtered"} if reason is Reason.NO_VIDEO else {})}
        return
    try:
        for row in guarded(cut_video, candidate.data, candidate.video, recipe):
            yield {**base, **row}
    except BadVideo as error:
        yield {**base, **_quarantined(error.reason, error.message, error.position)}


def split_of(group: str, val_fraction: float) -> str:
    """`val` for `val_fraction` of all groups, by hash: independent of what else the source holds."""
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) / 2**64
    return "val" if place < val_fraction else "train"


def _quarantined(reason: Reason, message: str, position: float | None) -> Row:
    return {"decision": "quarantined", "reason": reason.value, "message": message, "position": position}


def _once(candidate: Candidate, seen: set[str]) -> Candidate:
    """The candidate, or a quarantined one where its name came before: ids must be unique."""
    if candidate.video not in seen:
        seen.add(candidate.video)
        return candidate
    label = f"{candidate.video}@{candidate.offset}"
    return replace(candidate, video=label, data=b"", problem=(Reason.DUPLICATE, f"the shard holds {candidate.video} before"))


def _candidates(sample: Sample, shard: Shard, *, pictures: bool) -> Iterator[Candidate]:
    """The videos of one sample of a tar, or where it has none, the `pictures`; a sample without any gives one candidate that says so."""
    facts = _facts(sample)
    formats = {m.extension.rpartition(".")[2] for m in sample.members}
    known = PICTURE_EXTENSIONS if pictures and not formats & VIDEO_EXTENSIONS else VIDEO_EXTENSIONS
    videos = [m for m in sample.members if m.problem is not None or m.extension.rpartition(".")[2] in known]
    for member in videos or sample.members[:1]:
        # Several videos of one key (a.left.mp4, a.right.mp4) are told apart by what stands between key and format.
        view = member.extension.rpartition(".")[0]
        key = f"{member.key}.{view}" if view else member.key
        problem = member.problem or (None if videos else (Reason.NO_VIDEO, f"holds only {', '.join(m.name for m in sample.members)}"))
        name = f"{shard.name}/{key}"
        group = facts.group or sample.key
        yield Candidate(name, shard.url, member.name, member.offset, member.size, facts.caption, group, facts.split, member.data, problem)


@dataclass(frozen=True)
class _Facts:
    caption: str = ""
    group: str = ""
    split: str | None = None


def _facts(sample: Sample) -> _Facts:
    """Caption, group and split of a sample: from its json (`caption` or `text`, `group`, `split`), the caption rather from its txt."""
    by_extension = {member.extension: member for member in sample.members if member.problem is None}
    found = _json(by_extension["json"]) if "json" in by_extension else {}
    said = found.get("caption") or found.get("text")
    if "txt" in by_extension:
        said = by_extension["txt"].data[: 4 * MAX_CAPTION].decode("utf-8", "replace")
    group, split = found.get("group"), found.get("split")
    return _Facts(
        caption(said, MAX_CAPTION) if isinstance(said, str) else "",
        label(group[:MAX_CAPTION]) if isinstance(group, str) else "",
        split if split in SPLITS else None,
    )


def _json(member: Member) -> dict[str, object]:
    """The object in a json member; a broken or a huge one gives no facts, because the video beside it is still good."""
    if member.size > MAX_JSON_BYTES:
        return {}
    try:
        found = json.loads(member.data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _folder_candidates(shard: Shard, plan: SourcePlan) -> Iterator[Candidate]:
    for video in plan.videos(shard.shard):
        url = f"{shard.url}/{video.member}"
        data, problem = b"", None
        if video.bytes is None:
            problem = (Reason.MISSING_FILE, f"{video.member} is named in the CSV but not in {shard.url}")
        else:
            data, problem = read_video_file(url)
        said = caption(video.caption, MAX_CAPTION)
        yield Candidate(label(video.video), url, video.member, 0, len(data), said, label(video.group), video.split, data, problem)


def read_video_file(url: str) -> tuple[bytes, tuple[Reason, str] | None]:
    """The bytes of a file, or why there are none: gone, or larger than a video may be."""
    try:
        size, _ = version_of(url)
        if size > LIMITS.bytes:
            return b"", (Reason.TOO_LARGE, f"{size} bytes; the limit is {LIMITS.bytes}")
        return read_range(url, 0, size), None
    except FileNotFoundError:
        return b"", (Reason.MISSING_FILE, f"{url} is not there")
