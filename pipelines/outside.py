"""Weights that others trained and a job names by path or hub id: what they hold, for keys, and bringing them here before a run.

A plan only reads what is on this machine (`facts`), a run downloads the rest first (`fetch`). The digests are of content, so that other
weights under the same name are another stage. Not covered: tokenizers of video (`models.py`), how the weights are used.
"""

import re
from pathlib import Path

from kinetok.infra.errors import DataError, StoreError
from kinetok.infra.fingerprint import Plain, plain
from kinetok.infra.kept_digest import kept_digest

MODEL_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")
"""What transformers reads of a model and its tokenizer."""
_SHA256 = re.compile("[0-9a-f]{64}")
_LATER = "is not on this machine yet; a run downloads it from the Hugging Face hub"


def lpips_digest(weights: str) -> str:
    """sha256 of the file that `load_lpips(weights)` reads. StoreError where it was not downloaded yet, DataError where it is nowhere."""
    from kinetok.tokenizers.causal.perceptual import locate

    try:
        file = locate(weights, download=False)
    except ValueError as error:
        raise DataError(str(error)) from error
    if file is None:
        raise StoreError(f"{weights} {_LATER}")
    return _digest(file)


def fetch_lpips(weights: str) -> None:
    """Download what `load_lpips(weights)` would have to. StoreError where the hub does not give it."""
    from kinetok.tokenizers.causal.perceptual import locate

    try:
        locate(weights)
    except ValueError as error:
        raise StoreError(str(error)) from error


def model_digests(path: str) -> dict[str, str]:
    """sha256 of every file of a model of transformers, in a folder or of the hub. StoreError where it is not here, or is none."""
    from huggingface_hub import snapshot_download

    from kinetok.pipelines.models import CONFIG, is_hub_id

    try:
        folder = Path(snapshot_download(path, local_files_only=True)) if is_hub_id(path) else Path(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} {_LATER}") from error
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    names = {file.name for file in files}
    if CONFIG not in names or not any(name.endswith(".safetensors") for name in names):
        raise StoreError(f"{path} {_LATER if is_hub_id(path) else f'holds no {CONFIG} with weights in safetensors beside it'}")
    return {file.name: _digest(file) for file in files}


def fetch_model(path: str) -> None:
    """Download a model of transformers from the hub. StoreError where the hub does not give it."""
    from huggingface_hub import snapshot_download

    from kinetok.pipelines.models import is_hub_id

    if not is_hub_id(path):
        return
    try:
        snapshot_download(path, allow_patterns=list(MODEL_FILES), ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is no folder here, and the Hugging Face hub gives no model of that name: {error}") from error


def file_digest(path: str, field: str) -> str:
    """sha256 of a file of weights that `field` of a job names. DataError where it is none."""
    if not (file := Path(path)).is_file():
        raise DataError(f"{field}: {path} is no file here; download it, and name its path")
    return _digest(file)


def network_digests(*, clip: str | None = None, i3d: str | None = None, lpips: str | None = None) -> dict[str, Plain]:
    """What is in the networks that measure videos, of those that are named. Raises as those that digest them."""
    found: dict[str, Plain] = {}
    if clip is not None:
        found["clip"] = plain(model_digests(clip))
    if i3d is not None:
        found["i3d"] = file_digest(i3d, "i3d")
    if lpips is not None:
        found["lpips"] = lpips_digest(lpips)
    return found


def fetch_networks(*, clip: str | None = None, lpips: str | None = None) -> None:
    """Download those that are named and only the hub has. StoreError where it does not give them."""
    if clip is not None:
        fetch_model(clip)
    if lpips is not None:
        fetch_lpips(lpips)


def _digest(file: Path) -> str:
    """sha256 of a file. The hub's cache has it in the names of large files, which are links, and weights of gigabytes need not be read."""
    if file.is_symlink() and _SHA256.fullmatch(file.resolve().name):
        return file.resolve().name
    return kept_digest(file)
