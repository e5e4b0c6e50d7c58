"""Token shards: what is written comes back by id and through plain webdataset; equal input gives equal bytes; specs are enforced."""

import gc
import json
import warnings
from pathlib import Path

import pytest
import torch
import webdataset
from safetensors.torch import load, save

from kinetok.infra.artifact import MANIFEST, Artifact, Counts, Record, publish
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data import token_shards
from kinetok.pipelines.data.token_shards import BadSample, Sample, TokenShards, latent_statistics, require_spec, resume, write_shard
from kinetok.pipelines.data.verify import problems
from kinetok.tokenizers.base import DecodeRecipe, TokenSpec

SPEC = TokenSpec(tokenizer="fake", weights="ab" * 32, layout="grid", channels=2, temporal=1, spatial=4)
BAD = BadSample("video-9/0", "corrupt", "cut short", 1.5)


def tokens(shard: int, place: int) -> torch.Tensor:
    return torch.full((2, 3), 100.0 * shard + place)


def sample(shard: int, place: int) -> Sample:
    about = {"id": f"video.{shard}/{place}", "split": "val" if place == 0 else "train", "caption": "a cåt.runs"}
    return Sample(place, save({"tokens": tokens(shard, place)}), about)


def write(folder: Folder) -> list[list[dict[str, object]]]:
    folder.write_text("spec.json", SPEC.model_dump_json())
    return [write_shard(folder, shard, [sample(shard, place) for place in (0, 1, 3)], [BAD] if shard else []) for shard in (0, 1)]


def artifact(folder: Folder) -> Artifact:
    return Artifact(folder, Record(kind="encode", name="tokens", key="0" * 16, version=1, config={}, digest="", started="", seconds=0))


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    write(Folder(str(tmp_path)))
    return TokenShards.open(artifact(Folder(str(tmp_path))))


def test_samples_come_back_by_id(shards: TokenShards) -> None:
    assert len(shards) == 6 and shards.spec == SPEC
    for shard in (0, 1):
        for place in (0, 1, 3):
            assert torch.equal(shards.get(f"video.{shard}/{place}")["tokens"], tokens(shard, place))


def test_a_missing_id_is_named(shards: TokenShards) -> None:
    with pytest.raises(DataError, match=r"video\.9/7"):
        shards.get("video.9/7")


def test_plain_webdataset_reads_the_shards(shards: TokenShards) -> None:
    urls = [str(path) for path in sorted((shards.folder.local / "shards").glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        gc.collect()
    assert [item["json"]["id"] for item in read] == shards.rows["id"].to_pylist()
    assert [item["json"]["caption"] for item in read] == ["a cåt.runs"] * 6
    assert torch.equal(load(read[4]["safetensors"])["tokens"], tokens(1, 1))


def test_equal_input_gives_equal_bytes_and_lines(tmp_path: Path) -> None:
    first, second = Folder(str(tmp_path / "a")), Folder(str(tmp_path / "b"))
    assert write(first) == write(second)
    assert first.files() == second.files()
    assert all(first.read_bytes(name) == second.read_bytes(name) for name in first.files())


def test_resuming_knows_the_manifest_lines_and_removes_what_was_never_committed(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    lines = write(folder)
    assert resume(folder) == dict(enumerate(lines))
    kept = folder.files()
    for left in ("shards/000002.tar", "quarantine/000002.parquet", "shards/000003.tar.tmp-ab12"):
        folder.write_bytes(left, b"half")
    assert resume(folder) == dict(enumerate(lines))
    assert folder.files() == kept
    assert not list(tmp_path.rglob("*.tmp-*"))
    assert [line["path"] for line in lines[1]] == ["shards/000001.tar", "quarantine/000001.parquet", "index/000001.parquet"]


def test_statistics_of_the_latents_are_in_the_manifest(tmp_path: Path) -> None:
    """In the precision they are stored in, over all training samples and cells, whatever the shards; of old shards, over all samples."""
    folder = Folder(str(tmp_path))
    values = torch.randn(5, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).mul(3).add(1).bfloat16()
    payloads = [save({"tokens": tensor.contiguous()}) for tensor in values]
    about = [{"id": str(number), "split": "val" if number == 3 else "train"} for number in range(5)]
    lines = write_shard(folder, 0, [Sample(n, payloads[n], about[n]) for n in (0, 1)], [])
    lines += write_shard(folder, 1, [Sample(n - 2, payloads[n], about[n]) for n in (2, 3, 4)], [])
    assert resume(folder) == {0: lines[:2], 1: lines[2:]}
    folder.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for line in lines))
    made = publish(folder, artifact(folder).record.model_copy(update={"counts": Counts(input=5, written=5)}))
    assert list(problems(made)) == []
    learned, (mean_Z, std_Z) = values.double()[[0, 1, 2, 4]], latent_statistics(made)
    torch.testing.assert_close(mean_Z, learned.mean((0, 2, 3, 4)).float())
    torch.testing.assert_close(std_Z, learned.var((0, 2, 3, 4), correction=0).sqrt().float())
    lines[2]["train_moments"]["numbers"] += 1
    folder.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for line in lines))
    assert "shards/000001.tar: the sums of its latents are not those of the manifest" in problems(made)
    del lines[0]["train_moments"], lines[2]["train_moments"]
    folder.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for line in lines))
    assert not [sentence for sentence in problems(made) if "sums of its latents" in sentence], "what is not there is not compared"
    torch.testing.assert_close(latent_statistics(made)[0], values.double().mean((0, 2, 3, 4)).float())


def test_statistics_are_of_training_clips_alone(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    lines = write_shard(folder, 0, [Sample(0, save({"tokens": torch.randn(1, 2, 2, 2)}), {"id": "a", "split": "val"})], [])
    folder.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="training clips, of which it has none"):
        latent_statistics(publish(folder, artifact(folder).record))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.ones(2, 3), "no statistics"),
        (torch.ones(2, 1, 2, 2, dtype=torch.int32), "no statistics"),
        (torch.stack([torch.randn(1, 2, 2), torch.full((1, 2, 2), 0.1)]), "channels 1 of the latents in tokens never change"),
    ],
)
def test_what_has_no_statistics_says_so(tmp_path: Path, tokens: torch.Tensor, message: str) -> None:
    folder = Folder(str(tmp_path))
    lines = write_shard(folder, 0, [Sample(0, save({"tokens": tokens}), {"id": "a", "split": "train"})], [])
    folder.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=message):
        latent_statistics(publish(folder, artifact(folder).record))


def test_an_object_store_is_read_by_whole_shards(shards: TokenShards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small samples of a remote store come from a few held shards, at the same offsets."""
    monkeypatch.setattr(Folder, "is_local", property(lambda _: False))
    monkeypatch.setattr(Folder, "read_bytes", lambda folder, name: Path(folder.url, name).read_bytes())
    monkeypatch.setattr(token_shards, "SHARDS_HELD", 1)
    for row in (5, 0, 4, 1):
        shard, place = divmod(row, 3)
        assert torch.equal(shards.read(row)["tokens"], tokens(shard, (0, 1, 3)[place]))
        assert list(shards._held) == [shard]


def test_a_damaged_sample_names_its_shard(shards: TokenShards) -> None:
    path = shards.folder.local / "shards" / "000001.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"shards/000001\.tar"):
        shards.get("video.1/3")


def test_shards_of_another_tokenizer_are_refused_by_the_differing_field() -> None:
    recipe = DecodeRecipe(fps=8, frames=17, height=64, width=64)
    stored = SPEC.model_copy(update={"content": "features", "dtype": "bfloat16", "recipe": recipe, "channels": 512})
    require_spec(stored, SPEC)
    with pytest.raises(ContractError, match="weights: abab"):
        require_spec(stored, SPEC.model_copy(update={"weights": "cd" * 32}))
    with pytest.raises(ContractError, match="channels: 2, 3"):
        require_spec(SPEC, SPEC.model_copy(update={"channels": 3}))
