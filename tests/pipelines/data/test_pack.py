"""Packing: every video once, metadata beside it, tars of the asked size, the same bytes again."""

import json
from pathlib import Path

import pytest

from kinetok.infra.errors import DataError
from kinetok.pipelines.data.pack import Packed, pack
from kinetok.pipelines.data.tars import Sample, read_samples


def _samples(folder: Path) -> list[list[Sample]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            found.append(list(read_samples(file, path.name)))
    return found


def _videos(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def test_pack_with_csv(tmp_path: Path) -> None:
    _videos(tmp_path / "in", "clips/7.mp4", "clips/8.mp4")
    csv = tmp_path / "m.csv"
    csv.write_text("videoid,page_dir,name,group,split\n7,clips,Ein Kätzchen,cats,val\n8,clips,A dog,,\n9,clips,Gone,,\n")
    seen: list[tuple[int, int]] = []
    done = pack(str(tmp_path / "in"), str(tmp_path / "out"), csv=str(csv), progress=lambda i, n: seen.append((i, n)))
    assert (done.shards, done.videos, done.missing) == (1, 2, ("clips/9.mp4",))
    assert seen == [(1, 2), (2, 2)]
    ((first, second),) = _samples(tmp_path / "out")
    assert (first.key, first.members[0].data) == ("7", b"clips/7.mp4" * 100)
    assert json.loads(first.members[1].data) == {"caption": "Ein Kätzchen", "group": "cats", "split": "val"}
    assert json.loads(second.members[1].data) == {"caption": "A dog", "group": "8"}


@pytest.mark.parametrize("limits", [{"shard_videos": 4}, {"shard_bytes": 4 * 2560}])
def test_tars_are_cut_at_the_limit(tmp_path: Path, limits: dict[str, int]) -> None:
    _videos(tmp_path / "in", *(f"{i:02d}.mp4" for i in range(10)))
    done = pack(str(tmp_path / "in"), str(tmp_path / "out"), **limits)  # type: ignore[arg-type]
    assert [len(samples) for samples in _samples(tmp_path / "out")] == [4, 4, 2]
    assert done.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_names_become_keys_that_never_collide(tmp_path: Path) -> None:
    names = ("a.b.mp4", "a b.mp4", "a_b.mp4", "x/../-d.mp4".replace("../", ""), "te[s]t '.mkv")
    _videos(tmp_path / "in", *names)
    pack(str(tmp_path / "in"), str(tmp_path / "out"))
    (samples,) = _samples(tmp_path / "out")
    keys = [sample.key for sample in samples]
    assert len(set(keys)) == len(names)
    assert sorted(sample.members[0].data for sample in samples) == sorted(name.encode() * 100 for name in names)
    assert all(len(sample.members) == 2 and sample.members[0].problem is None for sample in samples)


def test_same_folder_same_bytes(tmp_path: Path) -> None:
    _videos(tmp_path / "in", *(f"{i}.mp4" for i in range(5)))
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        assert isinstance(pack(str(tmp_path / "in"), str(out), shard_videos=2), Packed)
    assert [path.read_bytes() for path in sorted(outs[0].iterdir())] == [path.read_bytes() for path in sorted(outs[1].iterdir())]


def test_tars_are_not_packed_again(tmp_path: Path) -> None:
    _videos(tmp_path / "in", "a.tar")
    with pytest.raises(DataError, match="holds tars"):
        pack(str(tmp_path / "in"), str(tmp_path / "out"))
