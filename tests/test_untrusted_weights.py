"""A pickle that would run code is run by nothing that loads weights, and what refuses it says so. Code beside weights is not run either."""

import ast
import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.tokenizers.pretrained.conftest import random_model

import kinetok
from kinetok.infra.errors import DataError, KinetokError
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.token_shards import Sample, Shards, read_index, shard_name, write_shard
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer

ROOT = Path(__file__).parents[1]
FLOORS = ("infra", "tokenizers", "llm", "pipelines")
OWN_PROCESSES = {"pipelines/data/guard.py"}
"""Unpickle what a process of kinetok's own sent through a pipe."""


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """What a bomb makes; it must not be there at the end."""
    found = tmp_path / "executed"
    yield found
    assert not found.exists(), "a pickle was executed"


def _bombs(mark: Path, folder: Path) -> Iterator[Path]:
    """The bomb as torch writes files now, as it wrote them once, and as plain pickle."""
    state = {"weight": Bomb(mark)}
    torch.save(state, folder / "zip.bin")
    torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)
    (folder / "plain.pth").write_bytes(pickle.dumps(state, protocol=2))
    yield from (folder / name for name in ("zip.bin", "old.bin", "plain.pth"))


def test_the_bomb_works(tmp_path: Path) -> None:
    """So that what refuses it below refuses something."""
    for path in _bombs(tmp_path / "executed", tmp_path):
        with contextlib.suppress(RuntimeError):
            torch.load(path, weights_only=False)
        (tmp_path / "executed").rmdir()


def test_published_weights_are_refused(tmp_path: Path, mark: Path) -> None:
    from kinetok.tokenizers.causal.perceptual import load_lpips
    from kinetok.tokenizers.divot.checkpoints import read_state

    for path in _bombs(mark, tmp_path):
        for load in (read_state, lambda file: load_lpips(str(file))):
            with pytest.raises(ValueError, match="more than tensors"):
                load(path)


def test_a_saved_model_is_refused_whatever_its_weights_are_called(tmp_path: Path, mark: Path) -> None:
    CausalTokenizer(CausalConfig(channels=4, mult=(1, 1), strides=((2, 2),), blocks=1, z=4, groups=2)).save_pretrained(tmp_path / "own")
    random_model("wan").save_pretrained(tmp_path / "wan")
    for path in _bombs(mark, tmp_path):
        for folder in (tmp_path / "own", tmp_path / "wan"):
            (weights,) = (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
            for name in (weights.with_suffix(".safetensors").name, "diffusion_pytorch_model.bin"):
                for old in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
                    old.unlink()
                (folder / name).write_bytes(path.read_bytes())
                with pytest.raises((KinetokError, OSError)):
                    kinetok.load(folder)


def test_a_hostile_config_is_refused(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "{", '{"kind": ["causal"]}', '{"_class_name": "os"}', '{"kind": "causal", "channels": 1e999}', "7"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(KinetokError):
            kinetok.load(tmp_path)


def test_a_token_shard_is_never_unpickled(tmp_path: Path, mark: Path) -> None:
    out = Folder(str(tmp_path / "tokens"))
    good = tmp_path / "good.safetensors"
    save_file({"tokens": torch.zeros(4, 1, 2, 2)}, good)
    write_shard(out, 0, [Sample(0, good.read_bytes(), {"id": "a", "split": "train"})], [])
    shards = Shards(out, read_index(out))
    assert shards.get("a")["tokens"].shape == (4, 1, 2, 2)
    offset = int(shards.rows["offset"][0].as_py())
    tar = tmp_path / "tokens" / shard_name(0)
    for path in _bombs(mark, tmp_path):
        data = bytearray(tar.read_bytes())
        size = int(shards.rows["bytes"][0].as_py())
        data[offset : offset + size] = path.read_bytes()[:size].ljust(size, b"\0")
        tar.write_bytes(data)
        with pytest.raises(DataError, match="cannot be read"):
            shards.get("a")


def test_code_beside_weights_is_not_run(tmp_path: Path, mark: Path) -> None:
    from kinetok.llm.text import TextConfig, TextEncoder

    (tmp_path / "custom.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    about = {"model_type": "made_up", "auto_map": {"AutoConfig": "custom.Config", "AutoModel": "custom.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="trust_remote_code"):
        TextEncoder(TextConfig(encoder="t5", path=str(tmp_path)))


def test_no_module_unpickles_files() -> None:
    """`torch.load` says weights_only, transformers and diffusers say use_safetensors for weights, nothing else reads pickles."""
    for path in (path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")):
        if path.relative_to(ROOT).as_posix() in OWN_PROCESSES:
            continue
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name, keywords = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", f"{path}: {ast.unparse(call)}"
            assert name not in ("pickle.load", "pickle.loads", "joblib.load", "yaml.load", "eval", "exec"), f"{path}: {name}"
            assert keywords.get("allow_pickle", "False") == "False" and keywords.get("trust_remote_code", "False") == "False", path
