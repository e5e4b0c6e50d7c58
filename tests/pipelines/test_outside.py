"""Weights that others trained are part of a stage's identity by what they hold, and a plan downloads none."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from kinetok.infra import kept_digest
from kinetok.infra.errors import DataError, StoreError
from kinetok.infra.stage import Stage
from kinetok.pipelines.outside import model_digests
from kinetok.pipelines.stages.evaluate import Evaluate
from kinetok.pipelines.stages.language import Language
from kinetok.pipelines.stages.reconstruct import Reconstruct
from kinetok.pipelines.stages.score import Score
from kinetok.pipelines.stages.text import Text
from kinetok.pipelines.stages.train import Train
from kinetok.pipelines.stages.vit import Vit

CAUSAL = {"kind": "causal", "channels": 4, "mult": [1], "strides": [], "groups": 2}
UNTRAINED = {"kind": "untrained", "width": 8, "hidden": 8, "depth": 1, "heads": 1, "key_heads": 1}
STEPS = {"steps": 1, "global_batch": 1, "optimizers": {"autoencoder": {"lr": 1e-3}}}


def stages(lpips: str | None, text: str | None) -> list[Stage]:
    """Each kind that names weights of others; None for its default."""
    perceptual = {} if lpips is None else {"objective": {"perceptual": {"weights": lpips}}}
    measured = {} if lpips is None else {"lpips": lpips}
    encoder = {} if text is None else {"encoder": "t5", "path": text}
    vit = {} if text is None else {"path": text}
    divot = {"steps": 1, "global_batch": 1, "objective": {"kind": "divot"}, "optimizers": {"divot": {"lr": 1e-3}}}
    speaks = UNTRAINED if text is None else {"kind": "pretrained", "path": text}
    spoken = {"steps": 1, "global_batch": 1, "optimizers": {"divot_lm": {"lr": 1e-3}}, "tasks": [{"kind": "captioning"}]}
    return [
        Train.model_validate({"data": "clips", "model": CAUSAL, **STEPS, **perceptual}),
        Evaluate.model_validate({"data": "clips", "models": ["base"], **measured}),
        Reconstruct.model_validate({"data": "clips", "model": "base", **measured}),
        Text.model_validate({"data": "clips", "text": encoder}),
        Vit.model_validate({"data": "clips", "vit": vit}),
        Train.model_validate({"data": "clips", "model": {"kind": "divot", "vit": vit}, **divot}),
        Language.model_validate({"tokens": ["tokens"], "model": {"language": speaks}, **spoken}),
        Score.model_validate({"generated": ["shown"], "data": "clips", "clip": text}),
        Reconstruct.model_validate({"data": "clips", "model": "base", "clip": text}),
    ]


def with_files(file: str) -> list[Stage]:
    """Each kind that names a file of weights that no hub has."""
    unet = {"steps": 1, "global_batch": 1, "optimizers": {"divot": {"lr": 1e-3}}, "model": {"kind": "divot"}}
    return [
        Score.model_validate({"generated": ["shown"], "data": "clips", "i3d": file}),
        Reconstruct.model_validate({"data": "clips", "model": "base", "i3d": file}),
        Train.model_validate({"data": "clips", **unet, "objective": {"kind": "divot_unet", "dynamicrafter": file}}),
    ]


def save(folder: Path, content: bytes) -> tuple[str, str]:
    """A file of VGG16 and a folder of a text encoder, as far as their names go."""
    (folder / "t5").mkdir(exist_ok=True)
    for file in (folder / "vgg.pth", folder / "t5" / "model.safetensors"):
        file.write_bytes(content)
    (folder / "t5" / "config.json").write_text("{}")
    return str(folder / "vgg.pth"), str(folder / "t5")


def test_other_content_under_the_same_name_is_another_stage(tmp_path: Path) -> None:
    keys = [[stage.key({}) for stage in stages(*save(tmp_path, content))] for content in (b"one", b"two", b"one")]
    assert keys[0] == keys[2] and all(one != two for one, two in zip(*keys[:2], strict=True))
    (tmp_path / "t5" / "README.md").write_text("a card")
    assert [stage.key({}) for stage in stages(*save(tmp_path, b"one"))] == keys[0]


def test_other_content_of_a_file_is_another_stage_and_a_missing_one_is_told_before_anything_runs(tmp_path: Path) -> None:
    file, keys = tmp_path / "weights.pt", []
    for stage in with_files(str(file)):
        with pytest.raises(DataError, match=r"(i3d|objective\.dynamicrafter): .*weights\.pt is no file here"):
            stage.facts()
    for content in (b"one", b"two", b"one"):
        file.write_bytes(content)
        keys.append([stage.key({}) for stage in with_files(str(file))])
    assert keys[0] == keys[2] and all(one != two for one, two in zip(*keys[:2], strict=True))


def test_what_names_no_weights_has_the_facts_it_had() -> None:
    assert [stage.facts() for stage in stages(None, None)] == [{}] * 9
    for stage in stages(None, None):
        stage.fetch()


def test_a_plan_downloads_nothing_and_a_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vgg, t5 = save(tmp_path, b"one")
    here, asked = [False], []

    def snapshot(name: str, *, local_files_only: bool = False, **_: Any) -> str:
        if not local_files_only:
            asked.append(name)
            here[0] = True
        if not here[0]:
            raise FileNotFoundError(name)
        return t5

    def download(repository: str, name: str) -> str:
        asked.append(f"{repository}/{name}")
        here[0] = True
        return vgg

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: vgg if here[0] else None)
    for stage, local in zip(stages("owner/vgg16", "owner/t5"), stages(vgg, t5), strict=True):
        here[0] = False
        with pytest.raises(StoreError, match=r"owner/\w+ is not on this machine yet; a run downloads it"):
            stage.facts()
        assert not asked
        stage.fetch()
        assert asked and stage.facts() == local.facts()
        asked.clear()


def test_a_second_plan_takes_the_digests_that_the_first_has_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vgg, t5 = save(tmp_path, b"one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_digest, "WORTH_BYTES", 1)
    monkeypatch.setattr(kept_digest, "SETTLED_SECONDS", -1.0)
    named = [*stages(vgg, t5), *with_files(vgg)]
    facts = [[stage.facts() for stage in named] for _ in range(2)]
    for entry in (tmp_path / "cache").rglob("digests/*"):
        entry.write_text(entry.read_text()[:-65] + 64 * "0" + "\n")
    assert facts[0] == facts[1] and all(kept != stage.facts() for kept, stage in zip(facts[0], named, strict=True))


def test_the_hubs_own_digest_of_a_large_file_is_taken(tmp_path: Path) -> None:
    save(tmp_path, b"one")
    file = tmp_path / "t5" / "model.safetensors"
    read = model_digests(str(tmp_path / "t5"))
    assert read[file.name] == sha256(b"one").hexdigest()
    blob = file.rename(tmp_path / read[file.name])
    file.symlink_to(blob)
    blob.write_bytes(b"is not read")
    assert model_digests(str(tmp_path / "t5")) == read


def test_what_is_nowhere_is_named(tmp_path: Path) -> None:
    for stage in stages(str(tmp_path / "vgg.pth"), None)[:3]:
        with pytest.raises(DataError, match=r"vgg\.pth is no file here"):
            stage.facts()
    with pytest.raises(StoreError, match=r"holds no config\.json with weights in safetensors beside it"):
        model_digests(str(tmp_path))
