"""`load`: a trained tokenizer from wherever it is: a folder, an artifact of a store, or MLflow's registry.

Imports no Ray, and MLflow only for a `models:/` address. Not covered: what models there are (`kinetok.tokenizers.catalog`).
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.errors import StoreError
from kinetok.infra.storage import Folder

if TYPE_CHECKING:
    from kinetok.llm.dit import VideoDiT
    from kinetok.tokenizers.base import Tokenizer

CONFIG = "config.json"
MODEL = "model"
STORE_VARIABLE = "KINETOK_STORE"
DEFAULT_STORE = "work"
REGISTRY = "models:/"


def load(where: str | Path, *, store: str | Path | None = None) -> "Tokenizer":
    """The tokenizer at `where`, in eval mode on the CPU.

    `where` is a folder with `config.json`, a folder of a `train` artifact, the name or key of one in `store` (default: $KINETOK_STORE, else
    `./work`), or `models:/name@alias` and `models:/name/version` in MLflow ($MLFLOW_TRACKING_URI, else the store's own database).
    Raises StoreError where there is none.
    """
    text = os.fspath(where)
    place = Store(Folder(str(store or os.environ.get(STORE_VARIABLE, DEFAULT_STORE))))
    if text.startswith(REGISTRY):
        return _from_registry(text, place)
    for folder in (Folder(text), Folder(text) / MODEL):
        if folder.exists(CONFIG):
            return open_model(folder)
    return open_model(model_folder(place.find(text)))


def model_folder(artifact: Artifact) -> Folder:
    """The folder of the model inside an artifact; raises StoreError where it holds none."""
    if f"{MODEL}/{CONFIG}" not in artifact.record.files:
        raise StoreError(f"{artifact.name}-{artifact.key} is a {artifact.kind} artifact without a model: name a stage of kind train")
    return artifact.folder / MODEL


def open_model(folder: Folder) -> "Tokenizer":
    """The tokenizer saved in `folder`, in eval mode; copied from an object store to a temporary folder first."""
    from kinetok.tokenizers.catalog import load as load_local

    with _on_disk(folder) as local:
        return load_local(local)


def open_generator(artifact: Artifact) -> "VideoDiT":
    """The diffusion transformer of a `diffusion` artifact, in eval mode on the CPU."""
    from kinetok.llm.dit import VideoDiT

    with _on_disk(artifact.folder / MODEL) as local:
        return VideoDiT.from_pretrained(local)


@contextmanager
def _on_disk(folder: Folder) -> Iterator[Path]:
    """`folder` on a local disk; copied there for the block where it is on an object store."""
    if folder.is_local:
        yield folder.local
        return
    with tempfile.TemporaryDirectory(prefix="kinetok-") as copy:
        for name in folder.files():
            target = Path(copy, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(folder.read_bytes(name))
        yield Path(copy)


def _from_registry(address: str, store: Store) -> "Tokenizer":
    from kinetok.infra.mlflow_store import registered_files
    from kinetok.tokenizers.catalog import load as load_local

    with registered_files(store, address) as folder:
        return load_local(folder)
