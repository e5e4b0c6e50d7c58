"""`load`: a trained tokenizer from wherever it is: a folder, an artifact of a store, MLflow's registry, or the Hugging Face hub.

Imports no Ray, and MLflow only for a `models:/` address. Not covered: what models there are (`kinetok.tokenizers.catalog`).
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.errors import ConfigError, StoreError
from kinetok.infra.storage import Folder

if TYPE_CHECKING:
    from kinetok.llm.dit import VideoDiT
    from kinetok.llm.divot.model import DivotLM
    from kinetok.pipelines.data.language_feed import LanguageSpec
    from kinetok.tokenizers.base import LowerStage, Tokenizer

CONFIG = "config.json"
MODEL = "model"
STORE_VARIABLE = "KINETOK_STORE"
DEFAULT_STORE = "work"
REGISTRY = "models:/"
VAE = "vae"
"""Where pipelines of diffusers keep their autoencoder."""
WEIGHTS = "diffusion_pytorch_model*"
"""Weights of diffusers, in one file or several with an index."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(where: str | Path, *, store: str | Path | None = None, download: bool = True) -> "Tokenizer":
    """The tokenizer at `where`, in eval mode on the CPU.

    `where` is a folder with `config.json` (of diffusers too, or of one of its pipelines), a folder of a `train` artifact, the name or key
    of one in `store` (default: $KINETOK_STORE, else `./work`), `models:/name@alias` and `models:/name/version` in MLflow
    ($MLFLOW_TRACKING_URI, else the store's own database), or an `owner/name` of the Hugging Face hub, of which
    without `download` only what was downloaded before counts. Raises StoreError where there is none, or none that can be used.
    """
    text = os.fspath(where)
    place = open_store(store)
    if text.startswith(REGISTRY):
        return _from_registry(text, place)
    for folder in (Folder(text), Folder(text) / MODEL, Folder(text) / VAE):
        if folder.exists(CONFIG):
            return open_model(folder)
    if is_hub_id(text):
        return open_model(_from_hub(text) if download else _from_cache(text))
    return open_model(model_folder(place.find(text)))


def open_store(store: str | Path | None = None) -> Store:
    """The store at `store`; None is that of $KINETOK_STORE, else `./work`."""
    return Store(Folder(str(store or os.environ.get(STORE_VARIABLE, DEFAULT_STORE))))


def fetch(where: str) -> None:
    """Download what `load(where)` would have to. Raises StoreError where the Hugging Face hub has no such model."""
    if is_hub_id(where):
        _from_hub(where)


def is_hub_id(where: str) -> bool:
    """Whether this is an `owner/name` of the Hugging Face hub, and nothing on this machine."""
    return HUB_ID.fullmatch(where) is not None and not Path(where).exists()


def model_folder(artifact: Artifact) -> Folder:
    """The folder of the model inside an artifact; raises StoreError where it holds none."""
    if f"{MODEL}/{CONFIG}" not in artifact.record.files:
        raise StoreError(f"{artifact.name}-{artifact.key} is a {artifact.kind} artifact without a model: name a stage of kind train")
    return artifact.folder / MODEL


def open_model(folder: Folder) -> "Tokenizer":
    """The tokenizer saved in `folder`, in eval mode; copied from an object store to a temporary folder first."""
    with on_disk(folder) as local:
        return _open_local(local)


def open_generator(artifact: Artifact) -> "VideoDiT":
    """The diffusion transformer of a `diffusion` artifact, in eval mode on the CPU."""
    from kinetok.llm.dit import VideoDiT

    with on_disk(artifact.folder / MODEL) as local:
        return VideoDiT.from_pretrained(local)


def open_language(artifact: Artifact) -> "DivotLM":
    """The Divot-LLM of a `language` artifact, in eval mode on the CPU."""
    from kinetok.llm.divot.model import DivotLM

    with on_disk(artifact.folder / MODEL) as local:
        return DivotLM.from_pretrained(local)


def language_spec(artifact: Artifact) -> "LanguageSpec":
    """Whose tokens the Divot-LLM of an artifact reads and writes."""
    from kinetok.pipelines.data.language_feed import LANGUAGE_FILE, LanguageSpec

    return LanguageSpec.model_validate_json((artifact.folder / MODEL).read_bytes(LANGUAGE_FILE))


def growable(model: "Tokenizer") -> "LowerStage":
    """`model`, where others can be grown upon it; ConfigError with the reason where they cannot."""
    from kinetok.tokenizers.base import lower_stage

    try:
        return lower_stage(model)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def on_disk(folder: Folder, *, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    """`folder` on a local disk; copied there for the block, but for names that match `skip`, where it is on an object store."""
    if folder.is_local:
        yield folder.local
        return
    with tempfile.TemporaryDirectory(prefix="kinetok-") as copy:
        for name in (name for name in folder.files() if not any(fnmatch(name, pattern) for pattern in skip)):
            folder.fetch(name, Path(copy, name))
        yield Path(copy)


def _open_local(folder: str | Path) -> "Tokenizer":
    from kinetok.tokenizers.catalog import load as load_local

    try:
        return load_local(folder)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise StoreError(f"{folder} holds no model that can be loaded: {error}") from error


def on_machine(where: str) -> bool:
    """Whether this is a folder, or the settings of a hub's model were downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    return not is_hub_id(where) or isinstance(try_to_load_from_cache(where, CONFIG), str)


def _from_hub(name: str) -> Folder:
    """The autoencoder of a repository on the Hugging Face hub: its settings first, its weights only where there is an adapter."""
    from huggingface_hub import snapshot_download

    from kinetok.tokenizers.catalog import adapter_of
    from kinetok.tokenizers.pretrained.base import CLASS_KEY

    try:
        copy = Path(snapshot_download(name, allow_patterns=[CONFIG, f"{VAE}/{CONFIG}"]))
        place = VAE if (copy / VAE / CONFIG).is_file() else "."
        adapter_of(json.loads((copy / place / CONFIG).read_text()).get(CLASS_KEY))
        snapshot_download(name, allow_patterns=[WEIGHTS if place == "." else f"{place}/{WEIGHTS}"])
    except (OSError, ValueError) as error:
        raise StoreError(f"{name} is no folder with a {CONFIG}, and the Hugging Face hub gives no model of that name: {error}") from error
    return Folder(str(copy / place))


def _from_cache(name: str) -> Folder:
    """The autoencoder of a repository on the Hugging Face hub that was downloaded before; StoreError where none was."""
    from huggingface_hub import snapshot_download

    copy = None
    with suppress(OSError, ValueError):
        copy = Path(snapshot_download(name, local_files_only=True))
    for place in () if copy is None else (copy / VAE, copy):
        if (place / CONFIG).is_file() and any(place.glob(WEIGHTS)):
            return Folder(str(place))
    raise StoreError(f"{name} is not on this machine yet; a run downloads it from the Hugging Face hub")


def _from_registry(address: str, store: Store) -> "Tokenizer":
    from kinetok.infra.mlflow_store import registered_files

    with registered_files(store, address) as folder:
        return _open_local(folder)
