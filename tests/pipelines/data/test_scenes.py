"""Scenes follow from their numbers, move, differ, and say what they show; the embedded clips are sound and licensed."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from kinetok.infra.storage import Folder
from kinetok.pipelines.data.cut import cut_video
from kinetok.pipelines.data.decode import decode_clip
from kinetok.pipelines.data.recipe import CutRecipe
from kinetok.pipelines.data.scenes import BACKGROUNDS, COLOURS, EMBEDDED, SceneSet, draw_scene, encode_mp4, write_scenes
from kinetok.pipelines.data.tars import read_samples

DIGEST = "7793345de46287c8"
RECIPE = CutRecipe(fps=8, frames=17, height=64, width=64)


@pytest.mark.parametrize("number", range(2 * len(BACKGROUNDS)))
def test_scenes_move_and_pass_the_filters(number: int) -> None:
    scene = draw_scene(0, number, frames=48, size=64)
    assert scene.pixels_THWC.shape == (48, 64, 64, 3) and scene.pixels_THWC.dtype == np.uint8
    (row,) = cut_video(encode_mp4(scene.pixels_THWC, 16), "v", RECIPE)
    assert row["decision"] == "kept"
    assert float(row["motion"] or 0) > 1 and float(row["luma_std"] or 0) > 5
    assert len(np.unique(scene.pixels_THWC[0].reshape(-1, 3), axis=0)) > 3


def test_scenes_follow_from_seed_and_number() -> None:
    one, again, other, seed = (draw_scene(*args, frames=4, size=32) for args in ((0, 3), (0, 3), (0, 8), (1, 3)))
    assert np.array_equal(one.pixels_THWC, again.pixels_THWC) and one.caption == again.caption
    assert not np.array_equal(one.pixels_THWC, other.pixels_THWC)
    assert not np.array_equal(one.pixels_THWC, seed.pixels_THWC)


def test_captions_name_colours_that_are_there() -> None:
    palette = dict(COLOURS)
    for number in range(20):
        scene = draw_scene(0, number, frames=24, size=64)
        shapes = scene.caption.split(" over ")[0].split()
        colour = next(word for word in shapes if word in palette)
        target = np.array(palette[colour]) * 255
        distance = np.abs(scene.pixels_THWC.astype(float) - target).max(-1)
        assert (distance < 3).any(), f"scene {number}: {scene.caption}"


def test_directions_in_captions_are_true() -> None:
    found = 0
    for number in range(60):
        scene = draw_scene(0, number, frames=25, size=64)
        if " while " in scene.caption or "moves from" not in scene.caption:
            continue
        found += 1
        colour = dict(COLOURS)[next(word for word in scene.caption.split() if word in dict(COLOURS))]
        near = np.abs(scene.pixels_THWC / 255.0 - np.array(colour)).max(-1) < 0.02
        early, late = (np.nonzero(near[frame])[1].mean() for frame in (8, 16))
        assert (late > early) == ("left to right" in scene.caption), scene.caption
    assert found >= 3


def test_mp4_shows_what_was_drawn() -> None:
    scene = draw_scene(0, 0, frames=16, size=64)
    clip = decode_clip(encode_mp4(scene.pixels_THWC, 16), start=0, fps=16, frames=16, height=64, width=64)
    assert np.abs(clip.astype(int) - scene.pixels_THWC).mean() < 4


def test_tars_of_scenes_are_reproducible(tmp_path: Path) -> None:
    drawn = SceneSet(count=5, seed=1, frames=16, size=32, fps=8)
    seen: list[int] = []
    for name in ("one", "two"):
        packed = write_scenes(drawn, Folder(str(tmp_path / name)), shard_videos=2, progress=lambda done, total: seen.append(done))
        assert (packed.shards, packed.videos) == (3, 5)
    assert seen == [1, 2, 3, 4, 5] * 2
    one, two = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two"))
    assert one == two
    with (tmp_path / "one" / "scenes-000000.tar").open("rb") as file:
        sample = next(read_samples(file, "s"))
    assert json.loads(sample.members[1].data)["caption"] == draw_scene(1, 0, frames=16, size=32).caption


def test_embedded_clips_are_small_licensed_and_attributed() -> None:
    with EMBEDDED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    files = {path.stem: path for path in (EMBEDDED.parent / "clips").iterdir()}
    assert {row["videoid"] for row in rows} == set(files)
    assert sum(path.stat().st_size for path in EMBEDDED.parent.rglob("*")) < 6_000_000
    text = (EMBEDDED.parent / "ATTRIBUTION.md").read_text()
    for row in rows:
        assert row["license"] and row["contentUrl"].startswith("https://") and row["name"]
        assert row["videoid"] in text and row["source_repo"] in text


def test_embedded_clips_give_windows() -> None:
    for path in sorted((EMBEDDED.parent / "clips").iterdir())[::9]:
        rows = list(cut_video(path.read_bytes(), path.stem, RECIPE))
        assert any(row["decision"] == "kept" for row in rows)


def test_facts_are_what_the_caption_says_however_long_the_scene() -> None:
    for number in range(12):
        scene, short = draw_scene(0, number, frames=12, size=32), draw_scene(0, number, frames=1, size=32)
        assert scene.shapes == short.shapes and 1 <= len(scene.shapes) <= 3
        assert all(shape.phrase in scene.caption for shape in scene.shapes)
        assert len({shape.colour for shape in scene.shapes}) == len({shape.motion for shape in scene.shapes}) == len(scene.shapes)


def test_a_data_set_may_have_scenes_of_one_shape() -> None:
    drawn = SceneSet(count=8, seed=0, frames=4, size=32, fps=8, most=1)
    assert [len(drawn.scene(number).shapes) for number in range(8)] == [1] * 8
    assert " while " not in drawn.scene(0).caption


def test_what_is_drawn_never_changes() -> None:
    """If this fails, cached scenes no longer are what the code draws: bump the version of the stage with it."""
    captions = "".join(draw_scene(0, number, frames=1, size=32).caption for number in range(10))
    assert hashlib.sha256(captions.encode()).hexdigest().startswith(DIGEST)


def test_a_plain_scene_is_of_one_colour_but_for_its_shape() -> None:
    scene = draw_scene(0, 3, frames=17, size=32, most=1, plain=True)
    (shape,) = scene.shapes
    assert scene.caption == f"{shape.phrase} on plain {shape.background}" and shape.colour != shape.background
    colour, behind = (np.array(dict(COLOURS)[name]) * 255 for name in (shape.colour, shape.background))
    painted = (np.abs(scene.pixels_THWC - behind) > 1).any(-1)
    assert 0 < painted.mean() < 0.5
    assert (np.abs(scene.pixels_THWC[painted] - colour).max(-1) < 3).any()
