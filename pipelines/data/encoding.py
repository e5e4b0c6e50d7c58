"""The Ray Data plan behind `encode`: decode tasks -> model actors -> one small write task per finished shard.

A unit is a run of clips of one output shard, at most `UNIT_BYTES` of pixels, cut between videos (`cut_units`). One unit is one block in
every operator (block sizing is off), and order is preserved, so the driver knows which shard a block belongs to by counting: it passes
block references to `commit_shard` and never holds pixels or tokens. The same units and micro-batches are cut on every run, hence a
resumed run writes the same bytes. Bytes in flight are bounded by a limit on the object store that grows with the workers, not the data.
A video that cannot be decoded, or that the model answers with non-finite numbers, becomes a status row; anything else ends the stage.
Not covered: which shards are due and the artifact around them (`stages/encode.py`), the files (`token_shards.py`).

Legend: B clips, T H W C frames, rows, columns, colours.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol, Self, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, ExecutionResources, TaskPoolStrategy
from ray.exceptions import RayError
from safetensors.torch import save
from torch import Tensor, nn

from kinetok.infra import capacity, meters
from kinetok.infra.compiling import compile_parts
from kinetok.infra.errors import DataError, KinetokError
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.decode import Pixels
from kinetok.pipelines.data.decode_task import LOST, ROWS, STATUS, Sampling, Unit, cut_units, decode_unit, failed
from kinetok.pipelines.data.ray_tasks import named, pool_sizes, worker_options
from kinetok.pipelines.data.reasons import BadVideo, Reason
from kinetok.pipelines.data.stream import blocks as blocks_of
from kinetok.pipelines.data.token_shards import DTYPES, TOKENS, BadSample, Line, Sample, stored, write_shard
from kinetok.tokenizers.base import DecodeRecipe, LowerStage, Tokenizer, Tokens, TokenSpec, standing
from kinetok.tokenizers.causal.chunks import ChunkPlan, encode_chunks, join_latents
from kinetok.tokenizers.causal.tiling import tiled

UNIT_BYTES = 32 << 20
"""Pixels of one decode task: large against the 15 ms that a block costs, small against memory."""
WRITES = 2
"""Shards being written at a time."""
WORKER_BYTES = 512 << 20
"""A decode task asks for this much memory besides its pixels. Ray Data fuses operators that ask for the same resources; asking for
memory keeps decoding out of the model actors."""

_ENCODED = pa.schema([*STATUS, ("payload", pa.large_binary()), ("encode_seconds", pa.float64())])


class ClipEncoder(Protocol):
    """What encodes clips: a tokenizer, or a frozen network whose features are as good as tokens."""

    def spec(self) -> TokenSpec: ...
    def encode(self, video_BCTHW: Tensor) -> Tokens: ...
    def to(self, device: torch.device) -> Self: ...
    def eval(self) -> Self: ...


@dataclass(frozen=True)
class Encoding:
    """What to compute: picklable, handed to every worker."""

    open_model: Callable[[], ClipEncoder]
    content: Literal["tokens", "features"]
    dtype: Literal["fp32", "bf16", "fp16"]
    """Type the numbers are stored in."""
    recipe: DecodeRecipe
    resources: Resources
    chunks: ChunkPlan | None = None
    """Encode clips in these chunks; None encodes each at once."""
    stage: str = "encode"
    """Whose work it is, for meters and Ray's dashboard."""

    @property
    def unit_clips(self) -> int:
        """Clips of one unit: whole micro-batches, at most UNIT_BYTES of pixels but at least one micro-batch."""
        clip = self.recipe.frames * self.recipe.height * self.recipe.width * 3
        return max(1, UNIT_BYTES // (clip * self.resources.batch_size)) * self.resources.batch_size

    @property
    def unit_bytes(self) -> int:
        return self.unit_clips * self.recipe.frames * self.recipe.height * self.recipe.width * 3


class Committed(NamedTuple):
    """What one write task tells the driver; seconds are summed over clips and workers."""

    number: int
    lines: list[Line]
    clips: int
    decode_seconds: float
    encode_seconds: float


def encode_shards(index: ClipIndex, due: Iterable[int], encoding: Encoding, out: Folder, stop: threading.Event) -> Iterator[Committed]:
    """Encode the output shards numbered `due` and commit each in `out`; yields them as they are committed.

    A KinetokError of a worker (a lost source, a full disk) is raised here as itself, and Cancelled once `stop` is set.
    """
    try:
        yield from _encode_shards(index, due, encoding, out, stop)
    except RayError as error:
        cause = _named_cause(error)
        if cause is None:
            raise
        raise cause from error


def _named_cause(error: BaseException | None) -> KinetokError | None:
    """The KinetokError inside Ray's wrappers, which are of its type but carry a traceback as message."""
    while error is not None and (isinstance(error, RayError) or not isinstance(error, KinetokError)):
        error = getattr(error, "cause", None) or error.__cause__
    return error


def _encode_shards(index: ClipIndex, due: Iterable[int], encoding: Encoding, out: Folder, stop: threading.Event) -> Iterator[Committed]:
    units = [unit for shard in due for unit in cut_units(index, shard, encoding.unit_clips)]
    blocks: list[ray.ObjectRef[pa.Table]] = []
    writes: list[ray.ObjectRef[Committed]] = []
    # Closed by hand: an error's traceback may keep this frame, and with it the plan, alive.
    encoded = blocks_of(plan(index, units, encoding), stop)
    try:
        for unit, block in zip(units, encoded, strict=True):
            blocks.append(block)
            expected = len(index.shards[unit.shard])
            if unit.place + unit.clips == expected:
                named = _commit_shard.options(name=f"{encoding.stage}: write shard {unit.shard}")
                writes.append(named.remote(out, unit.shard, expected, *blocks))
                blocks = []
            meters.tell("kinetok_queue", len(blocks) + len(writes), stage=encoding.stage)
            while len(writes) > WRITES:
                done, writes = ray.wait(writes)
                yield from ray.get(done)
        while writes:
            done, writes = ray.wait(writes)
            yield from ray.get(done)
    finally:
        # A stage that was stopped, or lost its lease, begins no further shard, and ends only when none is being written any more. What is
        # being written is not cancelled: Ray 2.60 aborts the driver where a task is cancelled while its arguments are being inlined.
        encoded.close()
        if writes:
            ray.wait(writes, num_returns=len(writes), fetch_local=False)


def plan(index: ClipIndex, units: list[Unit], encoding: Encoding) -> ray.data.Dataset:
    """The dataset of encoded units, one block each, in order; nothing runs until it is iterated."""
    resources = encoding.resources
    least, most = pool_sizes(resources, len(units))
    return decoded(index, units, encoding, actors=most).map_batches(
        named(encoding.stage, Encoder),
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(encoding,),
        compute=ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
        **worker_options(resources),
    )


def decoded(index: ClipIndex, units: list[Unit], encoding: Encoding, *, actors: int) -> ray.data.Dataset:
    """The dataset of decoded units, on the CPUs that the actors leave; with none left they share those of the actors."""
    rows = ray.put(index.rows.select(ROWS).combine_chunks())
    resources = encoding.resources
    cluster = capacity.look()
    taken = actors * resources.cpus if cluster.share(resources.custom, resources.decoder_custom) else 0
    spare = cluster.total("CPU", beside=resources.decoder_custom) - taken
    tasks = min(resources.decoders or max(1, int(spare)), len(units))
    source = ray.data.from_items([unit._asdict() for unit in units], override_num_blocks=len(units))
    context = source.context
    context.execution_options.preserve_order = True
    in_flight = (2 * tasks + 2 * actors + 2) * encoding.unit_bytes
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=in_flight)
    context.op_resource_reservation_enabled = True  # without it nothing bounds the bytes between operators
    context.target_max_block_size = None
    source.set_name(encoding.stage)
    sampling = Sampling(**encoding.recipe.model_dump())
    return source.map_batches(
        partial(
            named(encoding.stage, decode_unit),
            rows=rows,
            sampling=sampling,
            seconds=encoding.resources.decode_seconds,
            stage=encoding.stage,
        ),
        batch_size=None,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=tasks),
        num_cpus=1 if spare >= tasks else 0,
        resources=resources.decoder_custom or None,
        memory=WORKER_BYTES + 3 * encoding.unit_bytes,
    )


class Encoder:
    """A model actor: units of pixels to units of safetensors payloads."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self.device = torch.device("cuda" if encoding.resources.gpus else "cpu")
        torch.set_num_threads(max(1, int(encoding.resources.cpus)))
        self.model = encoding.open_model().to(self.device).eval()
        if encoding.resources.compile:
            compile_parts(standing(cast(nn.Module, self.model)))

    def __call__(self, unit: pa.Table) -> pa.Table:
        began = time.perf_counter()
        rows = unit.drop_columns("pixels").to_pylist()
        sound = [number for number, row in enumerate(rows) if row["reason"] is None]
        size, pixels_BTHWC = self.encoding.resources.batch_size, self._pixels(unit)
        for first in range(0, len(sound), size):
            chosen = sound[first : first + size]
            for number, payload in zip(chosen, self.encode(pixels_BTHWC[chosen]), strict=True):
                rows[number].update(failed(payload) if isinstance(payload, BadVideo) else {"payload": payload})
        seconds = (time.perf_counter() - began) / max(1, len(rows))
        meters.did(self.encoding.stage, "model", samples=len(sound), seconds=seconds * len(rows))
        return pa.Table.from_pylist([{"payload": None, **row, "encode_seconds": seconds} for row in rows], schema=_ENCODED)

    @torch.inference_mode()
    def encode(self, pixels_BTHWC: Pixels) -> list[bytes | BadVideo]:
        """Safetensors bytes of each clip of one micro-batch, or why there are none."""
        video_BCTHW = torch.from_numpy(pixels_BTHWC).to(self.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        arithmetic = DTYPES[self.encoding.resources.dtype]
        with torch.autocast(self.device.type, arithmetic, enabled=arithmetic is not torch.float32), tiled(self.encoding.resources.tile):
            tensors = self._forward(video_BCTHW)
        kept = {name: stored(tensor, DTYPES[self.encoding.dtype]) for name, tensor in tensors.items()}
        return [_payload({name: tensor[i] for name, tensor in kept.items()}) for i in range(len(pixels_BTHWC))]

    def _forward(self, video_BCTHW: Tensor) -> dict[str, Tensor]:
        if self.encoding.content == "tokens":
            if self.encoding.chunks is None:
                return {TOKENS: self.model.encode(video_BCTHW).values}
            return {TOKENS: join_latents(encode_chunks(cast(Tokenizer, self.model), video_BCTHW, self.encoding.chunks))}
        found = cast(LowerStage, self.model).growth_features(video_BCTHW)
        return {"full": found.full_BDthw, "key": found.key_BDthw}

    def _pixels(self, unit: pa.Table) -> Pixels:
        """A view of the pixels of all clips of the unit."""
        recipe = self.encoding.recipe
        (column,) = unit["pixels"].chunks
        start = column.offset * column.type.byte_width
        flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * column.type.byte_width, start)
        return flat.reshape(len(column), recipe.frames, recipe.height, recipe.width, 3)


def _payload(tensors: dict[str, Tensor]) -> bytes | BadVideo:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            return BadVideo(Reason.MODEL_FAILED, f"the model's {name} are not finite")
    return save({name: tensor.clone() for name, tensor in tensors.items()})


def commit_shard(out: Folder, shard: int, expected: int, *blocks: pa.Table) -> Committed:
    """Write one shard of `expected` clips out of its blocks."""
    began = time.perf_counter()
    rows = [row for block in blocks for row in block.to_pylist()]
    places = [(row["shard"], row["place"]) for row in rows]
    assert places == [(shard, place) for place in range(expected)], f"blocks of shard {shard} are not whole or in order: {places}"
    for row in rows:
        if row["reason"] == LOST:
            raise DataError(f"the source of shard {shard} cannot be read: {row['message']}; restore it, then run again")
    abouts = [json.loads(row["about"]) for row in rows]
    samples = [Sample(row["place"], row["payload"], about) for row, about in zip(rows, abouts, strict=True) if row["reason"] is None]
    bad = [
        BadSample(about["id"], row["reason"], row["message"], row["position"])
        for row, about in zip(rows, abouts, strict=True)
        if row["reason"] is not None
    ]
    lines = write_shard(out, shard, samples, bad)
    size = sum(int(str(line["bytes"])) for line in lines)
    meters.did(meters.stage_of(out), "write", samples=len(samples), seconds=time.perf_counter() - began, size=size)
    decode_seconds, encode_seconds = (sum(row[name] for row in rows) for name in ("decode_seconds", "encode_seconds"))
    return Committed(shard, lines, expected, decode_seconds, encode_seconds)


_commit_shard = ray.remote(num_cpus=0)(commit_shard)
