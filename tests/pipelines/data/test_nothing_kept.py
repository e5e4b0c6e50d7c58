"""An index without a clip is an error that counts every reason and names a field of the recipe for each that is one of its bounds."""

import re
from pathlib import Path

import pytest
from tests.pipelines.data.videos import encode, moving

from kinetok.infra.artifact import MANIFEST
from kinetok.infra.errors import DataError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import Row
from kinetok.pipelines.data.clip_parts import Candidate, candidate_rows, finish_index, write_part
from kinetok.pipelines.data.nothing_kept import REMEDIES
from kinetok.pipelines.data.recipe import Filters, IndexRecipe

RECIPE = IndexRecipe(fps=8, frames=5, height=16, width=16, max_bad_fraction=1.0, filters=Filters(min_motion=200))


def rows(name: str, data: bytes, recipe: IndexRecipe = RECIPE) -> list[Row]:
    return list(candidate_rows(Candidate(name, "url", "member", 0, len(data), "", name, None, data), 0, recipe))


def refused(out: Folder, *parts: list[Row]) -> str:
    """What is said of an index of these parts; nothing is finished."""
    with pytest.raises(DataError) as caught:
        finish_index(out, [write_part(number, part, out) for number, part in enumerate(parts)], RECIPE)
    assert not out.exists(MANIFEST) and not out.exists("clips.json")
    return str(caught.value)


def test_every_reason_is_counted_with_its_first_sample_and_a_way_out(tmp_path: Path) -> None:
    slow, short = encode(moving(15), rate=8), encode(moving(3), rate=8)
    told = refused(Folder(str(tmp_path)), rows("short", short) + rows("\x1b[2Jtorn", b"torn"), rows("slow", slow)).split("\n")
    assert told[0] == "none of 5 samples gives a clip" and len(told) == 5
    assert re.fullmatch(r" +3 static: nothing moves; first slow/0: motion \d+\.\d+, at least 200 is wanted", told[1])
    assert any(line.endswith("first short: 3 frames at 8 fps, a window has 5") for line in told[2:4])
    assert any(re.search(r"1 unreadable: .*; first \\x1b\[2Jtorn: ", line) for line in told[2:4])
    assert "a lower filters.min_motion" in told[4] and "fewer frames" in told[4] and "a source of sound videos" in told[4]


def test_a_source_without_samples_is_told_too(tmp_path: Path) -> None:
    assert refused(Folder(str(tmp_path)), []).startswith("none of 0 samples gives a clip\nWhat would: a source of sound videos.")


def test_one_clip_is_enough(tmp_path: Path) -> None:
    out = Folder(str(tmp_path))
    kept = rows("fast", encode(moving(5), rate=8), RECIPE.model_copy(update={"filters": Filters()}))
    counts = finish_index(out, [write_part(0, kept + rows("torn", b"torn"), out)], RECIPE)
    assert (counts.input, counts.written) == (2, 1) and out.exists(MANIFEST)


def test_each_bound_of_the_filters_is_some_reasons_way_out() -> None:
    named = {name for way in REMEDIES.values() for name in re.findall(r"filters\.(\w+)", way)}
    assert named == set(Filters.model_fields)
