"""Text embeddings of the captions of clips, in shards like those of tokens: writing them with a frozen encoder, reading them by id.

Each sample holds `text`, (n, E): the embeddings of the n tokens of its caption, without padding; a reader pads them to `max_tokens`.
`spec.json` is a `TextSpec`. Shards are those of the clip index, and captions that repeat inside one are encoded once. Not covered: the
encoders (`kinetok.llm.text`), which shards are due (`stages/text.py`).

Legend: B captions, L text tokens, E text width, n tokens of one caption.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from safetensors.torch import save
from torch import Tensor

from kinetok.infra import meters
from kinetok.infra.artifact import Artifact
from kinetok.infra.config import Config
from kinetok.infra.errors import ConfigError, ContractError, DataError
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.llm.text import TextConfig, TextEncoder
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.ray_tasks import Item, each_on_actors
from kinetok.pipelines.data.tars import read_members
from kinetok.pipelines.data.token_shards import (
    DTYPES,
    SPEC_FILE,
    Line,
    Sample,
    Shards,
    Stored,
    read_index,
    shard_name,
    stored,
    write_shard,
)
from kinetok.tokenizers.base import difference

TEXT = "text"
_ABOUT = ("id", "video", "start", "end", "caption", "split")


class TextSpec(Config):
    """What text shards hold and which weights wrote it."""

    text: TextConfig
    width: int
    """Numbers of one embedding."""
    weights: str
    """sha256 over the encoder's weights."""
    dtype: Stored
    """Type the numbers are stored in."""

    def __str__(self) -> str:
        return f"{self.text.path or self.text.encoder} ({self.text.max_tokens} tokens of {self.width}, weights {self.weights[:12]})"

    @classmethod
    def of(cls, encoder: TextEncoder, dtype: Stored) -> "TextSpec":
        return cls(text=encoder.config, width=encoder.width, weights=encoder.digest(), dtype=dtype)


def open_encoder(config: TextConfig) -> TextEncoder:
    """The text encoder, on the CPU; ConfigError where what `config` names is missing or another model."""
    try:
        return TextEncoder(config)
    except (ValueError, OSError) as error:
        raise ConfigError(f"text: {error}") from error


def require_encoder(learned: TextSpec, encoder: TextEncoder) -> None:
    """Refuse an encoder that is not the one which embeddings of `learned` came from (contract 3)."""
    changed = difference(learned, TextSpec.of(encoder, learned.dtype))
    if changed is not None:
        raise ContractError(
            f"text: {learned.text.path or learned.text.encoder} is another encoder now than the embeddings were made with: {changed} "
            "(embeddings, encoder); put the weights of then in its place, or run `text` and what follows again with those of now"
        )


@dataclass(frozen=True)
class TextShards(Shards):
    """The samples of a `text` artifact."""

    spec: TextSpec

    @classmethod
    def open(cls, artifact: Artifact) -> Self:
        """Read the spec and the index, no samples."""
        spec = TextSpec.model_validate_json(artifact.folder.read_bytes(SPEC_FILE))
        return cls(artifact.folder, read_index(artifact.folder), spec)

    def embeddings(self, row: int) -> tuple[Tensor, Tensor]:
        """Embeddings (max_tokens, E) of one sample, float32 and zero after its tokens, and the mask (max_tokens,), true at tokens."""
        text_nE = self.read(row)[TEXT].float()
        text_LE = text_nE.new_zeros(self.spec.text.max_tokens, self.spec.width)
        text_LE[: len(text_nE)] = text_nE
        return text_LE, torch.arange(len(text_LE)) < len(text_nE)

    def captions(self, split: str) -> Iterator[str]:
        """The captions of a split that are not empty, each once, in order; shards are read as far as they are asked for."""
        seen: set[str] = set()
        for shard in self.rows["shard"].unique().to_pylist():
            name = shard_name(shard)
            with self.folder.open(name) as file:
                for member in (member for member in read_members(file, name) if member.name.endswith(".json")):
                    about = json.loads(member.data)
                    if about["split"] == split and about["caption"] and about["caption"] not in seen:
                        seen.add(about["caption"])
                        yield about["caption"]


@dataclass(frozen=True)
class TextEncoding:
    """What to compute: picklable, handed to every worker."""

    clips: Artifact
    text: TextConfig
    dtype: Stored
    resources: Resources
    out: Folder


def encode_captions(due: list[int], encoding: TextEncoding, stop: threading.Event) -> Iterator[tuple[int, list[Line]]]:
    """Encode the captions of the shards numbered `due` and commit each; yields number and manifest lines as they are committed."""
    items = [{"shard": shard} for shard in due]
    stage = meters.stage_of(encoding.out)
    for done in each_on_actors(stage, partial(_Worker, encoding), items, resources=encoding.resources, stop=stop):
        yield done["shard"], json.loads(done["lines"])


class _Worker:
    """An actor's text encoder, and the clips whose captions it encodes."""

    def __init__(self, encoding: TextEncoding) -> None:
        torch.set_num_threads(max(1, int(encoding.resources.cpus)))
        self.encoding, self.index = encoding, ClipIndex.open(encoding.clips)
        self.encoder = open_encoder(encoding.text).to(torch.device("cuda" if encoding.resources.gpus else "cpu"))

    def __call__(self, item: Item) -> Item:
        clips = self.index.rows.select(_ABOUT).take(self.index.shards[item["shard"]]).to_pylist()
        payloads = self._payloads(list(dict.fromkeys(clip["caption"] or "" for clip in clips)))
        samples = (Sample(place, payloads[clip["caption"] or ""], clip) for place, clip in enumerate(clips))
        lines = write_shard(self.encoding.out, item["shard"], samples, [])
        return {"shard": item["shard"], "lines": json.dumps(lines)}

    def _payloads(self, captions: list[str]) -> dict[str, bytes]:
        """Safetensors bytes of each caption."""
        found: dict[str, bytes] = {}
        size = self.encoding.resources.batch_size
        for first in range(0, len(captions), size):
            chosen = captions[first : first + size]
            text_BLE, mask_BL = self.encoder.encode(chosen)
            kept_BLE, kept_BL = stored(text_BLE, DTYPES[self.encoding.dtype]), mask_BL.cpu()
            for caption, text_LE, mask_L in zip(chosen, kept_BLE, kept_BL, strict=True):
                if not text_LE.isfinite().all():
                    raise DataError(f"the embeddings of {caption!r} are not finite as {self.encoding.dtype}: store them as bf16")
                found[caption] = save({TEXT: text_LE[mask_L].contiguous()})
        return found
