"""Weights that others trained and a job names by path or hub id: what they hold, for keys, and bringing them here before a run.

A plan only reads what is on this machine (`facts`), a run downloads the rest first (`fetch`). The digests are of content, so that other
weights under the same name are another stage. Not covered: tokenizers (`models.py`), how the weights are used.
"""

import hashlib
from pathlib import Path

from kinetok.infra.errors import DataError, StoreError

CHUNK = 64 << 20
ENCODER_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")
"""What transformers reads of an encoder and its tokenizer."""
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


def encoder_digests(path: str) -> dict[str, str]:
    """sha256 of every file of a text encoder, in a folder or of the hub. StoreError where it is not on this machine, or is none."""
    from huggingface_hub import snapshot_download

    from kinetok.pipelines.models import CONFIG, is_hub_id

    try:
        folder = Path(snapshot_download(path, local_files_only=True)) if is_hub_id(path) else Path(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} {_LATER}") from error
    files = sorted({file for pattern in ENCODER_FILES for file in folder.glob(pattern)})
    names = {file.name for file in files}
    if CONFIG not in names or not any(name.endswith(".safetensors") for name in names):
        raise StoreError(f"{path} {_LATER if is_hub_id(path) else f'holds no {CONFIG} with weights in safetensors beside it'}")
    return {file.name: _digest(file) for file in files}


def fetch_encoder(path: str) -> None:
    """Download a text encoder of the hub. StoreError where the hub does not give it."""
    from huggingface_hub import snapshot_download

    from kinetok.pipelines.models import is_hub_id

    if not is_hub_id(path):
        return
    try:
        snapshot_download(path, allow_patterns=list(ENCODER_FILES), ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is no folder here, and the Hugging Face hub gives no model of that name: {error}") from error


def _digest(file: Path) -> str:
    state = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(CHUNK):
            state.update(data)
    return state.hexdigest()
