"""Token and feature shards: one WebDataset tar of safetensors per shard, an index beside it, and reading by id.

`shards/000007.tar` holds `000007-000003.safetensors` (the tensors) and `000007-000003.json` (id, caption, split ...) for each sample;
`index/000007.parquet` says where each one starts and carries the shard's digest. The index is written last: a shard without one was
never committed. Any WebDataset reader can stream the tars; `Shards` reads single samples, which a seeded training order needs. A tar's
manifest line also holds the `Moments` of its grid tokens, of all clips and of those to train on, so that `latent_statistics` reads no
token. No pickle anywhere.
Not covered: making the tensors (`encoding.py`, `text_shards.py`).

Legend: Z latent channels, t h w latent positions.
"""

import hashlib
import io
import json
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kinetok.infra.artifact import Artifact
from kinetok.infra.config import Config
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.fingerprint import Plain, plain
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.tars import TarWriter
from kinetok.tokenizers.base import TokenSpec, difference

SPEC_FILE = "spec.json"
RANGE_BYTES = 1 << 20
"""On an object store, samples smaller than this are read with their whole shard: a request costs about as much as 1 MB."""
SHARDS_HELD = 8
"""Whole shards kept in memory when reading small samples from an object store: one window of the training order."""

SMALLEST_STD = 1e-6
"""Below this, against its mean, a channel counts as constant: what is left is the rounding of the sums."""

THREADS = 16
"""Small files read at a time: an object store answers each in tens of milliseconds."""

Line: TypeAlias = dict[str, Plain]
"""One line of `manifest.jsonl`: path, bytes, sha256, count, and of a tar of grid tokens their moments."""
TOKENS = "tokens"
"""Name of the tensor that an encoding with content: tokens stores."""
DRAWS = "draws"
"""Name of the tensor of further draws of the same clip, (draws - 1, N, D), beside the first, which is `tokens`."""
MOMENTS = "moments"
TRAIN_MOMENTS = "train_moments"
"""Of the clips of the `train` split alone; shards of before there were any have those of all clips only."""
Stored: TypeAlias = Literal["fp32", "bf16", "fp16"]
"""Types that numbers are stored in, as jobs call them."""
DTYPES: dict[Stored, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What torch calls them."""

_INDEX = pa.schema(
    [
        ("id", pa.string()),
        ("place", pa.int32()),
        ("split", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
_QUARANTINE = pa.schema(
    [("id", pa.string()), ("shard", pa.int64()), ("reason", pa.string()), ("message", pa.string()), ("position", pa.float64())]
)
_FILES = b"kinetok.files"
"""Key of the index file's metadata: manifest lines of the files committed together with it."""


class Sample(NamedTuple):
    """One sample to write: its place in the shard, safetensors bytes, and what goes into its json member (`id` and `split` at least)."""

    place: int
    payload: bytes
    about: Mapping[str, Plain]


class BadSample(NamedTuple):
    """One sample that could not be made; `position` is a time in seconds or a byte, None where unknown."""

    id: str
    reason: str
    message: str
    position: float | None


class Moments(Config):
    """Sums over all numbers of each latent channel, in float64 of the values as they are stored."""

    numbers: int = 0
    """Of one channel."""
    sums: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()

    @classmethod
    def of(cls, payload: bytes) -> "Moments":
        """Of one sample; nothing unless it holds continuous tokens on a grid, (Z, t, h, w)."""
        values = load(payload).get(TOKENS)
        if values is None or not values.is_floating_point() or values.dim() != 4:
            return cls()
        values_ZN = values.double().flatten(1).numpy()
        return cls(numbers=values_ZN.shape[1], sums=tuple(values_ZN.sum(1).tolist()), squares=tuple(np.square(values_ZN).sum(1).tolist()))

    def __add__(self, other: "Moments") -> "Moments":
        if not self.numbers or not other.numbers:
            return self if self.numbers else other
        sums = tuple(mine + theirs for mine, theirs in zip(self.sums, other.sums, strict=True))
        squares = tuple(mine + theirs for mine, theirs in zip(self.squares, other.squares, strict=True))
        return Moments(numbers=self.numbers + other.numbers, sums=sums, squares=squares)


def shard_name(shard: int) -> str:
    return f"shards/{shard:06d}.tar"


def index_name(shard: int) -> str:
    return f"index/{shard:06d}.parquet"


def quarantine_name(shard: int) -> str:
    return f"quarantine/{shard:06d}.parquet"


def member_name(shard: int, place: int, extension: str) -> str:
    return f"{shard:06d}-{place:06d}.{extension}"


def dtype_name(name: Stored) -> str:
    """The name that a TokenSpec gives a type, from that of a job: bf16 is bfloat16."""
    return str(DTYPES[name]).removeprefix("torch.")


def stamp(out: Folder, spec: BaseModel) -> None:
    """Write `spec.json`, which says what the shards hold; raises ContractError where those of an earlier attempt hold something else."""
    if not out.exists(SPEC_FILE):
        out.write_text(SPEC_FILE, spec.model_dump_json(indent=1))
        return
    changed = difference(type(spec).model_validate_json(out.read_bytes(SPEC_FILE)), spec)
    if changed is not None:
        raise ContractError(f"{out} holds shards of another model: {changed} (there, now); run with --force to encode again")


def write_shard(out: Folder, shard: int, samples: Iterable[Sample], bad: list[BadSample]) -> list[Line]:
    """Commit one shard: tar, quarantine where any, then the index. Returns their manifest lines; equal input gives equal bytes."""
    tar, rows, moments = _pack(shard, samples)
    lines = [_put(out, shard_name(shard), tar, len(rows))]
    if moments[MOMENTS].numbers:
        lines[0].update({name: plain(sums) for name, sums in moments.items()})
    if bad:
        listed = [{**item._asdict(), "shard": shard} for item in bad]
        lines.append(_put(out, quarantine_name(shard), _parquet(pa.Table.from_pylist(listed, schema=_QUARANTINE)), len(bad)))
    table = pa.Table.from_pylist(rows, schema=_INDEX.with_metadata({_FILES: json.dumps(lines).encode()}))
    return [*lines, _put(out, index_name(shard), _parquet(table), len(rows))]


def resume(out: Folder) -> dict[int, list[Line]]:
    """Remove what a killed attempt left uncommitted; the manifest lines of every committed shard, read from its index alone."""
    out.sweep()
    done = {_number(name) for name in out.files("index")}
    for name in [*out.files("shards"), *out.files("quarantine")]:
        # A listing may be older than what it lists; the index itself is not.
        if _number(name) not in done and out.exists(index_name(_number(name))):
            done.add(_number(name))
        elif _number(name) not in done:
            out.remove(name)
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(sorted(done), threads.map(lambda shard: _committed(out, shard), sorted(done)), strict=True))


def _committed(out: Folder, shard: int) -> list[Line]:
    data = out.read_bytes(index_name(shard))
    footer = pq.read_metadata(io.BytesIO(data))
    lines: list[Line] = json.loads(footer.metadata[_FILES])
    return [*lines, _line(index_name(shard), data, footer.num_rows)]


def _number(name: str) -> int:
    return int(name.rpartition("/")[2].partition(".")[0])


def added(moments: dict[str, Moments], payload: bytes, split: object) -> dict[str, Moments]:
    """What a manifest line says of a tar's latents, with those of one more sample."""
    more = Moments.of(payload)
    return {MOMENTS: moments[MOMENTS] + more, TRAIN_MOMENTS: moments[TRAIN_MOMENTS] + (more if split == "train" else Moments())}


def no_moments() -> dict[str, Moments]:
    """Of a tar without samples."""
    return {MOMENTS: Moments(), TRAIN_MOMENTS: Moments()}


def _pack(shard: int, samples: Iterable[Sample]) -> tuple[bytes, list[dict[str, Plain]], dict[str, Moments]]:
    buffer = io.BytesIO()
    tar = TarWriter(buffer)
    rows: list[dict[str, Plain]] = []
    moments = no_moments()
    for place, payload, about in samples:
        moments = added(moments, payload, about["split"])
        offset = tar.add(member_name(shard, place, "safetensors"), payload)
        tar.add(member_name(shard, place, "json"), json.dumps(dict(about), sort_keys=True, ensure_ascii=False).encode())
        rows.append({"id": about["id"], "place": place, "split": about["split"], "offset": offset, "bytes": len(payload)})
    tar.close()
    return buffer.getvalue(), rows, moments


def _put(out: Folder, name: str, data: bytes, count: int) -> Line:
    out.write_bytes(name, data)
    return _line(name, data, count)


def _line(name: str, data: bytes, count: int) -> Line:
    return {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "count": count}


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def read_index(out: Folder) -> pa.Table:
    """The rows of all shards in order, with their `shard` number."""

    def part(name: str) -> pa.Table:
        table = pq.read_table(io.BytesIO(out.read_bytes(name))).replace_schema_metadata()
        return table.add_column(0, "shard", pa.array(np.full(len(table), _number(name))))

    with ThreadPoolExecutor(THREADS) as threads:
        tables = list(threads.map(part, out.files("index")))
    return pa.concat_tables(tables).combine_chunks() if tables else _INDEX.insert(0, pa.field("shard", pa.int64())).empty_table()


def require_spec(shards: TokenSpec, model: TokenSpec) -> None:
    """Refuse shards that another tokenizer wrote (contract 3); how the numbers are stored is the shards' own affair."""
    own = ("content", "dtype", "recipe", "chunk_frames", "chunk_overlap")
    stored: dict[str, object] = {name: getattr(shards, name) for name in own}
    if shards.content == "features":
        stored["channels"] = shards.channels
    changed = shards.difference(model.model_copy(update=stored))
    if changed is not None:
        raise ContractError(
            f"these {shards.content} were not written by this tokenizer: {changed} (shards, tokenizer); "
            "encode the clips with it, or use the tokenizer that wrote them"
        )


def latent_statistics(artifact: Artifact) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over the training clips of an `encode` artifact, (Z,) float32 each.

    Read from the manifest alone; where shards of it are from before they told training clips apart, over all clips. Raises DataError
    where it holds no moments, none of a training clip, or a channel never changes.
    """
    lines = [line for line in artifact.manifest() if MOMENTS in line]
    name = TRAIN_MOMENTS if all(TRAIN_MOMENTS in line for line in lines) else MOMENTS
    moments = sum((Moments.model_validate(line[name]) for line in lines), Moments())
    if not moments.numbers:
        kept = "training clips, of which it has none," if lines else "continuous tokens on a grid"
        raise DataError(f"{artifact.name}-{artifact.key} holds no statistics: they are kept of {kept} alone")
    mean_Z = np.array(moments.sums) / moments.numbers
    std_Z = np.sqrt(np.maximum(np.array(moments.squares) / moments.numbers - mean_Z**2, 0))
    still = np.flatnonzero(std_Z < SMALLEST_STD * (1 + np.abs(mean_Z)))
    if still.size:
        named = ", ".join(map(str, still))
        raise DataError(f"channels {named} of the latents in {artifact.name} never change: train the tokenizer for longer, or a smaller z")
    return torch.from_numpy(mean_Z).float(), torch.from_numpy(std_Z).float()


@dataclass(frozen=True)
class Shards:
    """Random access to the samples of some shards; every process opens its own."""

    folder: Folder
    rows: pa.Table
    """shard, id, place, split, offset and bytes of every sample, in shard order."""

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, ids: pa.Array) -> NDArray[np.int64]:
        """Row number of each id, -1 where it is not here."""
        found = pa.compute.index_in(ids, value_set=self.rows["id"]).fill_null(-1)
        return np.asarray(found, dtype=np.int64)

    def get(self, sample_id: str) -> dict[str, Tensor]:
        """The tensors of one sample by id; raises DataError where it is not here."""
        row = int(self.find(pa.array([sample_id]))[0])
        if row < 0:
            raise DataError(f"{self.folder} holds no sample {sample_id!r}; it may be in quarantine")
        return self.read(row)

    def read(self, row: int) -> dict[str, Tensor]:
        """The tensors of one sample by row number; raises DataError naming a damaged shard."""
        place = self._places
        shard, offset, size = (int(place[name][row]) for name in ("shard", "offset", "bytes"))
        try:
            tensors: dict[str, Tensor] = load(self._bytes(shard, offset, size))
        except SafetensorError as error:
            raise DataError(f"{self.folder.path(shard_name(shard))}: sample {row} cannot be read ({error}); run `verify` on it") from error
        return tensors

    def about(self, row: int) -> dict[str, Plain]:
        """What the json member beside a sample's tensors says: id, caption, split ... ; raises DataError naming a damaged shard."""
        shard, offset, size = (int(self._places[name][row]) for name in ("shard", "offset", "bytes"))
        header = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        try:
            member = tarfile.TarInfo.frombuf(self._bytes(shard, header, tarfile.BLOCKSIZE), "utf-8", "strict")
            found: dict[str, Plain] = json.loads(self._bytes(shard, header + tarfile.BLOCKSIZE, member.size))
        except (tarfile.TarError, ValueError) as error:
            raise DataError(f"{self.folder.path(shard_name(shard))}: sample {row} says nothing ({error}); run `verify` on it") from error
        return found

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        name = shard_name(shard)
        if self.folder.is_local or size >= RANGE_BYTES:
            return self.folder.read_range(name, offset, size)
        if shard not in self._held:
            self._held[shard] = self.folder.read_bytes(name)
            if len(self._held) > SHARDS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(shard)
        return self._held[shard][offset : offset + size]

    @cached_property
    def _places(self) -> dict[str, NDArray[np.int64]]:
        return {name: self.rows[name].to_numpy() for name in ("shard", "offset", "bytes")}

    @cached_property
    def _held(self) -> OrderedDict[int, bytes]:
        return OrderedDict()


@dataclass(frozen=True)
class TokenShards(Shards):
    """The samples of an `encode` artifact."""

    spec: TokenSpec

    @classmethod
    def open(cls, artifact: Artifact) -> Self:
        """Read the spec and the index, no samples."""
        spec = TokenSpec.model_validate_json(artifact.folder.read_bytes(SPEC_FILE))
        return cls(artifact.folder, read_index(artifact.folder), spec)


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as it is written: on the CPU, contiguous, in `dtype` unless it holds integers."""
    kept = tensor if not tensor.is_floating_point() else tensor.to(dtype)
    return kept.detach().cpu().contiguous()
