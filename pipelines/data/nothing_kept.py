"""`nothing_kept`: the error of a clip index without a clip: how many samples each reason took, the first of each, and what would help.

Where some are kept the index itself says this of the others (`kinetok quarantine`, `summary` of `tokenize.py`); too many quarantined ones
are `QuarantineLimit` (`clip_parts.py`).
"""

from typing import Any

from kinetok.infra.errors import DataError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import read_parts
from kinetok.pipelines.data.reasons import MEANINGS, Reason
from kinetok.pipelines.data.strangers import label

REMEDIES = {
    Reason.TOO_SHORT: "fewer frames, a higher fps or a lower filters.min_seconds",
    Reason.DURATION: "a higher filters.max_seconds",
    Reason.SMALL: "a lower filters.min_side",
    Reason.ASPECT: "a higher filters.max_aspect",
    Reason.STATIC: "a lower filters.min_motion",
    Reason.DARK: "a lower filters.min_luma",
    Reason.FLAT: "a lower filters.min_contrast",
}
"""What a job can change for a sound video; what is broken, or is none, the source has to."""
OTHER_SOURCE = "a source of sound videos"


def nothing_kept(out: Folder) -> DataError:
    """What to raise of a finished index of which no row is kept."""
    table = read_parts(out, columns=["id", "reason", "message"])
    # Not on threads: the first of a reason is that of the source.
    rows = table.group_by("reason", use_threads=False).aggregate([("id", "count"), ("id", "first"), ("message", "first")])
    found = rows.sort_by([("id_count", "descending")]).to_pylist()
    ways = "; ".join(dict.fromkeys(REMEDIES.get(row["reason"], OTHER_SOURCE) for row in found)) or OTHER_SOURCE
    told = "\n".join([f"none of {table.num_rows} samples gives a clip", *map(_line, found)])
    return DataError(f"{told}\nWhat would: {ways}. Fields are those of `clips` in a job file; `kinetok tokenize` takes --frames and --fps")


def _line(row: dict[str, Any]) -> str:
    """A reason's count, meaning and first sample, as `quarantine.summary` has them."""
    reason = row["reason"]
    return f"  {row['id_count']:6d} {reason}: {MEANINGS[reason]}; first {label(row['id_first'])}: {label(row['message_first'])}"
